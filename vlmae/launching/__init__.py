"""Runs on SLURM and on this machine: launched, swept over, and watched."""

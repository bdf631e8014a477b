"""Flax modules; every array annotation carries its shape."""

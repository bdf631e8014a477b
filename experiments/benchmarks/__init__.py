"""Measurements: each prints one table and says what it ran on."""

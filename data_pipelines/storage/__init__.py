"""Prepared data on disk: how they are written and read."""

"""Runs on disk: writing, resuming, summarizing and loading them."""

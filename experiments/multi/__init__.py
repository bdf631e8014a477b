"""MuLTI's experiments."""

"""Experiments on data that anyone can make or download."""

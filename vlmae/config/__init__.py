"""Experiments as data: frozen dataclasses, checked when made."""

"""SMAUG's experiments."""

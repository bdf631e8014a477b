"""Evaluators: device code that scores, and `metrics`, pure NumPy, that counts."""

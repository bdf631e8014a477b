"""Weights in from Hugging Face layouts; out to PyTorch."""

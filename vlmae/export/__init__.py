"""Checkpoints out: PyTorch, StableHLO, ONNX, and transformers' own classes."""

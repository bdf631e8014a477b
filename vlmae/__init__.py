"""vlmae: masked, sparse and memory-lean video-language pre-training in JAX (SMAUG and MuLTI)."""

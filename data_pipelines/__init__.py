"""From files and annotations to batches: builders, decoding, transforms, the grain pipeline."""

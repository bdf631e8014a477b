"""From prepared data to batches."""

"""Records, batches, classes and the data part of a config."""

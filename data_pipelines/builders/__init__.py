"""TFDS builders: raw annotations and media files -> checked splits in ArrayRecord files."""

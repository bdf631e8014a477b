"""Your own clips: a small model, in sizes that fit a folder of them."""

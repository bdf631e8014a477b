"""One builder a data set: raw annotations and media to checked splits."""

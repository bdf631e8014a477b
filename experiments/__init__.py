"""One plain Python file an experiment; each is runnable."""

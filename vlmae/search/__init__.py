"""Search in a folder of one's own videos: an index of clips, and two ways to ask it."""

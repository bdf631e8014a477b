"""Looking at runs: pictures of what the model sees and makes."""

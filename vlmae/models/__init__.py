"""The parts of the network; `video_language.VideoLanguageModel` composes them."""

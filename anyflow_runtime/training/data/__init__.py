"""Training samples: what a source is, and those of files, of videos with captions, and of the demo."""

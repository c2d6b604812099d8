"""The demo: its synthetic videos and their measures, its model, and how well it samples in any number of steps."""

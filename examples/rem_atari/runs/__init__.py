"""A run on the disk: its folder, checkpoints, metrics and progress, and the agent trained in it."""

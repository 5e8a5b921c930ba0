"""A trained agent in use: load it, let it act, and dream in its world model."""

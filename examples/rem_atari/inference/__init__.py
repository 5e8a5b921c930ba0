"""A trained agent put to work: load it, let it act, and dream in its world model."""

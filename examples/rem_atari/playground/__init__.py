"""The page on which a person plays in an agent's dream, beside the real game: ``rem-atari play``."""

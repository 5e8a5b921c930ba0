"""Films and pictures of games, real and imagined."""

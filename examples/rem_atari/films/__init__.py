"""Films of games, real and imagined."""

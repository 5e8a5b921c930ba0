"""The times of a run's parts on this machine, and the projected time of a whole run."""

"""How long the parts of a run take here, and what that makes of a whole run."""

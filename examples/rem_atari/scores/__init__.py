"""Scores: those of runs and the published ones, normalised and aggregated."""

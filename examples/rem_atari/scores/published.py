"""Published scores on the 26 games of Atari 100K, and the constants of normalisation."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

RANDOM, HUMAN = "random", "human"

GameScores = Mapping[str, tuple[float, ...]]
"""Scores by game, one for each seed."""


@cache
def published_scores() -> Mapping[str, GameScores]:
    """Raw scores by agent, then by game; `RANDOM` and `HUMAN` have one score a game.

    Source: data/README.md.
    """
    text = files("rem_atari.scores").joinpath("data", "atari100k_scores.csv").read_text(encoding="utf-8")
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for row in csv.DictReader(text.splitlines()):
        scores = found.setdefault(row["agent"], {})
        scores[row["game"]] = (*scores.get(row["game"], ()), float(row["score"]))
    return found


def published_agents() -> list[str]:
    """Names of the published agents, without random play and the human."""
    return [agent for agent in published_scores() if agent not in (RANDOM, HUMAN)]


def atari100k_games() -> list[str]:
    """The 26 games by ale-py's names, sorted."""
    return sorted(published_scores()[HUMAN])


def reference_scores(game: str) -> tuple[float, float] | None:
    """Raw scores of random play and of a human, or None for a game that is not one of the 26."""
    table = published_scores()
    if game not in table[HUMAN]:
        return None
    return table[RANDOM][game][0], table[HUMAN][game][0]


def human_normalised(game: str, score: float) -> float | None:
    """(score - random) / (human - random): 0 is random play, 1 a human; None for a game not of the 26."""
    reference = reference_scores(game)
    if reference is None:
        return None
    random, human = reference
    return (score - random) / (human - random)

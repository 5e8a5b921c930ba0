"""Aggregates over games and seeds, with intervals: a mean alone says little about 26 games and five seeds.

Source: Deep Reinforcement Learning at the Edge of the Statistical Precipice, arXiv 2108.13264, and its
authors' package rliable, which computes them and draws the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rliable import library, metrics

METRICS = ("mean", "median", "IQM", "optimality gap")
"""Mean and median of the games' mean scores; the mean of the middle half of all scores; and the mean
shortfall of scores from 1, a human's, with scores above 1 counted as 1."""

FEW_SEEDS = 3
"""Intervals from fewer seeds a game are too narrow to be believed."""

THRESHOLDS = np.linspace(0.0, 8.0, 161)
"""The scores at which a performance profile is evaluated."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval, which is None where no game has two seeds to draw from."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Aggregates:
    """An agent's aggregated scores on some games.

    Attributes:
        agent: its name.
        games: number of games.
        fewest_seeds: seeds of the game with the fewest.
        most_seeds: seeds of the game with the most.
        num_scores: scores of all games together.
        metrics: estimates by the names of `METRICS`.
        above_human: games whose mean score is above 1.
        profile: share of scores above each of `THRESHOLDS`.
        profile_interval: lower and upper ends of its pointwise 95% intervals, or None.
    """

    agent: str
    games: int
    fewest_seeds: int
    most_seeds: int
    num_scores: int
    metrics: Mapping[str, Estimate]
    above_human: int
    profile: NDArray[np.float64]
    profile_interval: tuple[NDArray[np.float64], NDArray[np.float64]] | None


def aggregate(agent: str, scores: Mapping[str, Sequence[float]], *, resamples: int, seed: int) -> Aggregates:
    """Aggregate an agent's human-normalised scores; every game counts the same, however many seeds it has.

    The intervals are percentiles of a bootstrap that draws, for each game anew, as many of its scores as
    there are, with replacement. They measure the variation between seeds, not between choices of games.

    Args:
        agent: its name.
        scores: human-normalised scores by game, one for each seed.
        resamples: draws of the bootstrap.
        seed: seed of the draws.

    Raises:
        ValueError: there is no game, a game has no score, or `resamples` is below 1.
    """
    columns = [np.asarray(each, dtype=np.float64) for each in scores.values()]
    counts = [len(column) for column in columns]
    if not counts or min(counts) == 0:
        raise ValueError(f"aggregate(): {agent} has {counts} scores a game; wanted at least one in each.")
    if resamples < 1:
        raise ValueError(f"aggregate(): resamples is {resamples}, wanted at least 1.")
    point = _measure(_balance(columns))
    low = high = None
    if max(counts) > 1:
        low, high = _bootstrap(columns, resamples, seed)
    estimates = {
        name: Estimate(float(point[place]), None if low is None else (float(low[place]), float(high[place])))
        for place, name in enumerate(METRICS)
    }
    split = len(METRICS)
    return Aggregates(
        agent=agent,
        games=len(counts),
        fewest_seeds=min(counts),
        most_seeds=max(counts),
        num_scores=sum(counts),
        metrics=estimates,
        above_human=sum(bool(column.mean() > 1) for column in columns),
        profile=point[split:],
        profile_interval=None if low is None else (low[split:], high[split:]),
    )


def _bootstrap(
    columns: list[NDArray[np.float64]], resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends of the 95% intervals of everything that `_measure` measures."""
    data: NDArray[np.float64] | list[NDArray[np.float64]]
    if len({len(column) for column in columns}) == 1:
        data, measure = np.stack(columns, axis=1), _measure
    else:
        # rliable takes arrays of different sizes too, one by one; it wants them to be two-dimensional.
        data, measure = [column[:, None] for column in columns], _measure_columns
    with _seeded(seed):
        _, intervals = library.get_interval_estimates({"agent": data}, measure, reps=resamples)
    return intervals["agent"][0], intervals["agent"][1]


def _measure(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values of `METRICS`, then the profile, (4 + T,), of scores (runs, games)."""
    ordered = np.sort(matrix, axis=None)
    profile = 1 - np.searchsorted(ordered, THRESHOLDS, side="right") / ordered.size
    values = [
        metrics.aggregate_mean(matrix),
        metrics.aggregate_median(matrix),
        metrics.aggregate_iqm(matrix),
        metrics.aggregate_optimality_gap(matrix),
    ]
    return np.concatenate([values, profile])


def _measure_columns(*columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """`_measure` of columns (n, 1), one a game."""
    return _measure(_balance([column[:, 0] for column in columns]))


def _balance(columns: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """A matrix (runs, games) in which every game weighs the same: scores of games with fewer are repeated."""
    rows = math.lcm(*(len(column) for column in columns))
    return np.stack([column.repeat(rows // len(column)) for column in columns], axis=1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global random numbers, the only ones that rliable uses, inside the block."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)

"""Which sequences the world model learns from: uniform ones, or more of those with rewards and ends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rem_atari.replay.buffer import Replay, SequenceBatch


class SequenceSampler:
    """Draws sequences, a share of them for their rewards and ends, and says what each counts for.

    Sequences fall into strata: those that hold a reward, those that hold an end but no reward, and the
    others. A share of each batch is drawn evenly from the first two, the rest uniformly from all. What is
    drawn more often than its size deserves counts for less, so that weighted means are those of uniform
    draws: the world model sees rare events in every batch, and still learns how rare they are.

    Args:
        replay: whose sequences they are, and whose generator draws.
        length: steps of a sequence; shorter ones are padded on the right.
        skip: first steps of a sequence that carry no loss, so that events there are none.
        event_share: share of a batch that is drawn for its events, at least 0 (all uniform) and below 1.

    Raises:
        ValueError: `event_share` is out of its range.
    """

    def __init__(self, replay: Replay, length: int, *, skip: int, event_share: float) -> None:
        if not 0 <= event_share < 1:
            raise ValueError(f"SequenceSampler: event_share is {event_share}; wanted 0 <= event_share < 1.")
        self._replay = replay
        self._length = length
        self._skip = skip
        self._event_share = event_share
        self._strata: list[np.ndarray] | None = None

    @property
    def min_real(self) -> int:
        """Steps that a sequence has at least: one that carries a loss."""
        return self._skip + 1

    def refresh(self) -> None:
        """Look at what has been collected; to be called before the first `draw` after each collection."""
        if self._event_share == 0:
            return
        starts = self._replay.sequence_starts(self.min_real)
        pays, ends = self._replay.events_after(starts, self._skip, self._length)
        self._strata = [starts[pays], starts[ends & ~pays], starts[~ends & ~pays]]

    def draw(self, n: int) -> tuple[SequenceBatch, Tensor | None]:
        """n sequences, and their weights (n,) float32, 1 on average; None: all are 1.

        Raises:
            ValueError: no episode is long enough, or `refresh` was never called.
        """
        if self._event_share == 0:
            return self._replay.sample_sequences(n, self._length, min_real=self.min_real), None
        if self._strata is None:
            raise ValueError("SequenceSampler.draw(): call refresh() first.")
        sizes = np.array([len(stratum) for stratum in self._strata])
        if not sizes.any():
            raise ValueError(f"SequenceSampler.draw(): no episode has {self.min_real} steps.")
        uniform = sizes / sizes.sum()
        chances = self._chances(uniform)
        starts, weights = [], []
        for stratum, count in enumerate(self._replay.allot(n, chances)):
            starts.append(self._replay.choose(self._strata[stratum], count))
            weights.append(np.full(count, uniform[stratum] / max(chances[stratum], np.finfo(float).tiny)))
        batch = self._replay.sequences_at(np.concatenate(starts), self._length)
        return batch, torch.from_numpy(np.concatenate(weights).astype(np.float32))

    def _chances(self, uniform: np.ndarray) -> np.ndarray:
        """The chance that a sequence is drawn from each stratum, given that of a uniform draw."""
        wanted = (uniform > 0) & np.array([True, True, False])
        if not wanted.any():
            return uniform
        return (1 - self._event_share) * uniform + self._event_share * wanted / wanted.sum()

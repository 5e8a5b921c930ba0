"""The world model's training sequences: uniform, or more of the informative ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rem_atari.replay.batch import SequenceBatch
from rem_atari.replay.buffer import Replay


class SequenceSampler:
    """Draws sequences, with shares for events and for high losses, and the weight of each.

    By events: sequences fall into three strata: with a reward, with an end but no reward, and the others. A
    share of the batch is drawn evenly from the first two, the rest uniformly from all. Weights compensate the
    oversampling, so that weighted means are those of uniform draws: the world model sees rare events in every
    batch, and still learns how rare they are.

    By losses: a share is drawn by the softmax of the loss that each sequence had when it was last drawn, and
    sequences that were never drawn count as the worst. Their oversampling is intended, so they have weight 1.

    Args:
        replay: the source of sequences and of random numbers.
        length: steps of a sequence; shorter ones are padded on the right.
        skip: first steps of a sequence that carry no loss; events there do not count.
        event_share: of the sequences that are not drawn by their losses, the share that is drawn for their
            events, at least 0 and below 1.
        priority_share: share of a batch that is drawn by losses, from 0 to 1.

    Raises:
        ValueError: a share is out of its range.

    Source: by losses, Simulus (arXiv 2502.11537).
    """

    def __init__(
        self, replay: Replay, length: int, *, skip: int, event_share: float = 0.0, priority_share: float = 0.0
    ) -> None:
        if not 0 <= event_share < 1:
            raise ValueError(f"SequenceSampler: event_share is {event_share}; wanted 0 <= event_share < 1.")
        if not 0 <= priority_share <= 1:
            raise ValueError(
                f"SequenceSampler: priority_share is {priority_share}; wanted 0 <= priority_share <= 1."
            )
        self._replay = replay
        self._length = length
        self._skip = skip
        self._event_share = event_share
        self._priority_share = priority_share
        self._strata: list[np.ndarray] | None = None
        # By first row; NaN for sequences that were never drawn.
        self._losses = np.full(replay.capacity, np.nan, dtype=np.float32)

    @property
    def min_real(self) -> int:
        """Least number of steps in a sequence: at least one carries a loss."""
        return self._skip + 1

    def refresh(self) -> None:
        """Index the collected steps; call it before the first `draw` after each collection."""
        if self._event_share == self._priority_share == 0:
            return
        starts = self._replay.sequence_starts(self.min_real)
        pays, ends = self._replay.events_after(starts, self._skip, self._length)
        self._strata = [starts[pays], starts[ends & ~pays], starts[~ends & ~pays]]

    def draw(self, n: int) -> tuple[SequenceBatch, Tensor | None]:
        """n sequences, and their weights (n,) float32, 1 on average; None: all are 1.

        Raises:
            ValueError: no episode is long enough, or `refresh` was never called.
        """
        if self._event_share == self._priority_share == 0:
            return self._replay.sample_sequences(n, self._length, min_real=self.min_real), None
        if self._strata is None:
            raise ValueError("SequenceSampler.draw(): call refresh() first.")
        if not any(map(len, self._strata)):
            raise ValueError(f"SequenceSampler.draw(): no episode has {self.min_real} steps.")
        by_loss, others = self._replay.allot(n, np.array([self._priority_share, 1 - self._priority_share]))
        starts, weights = self._draw_by_events(others)
        starts = np.concatenate((self._draw_by_losses(by_loss), starts))
        weights = np.concatenate((np.ones(by_loss), weights))
        batch = self._replay.sequences_at(starts, self._length)
        return batch, torch.from_numpy(weights.astype(np.float32))

    def note(self, batch: SequenceBatch, losses: Tensor) -> None:
        """Store the loss of each sequence of a batch, (n,)."""
        if self._priority_share > 0:
            self._losses[batch.rows[:, 0].numpy()] = losses.cpu().numpy()

    def tensors(self) -> dict[str, Tensor]:
        """The stored losses and the first rows of their sequences, for a checkpoint."""
        rows = np.flatnonzero(~np.isnan(self._losses))
        return {"rows": torch.from_numpy(rows), "losses": torch.from_numpy(self._losses[rows])}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the stored losses by those of `tensors`."""
        self._losses[:] = np.nan
        self._losses[tensors["rows"].numpy()] = tensors["losses"].numpy()

    def _draw_by_events(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """First rows of n sequences, and their weights, (n,) each."""
        strata = self._strata or []
        sizes = np.array([len(stratum) for stratum in strata])
        uniform = sizes / sizes.sum()
        chances = self._chances(uniform)
        starts = [np.empty(0, dtype=np.int64)]
        weights = [np.empty(0)]
        for stratum, count in enumerate(self._replay.allot(n, chances)):
            if count > 0:
                starts.append(self._replay.choose(strata[stratum], count))
                weights.append(np.full(count, uniform[stratum] / chances[stratum]))
        return np.concatenate(starts), np.concatenate(weights)

    def _chances(self, uniform: np.ndarray) -> np.ndarray:
        """The probability of a draw from each stratum, given that of a uniform draw."""
        wanted = (uniform > 0) & np.array([True, True, False])
        if not wanted.any():
            return uniform
        return (1 - self._event_share) * uniform + self._event_share * wanted / wanted.sum()

    def _draw_by_losses(self, n: int) -> np.ndarray:
        """First rows of n sequences, (n,)."""
        starts = np.concatenate(self._strata or [])
        losses = self._losses[starts].astype(np.float64)
        is_new = np.isnan(losses)
        worst = 0.0 if is_new.all() else np.nanmax(losses)
        chances = np.exp(np.where(is_new, worst, losses) - worst)
        return self._replay.choose(starts, n, chances)

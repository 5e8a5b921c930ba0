"""The starts of imagination: uniform, or more often just before a reward."""

from __future__ import annotations

import numpy as np

from rem_atari.replay.batch import SequenceBatch
from rem_atari.replay.buffer import Replay


class SegmentSampler:
    """Draws segments to imagine from; a share of them ends shortly before a known reward.

    A policy may learn from any distribution of starts, so no weights correct for the choice.

    Args:
        replay: the source of segments and of random numbers.
        length: steps of a segment; shorter ones are padded on the left.
        min_real: least number of real steps in a segment.
        reward_share: share of a batch that ends before a reward, from 0 to 1; the others, and all where no
            reward is known, end anywhere.
        reward_steps: number of steps, the segment's last one included, within which the reward comes.
    """

    def __init__(
        self, replay: Replay, length: int, *, min_real: int, reward_share: float, reward_steps: int
    ) -> None:
        self.min_real = min_real
        self._replay = replay
        self._length = length
        self._reward_share = reward_share
        self._reward_steps = reward_steps
        self._before_rewards = np.empty(0, dtype=np.int64)

    def refresh(self) -> None:
        """Index the collected steps; call it before the first `draw` after each collection."""
        if self._reward_share == 0:
            return
        ends = self._replay.segment_ends(self.min_real)
        pays, _ = self._replay.events_after(ends, 0, self._reward_steps)
        self._before_rewards = ends[pays]

    def draw(self, n: int) -> SequenceBatch:
        """n segments.

        Raises:
            ValueError: no episode is long enough.
        """
        if len(self._before_rewards) == 0:
            return self._replay.sample_segments(n, self._length, min_real=self.min_real)
        chosen = self._replay.allot(n, np.array([self._reward_share, 1 - self._reward_share]))
        strata = (self._before_rewards, self._replay.segment_ends(self.min_real))
        ends = [self._replay.choose(rows, count) for rows, count in zip(strata, chosen, strict=True)]
        return self._replay.segments_at(np.concatenate(ends), self._length)

"""Where imagination begins: anywhere, or more often just before a reward."""

from __future__ import annotations

import numpy as np

from rem_atari.replay.buffer import Replay, SequenceBatch


class SegmentSampler:
    """Draws segments to imagine from, a share of them so that they end shortly before a known reward.

    Where a policy learns is free to choose, so nothing is weighted.

    Args:
        replay: whose segments they are, and whose generator draws.
        length: steps of a segment; shorter ones are padded on the left.
        min_real: steps of an episode that a segment has at least.
        reward_share: share of a batch that ends before a reward, from 0 to 1; the others, and all where no
            reward is known, end anywhere.
        reward_steps: within so many steps, that of the segment's last frame included, the reward comes.
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
        """Look at what has been collected; to be called before the first `draw` after each collection."""
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

"""Starts of imagination: a share of them shortly before known rewards."""

from __future__ import annotations

import numpy as np
import torch

from rem_atari.replay.buffer import Replay
from rem_atari.replay.segment_sampler import SegmentSampler


def game(rewards_at: tuple[int, ...]) -> Replay:
    """Two episodes of 20 steps."""
    replay = Replay((1, 1, 3), 40, seed=0)
    for step in range(40):
        frame = np.zeros((1, 1, 3), dtype=np.uint8)
        replay.append(0, frame, 0, -1.0 if step in rewards_at else 0.0, step % 20 == 19, False)
    return replay


def ends(replay: Replay, share: float, n: int = 2000) -> torch.Tensor:
    sampler = SegmentSampler(replay, 5, min_real=2, reward_share=share, reward_steps=3)
    sampler.refresh()
    batch = sampler.draw(n)
    assert batch.mask[:, -1].all()
    assert (batch.mask.sum(dim=1) >= 2).all()
    return batch.rows[:, -1]


def test_a_share_ends_within_some_steps_of_a_reward():
    """The reward of step 22 comes within three steps of frames 20 to 22; before 20 there is nothing."""
    found = ends(game((10, 22)), share=0.75)
    near = torch.isin(found, torch.tensor([8, 9, 10, 21, 22]))
    assert 0.75 * 2000 <= near.sum() < 0.85 * 2000
    assert set(found.tolist()) == set(range(1, 20)) | set(range(21, 40))


def test_all_may_end_before_rewards():
    assert set(ends(game((10, 22)), share=1.0).tolist()) == {8, 9, 10, 21, 22}


def test_where_no_reward_is_known_or_none_is_asked_for_draws_are_those_of_the_replay():
    for rewards, share in (((), 0.5), ((10,), 0.0)):
        wanted = game(rewards).sample_segments(2000, 5, min_real=2).rows[:, -1]
        assert torch.equal(ends(game(rewards), share), wanted)

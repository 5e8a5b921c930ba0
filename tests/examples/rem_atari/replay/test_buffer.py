"""Replay: what may be sampled and how often, episode edges, padding, memory.

The steps in these tests carry their own identity: the frame of row r is filled with r, so that a sample says
where it came from.
"""

from __future__ import annotations

import json
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rem_atari.replay.batch import SequenceBatch
from rem_atari.replay.buffer import Replay, ReplayFullError

SHAPE = (2, 2, 3)
MEMORY_IN_USE = Path("/proc/self/statm")
COLUMNS = ("frames", "actions", "rewards", "ended", "truncated", "mask")

Event = tuple[int, bool, bool]
"""One step of an environment: its index, terminated, truncated."""


def play(replay: Replay, events: list[Event]) -> None:
    """Append steps whose frame, action and reward all tell their row."""
    for env_index, terminated, truncated in events:
        row = replay.num_steps
        frame = np.full(replay.frame_shape, row, dtype=np.uint8)
        replay.append(env_index, frame, row, row / 2, terminated, truncated)


def replay_of(events: list[Event], *, seed: int = 0) -> Replay:
    replay = Replay(SHAPE, max(len(events), 1), seed=seed)
    play(replay, events)
    return replay


def episodes_of(events: list[Event]) -> list[list[int]]:
    """The rows of every episode, by the plain meaning of the events."""
    episodes: list[list[int]] = []
    running: dict[int, list[int]] = {}
    for row, (env_index, terminated, truncated) in enumerate(events):
        if env_index not in running:
            running[env_index] = []
            episodes.append(running[env_index])
        running[env_index].append(row)
        if terminated or truncated:
            del running[env_index]
    return episodes


def episode(env_index: int, length: int, *, end: str = "terminated") -> list[Event]:
    return [
        (env_index, end == "terminated" and last, end == "truncated" and last)
        for last in [False] * (length - 1) + [True]
    ]


def rows_of(batch: SequenceBatch) -> list[tuple[int, ...]]:
    """For each sample the rows of its real steps, in order; checks that all columns tell the same."""
    rows = batch.actions
    assert (batch.frames == rows[..., None, None, None])[batch.mask].all()
    assert torch.equal(batch.rewards, rows / 2)
    pairs = zip(rows.tolist(), batch.mask.tolist(), strict=True)
    return [tuple(row for row, real in zip(*pair, strict=True) if real) for pair in pairs]


def assert_uniform(counts: Counter[object], outcomes: int, draws: int) -> None:
    """Chi-square against the uniform distribution, five standard deviations wide."""
    assert len(counts) == outcomes
    expected = draws / outcomes
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < outcomes + 5 * (2 * outcomes) ** 0.5


THREE_EPISODES = episode(0, 7) + episode(0, 2) + episode(0, 4, end="truncated")
INTERLEAVED = [
    (index % 3, index % 7 == 6, index % 11 == 10) for index in range(60)
]  # three environments in turn, episodes of many lengths


# --- sampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [THREE_EPISODES, INTERLEAVED], ids=["one by one", "interleaved"])
@pytest.mark.parametrize(("length", "min_real"), [(1, 1), (3, 1), (3, 2), (4, 3), (5, 5), (9, 2)])
def test_sequences_are_uniform_over_their_starts(events: list[Event], length: int, min_real: int) -> None:
    replay = replay_of(events)
    wanted = {
        tuple(rows[start : start + length])
        for rows in episodes_of(events)
        for start in range(len(rows))
        if len(rows) - start >= min_real
    }
    counts = Counter(rows_of(replay.sample_sequences(4000, length, min_real=min_real)))
    assert set(counts) == wanted
    assert_uniform(counts, len(wanted), 4000)


@pytest.mark.parametrize("events", [THREE_EPISODES, INTERLEAVED], ids=["one by one", "interleaved"])
@pytest.mark.parametrize(("length", "min_real"), [(1, 1), (3, 1), (3, 2), (4, 3), (5, 5), (9, 2)])
def test_segments_are_uniform_over_their_ends(events: list[Event], length: int, min_real: int) -> None:
    replay = replay_of(events)
    wanted = {
        tuple(rows[max(end - length, 0) : end])
        for rows in episodes_of(events)
        for end in range(1, len(rows) + 1)
        if end >= min_real
    }
    counts = Counter(rows_of(replay.sample_segments(4000, length, min_real=min_real)))
    assert set(counts) == wanted
    assert_uniform(counts, len(wanted), 4000)


def test_real_steps_in_a_segment_are_distributed_as_its_ends() -> None:
    replay = replay_of(episode(0, 10))
    batch = replay.sample_segments(4000, 4, min_real=2)
    counts = Counter(batch.mask.sum(1).tolist())
    # Ends at the second step to the tenth: one end with 2 steps, one with 3, seven with 4.
    for real, share in ((2, 1 / 9), (3, 1 / 9), (4, 7 / 9)):
        assert counts[real] / 4000 == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5)


def test_frames_are_uniform_over_all_steps() -> None:
    frames = replay_of(INTERLEAVED).sample_frames(6000)
    assert frames.shape == (6000, *SHAPE)
    assert frames.dtype == torch.uint8
    assert_uniform(Counter(frames[:, 0, 0, 0].tolist()), 60, 6000)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    events=st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=30),
    length=st.integers(1, 6),
    data=st.data(),
)
def test_samples_are_whole_stretches_of_one_episode(
    events: list[Event], length: int, data: st.DataObject
) -> None:
    min_real = data.draw(st.integers(1, length))
    replay = replay_of(events)
    episodes = episodes_of(events)
    assert replay.num_episodes == len(episodes)
    assert replay.ready(min_real) == any(len(rows) >= min_real for rows in episodes)
    if not replay.ready(min_real):
        return
    episode_of = {row: rows for rows in episodes for row in rows}
    for rows in rows_of(replay.sample_sequences(20, length, min_real=min_real)):
        home = episode_of[rows[0]]
        start = home.index(rows[0])
        assert rows == tuple(home[start : start + length])
        assert len(rows) >= min_real
    for rows in rows_of(replay.sample_segments(20, length, min_real=min_real)):
        home = episode_of[rows[-1]]
        end = home.index(rows[-1]) + 1
        assert rows == tuple(home[max(end - length, 0) : end])
        assert len(rows) >= min_real


def test_rows_come_episode_by_episode() -> None:
    events = [(0, False, False), (1, False, False), (0, False, True), (1, True, False), (0, False, False)]
    replay = replay_of([*events, (1, False, False), (0, False, False)])
    rows = replay.rows_by_episode()
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5]
    assert replay.frames_at(rows[1:3])[:, 0, 0, 0].tolist() == [2, 1]


def test_padding_is_on_the_right_of_sequences_and_on_the_left_of_segments() -> None:
    # Rows from 1, so that no real step looks like padding.
    replay = replay_of(episode(1, 1) + episode(0, 3))
    sequences = replay.sample_sequences(50, 5, min_real=2)
    segments = replay.sample_segments(50, 5, min_real=2)
    assert {tuple(mask) for mask in sequences.mask.int().tolist()} == {(1, 1, 1, 0, 0), (1, 1, 0, 0, 0)}
    assert {tuple(mask) for mask in segments.mask.int().tolist()} == {(0, 0, 1, 1, 1), (0, 0, 0, 1, 1)}
    for batch in (sequences, segments):
        for name in COLUMNS:
            assert not getattr(batch, name)[~batch.mask].any(), name
        assert batch.frames[batch.mask].all()


def test_shapes_and_types() -> None:
    replay = replay_of(INTERLEAVED)
    for batch in (replay.sample_sequences(3, 4, min_real=1), replay.sample_segments(3, 4, min_real=1)):
        assert batch.frames.shape == (3, 4, *SHAPE)
        types = dict(zip(COLUMNS, (torch.uint8, torch.int64, torch.float32, *[torch.bool] * 3), strict=True))
        for name, dtype in types.items():
            assert getattr(batch, name).dtype == dtype
            assert getattr(batch, name).shape[:2] == (3, 4)


def test_terminated_and_truncated_are_kept_apart() -> None:
    replay = replay_of(episode(0, 3) + episode(0, 3, end="truncated") + [(0, False, False)] * 2)
    batch = replay.sample_sequences(200, 1, min_real=1)
    rows = batch.actions[:, 0]
    assert torch.equal(batch.ended[:, 0], rows == 2)
    assert torch.equal(batch.truncated[:, 0], rows == 5)
    assert rows.unique().numel() == 8


def test_a_step_can_be_both_terminated_and_truncated() -> None:
    batch = replay_of([(0, True, True)]).sample_sequences(1, 1, min_real=1)
    assert batch.ended.all()
    assert batch.truncated.all()


def test_open_episodes_are_sampled_and_grow() -> None:
    replay = Replay(SHAPE, 10, seed=0)
    play(replay, [(0, False, False)] * 2)
    assert not replay.ready(3)
    play(replay, [(0, False, False)])
    assert set(rows_of(replay.sample_sequences(20, 3, min_real=3))) == {(0, 1, 2)}


def test_cut_ends_open_episodes_as_truncated() -> None:
    replay = Replay(SHAPE, 10, seed=0)
    play(replay, [(0, False, False), (1, False, False), (0, True, False), (1, False, False)])
    replay.cut()
    play(replay, [(1, False, False), (0, False, False)])
    assert replay.num_episodes == 4
    assert set(rows_of(replay.sample_sequences(50, 4, min_real=1))) == {
        (0, 2),
        (2,),
        (1, 3),
        (3,),
        (4,),
        (5,),
    }
    batch = replay.sample_sequences(50, 1, min_real=1)
    assert set(batch.actions[batch.truncated].tolist()) == {3}
    assert set(batch.actions[batch.ended].tolist()) == {2}


def test_sampling_repeats_with_its_seed_and_with_its_state() -> None:
    def draw(replay: Replay) -> list[int]:
        return replay.sample_frames(20)[:, 0, 0, 0].tolist()

    one, same, other = (replay_of(INTERLEAVED, seed=seed) for seed in (3, 3, 4))
    first = draw(one)
    assert first == draw(same)
    assert first != draw(other)
    state = json.loads(json.dumps(one.sampling_state()))
    after = draw(one)
    assert after != first
    other.set_sampling_state(state)
    assert draw(other) == after


def test_samples_are_copies() -> None:
    replay = replay_of(episode(0, 2))
    replay.sample_frames(5).fill_(99)
    replay.sample_sequences(5, 2, min_real=1).frames.fill_(99)
    assert replay.sample_frames(50).max() == 1


def test_median_frame() -> None:
    replay = Replay(SHAPE, 1000, seed=0)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        frame = np.full(SHAPE, 70, dtype=np.uint8)
        frame[rng.integers(2), rng.integers(2)] = 255  # a thing that moves over all the picture
        replay.append(0, frame, 0, 0.0, False, False)
    assert replay.median_frame().dtype == torch.uint8
    assert (replay.median_frame() == 70).all()
    replay = replay_of(episode(0, 5))
    assert (replay.median_frame() == 2).all()


# --- bounds and errors ------------------------------------------------------------------------------------


def test_a_full_replay_names_its_capacity_and_keeps_what_it_has() -> None:
    replay = replay_of(episode(0, 4))
    assert replay.room == 0
    with pytest.raises(ReplayFullError, match="capacity is 4"):
        play(replay, [(0, False, False)])
    assert replay.num_steps == 4
    assert set(rows_of(replay.sample_segments(20, 4, min_real=4))) == {(0, 1, 2, 3)}


def test_nothing_to_sample_is_said() -> None:
    replay = Replay(SHAPE, 5, seed=0)
    assert not replay.ready(1)
    with pytest.raises(ValueError, match="nothing to sample"):
        replay.sample_frames(1)
    with pytest.raises(ValueError, match="empty"):
        replay.median_frame()
    play(replay, episode(0, 2))
    with pytest.raises(ValueError, match="no episode of 1 has 3 steps"):
        replay.sample_sequences(1, 5, min_real=3)


@pytest.mark.parametrize(("length", "min_real"), [(0, 0), (3, 0), (3, 4)])
def test_lengths_are_checked(length: int, min_real: int) -> None:
    replay = replay_of(episode(0, 9))
    for sample in (replay.sample_sequences, replay.sample_segments):
        with pytest.raises(ValueError, match=f"min_real is {min_real}, length is {length}"):
            sample(1, length, min_real=min_real)


def test_bad_rows_and_sizes_are_refused() -> None:
    replay = Replay(SHAPE, 5, seed=0)
    with pytest.raises(ValueError, match=r"uint8 \(3, 2, 3\)"):
        replay.append(0, np.zeros((3, 2, 3), np.uint8), 0, 0.0, False, False)
    with pytest.raises(ValueError, match="float32"):
        replay.append(0, np.zeros(SHAPE, np.float32), 0, 0.0, False, False)
    with pytest.raises(ValueError, match="env_index is -1"):
        replay.append(-1, np.zeros(SHAPE, np.uint8), 0, 0.0, False, False)
    with pytest.raises(ValueError, match="action is -2"):
        replay.append(0, np.zeros(SHAPE, np.uint8), -2, 0.0, False, False)
    assert replay.num_steps == 0
    with pytest.raises(ValueError, match="capacity is 0"):
        Replay(SHAPE, 0, seed=0)
    with pytest.raises(ValueError, match=r"frame_shape is \(4, 4\)"):
        Replay((4, 4), 5, seed=0)


@pytest.mark.skipif(not MEMORY_IN_USE.exists(), reason="no such account of memory here")
def test_capacity_costs_nothing_until_used_and_frames_stay_bytes() -> None:
    def resident_bytes() -> int:
        return int(MEMORY_IN_USE.read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    replay = Replay((64, 64, 3), 1_000_000, seed=0)  # 12 GB
    for row in range(4000):
        replay.append(0, np.full((64, 64, 3), row % 256, np.uint8), 0, 0.0, False, False)
    assert replay.ready(1)
    used = resident_bytes() - before
    assert 45e6 < used < 65e6  # 4,000 frames of 12,288 bytes are 49 MB

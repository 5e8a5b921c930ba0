"""The replay on disk: exact rebuilding, append-only shards, crashes, corruption, forgeries."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from saved_runs import SavedRun

from rem_atari.replay.buffer import Replay, ReplayFullError
from rem_atari.replay.shards import ReplayCorruptError

SHAPE = (2, 2, 3)

Event = tuple[int, bool, bool]
"""One step of an environment: its index, terminated, truncated."""

INTERLEAVED = [(index % 3, index % 7 == 6, index % 11 == 10) for index in range(60)]


def play(replay: Replay, events: list[Event]) -> None:
    """Append steps whose frame, action and reward all tell their row."""
    for env_index, terminated, truncated in events:
        row = replay.num_steps
        frame = np.full(replay.frame_shape, row, dtype=np.uint8)
        replay.append(env_index, frame, row, row / 2, terminated, truncated)


def episode(length: int) -> list[Event]:
    return [(0, last, False) for last in [False] * (length - 1) + [True]]


def assert_same(loaded: Replay, written: Replay) -> None:
    """Both hold the same: the same random numbers draw the same samples from them, hundreds of them."""
    assert loaded.num_steps == written.num_steps
    assert loaded.num_episodes == written.num_episodes
    loaded.set_sampling_state(written.sampling_state())
    for sample in ("sample_sequences", "sample_segments"):
        one, other = (getattr(replay, sample)(600, 4, min_real=1) for replay in (loaded, written))
        for name in ("frames", "actions", "rewards", "ended", "truncated", "mask"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("flushes", [{60}, {20, 40, 60}, set(range(1, 61))], ids=["once", "thrice", "each"])
def test_load_rebuilds_exactly_and_goes_on(tmp_path: Path, flushes: set[int]) -> None:
    written = Replay(SHAPE, 80, folder=tmp_path / "replay", seed=0)
    for count, event in enumerate(INTERLEAVED, start=1):
        play(written, [event])
        if count in flushes:
            written.flush()
    loaded = Replay.load(tmp_path / "replay", frame_shape=SHAPE, capacity=80, seed=0)
    assert_same(loaded, written)
    assert loaded.capacity == 80
    # Open episodes are still open: the same steps continue them in both.
    for replay in (written, loaded):
        play(replay, [(2, False, False), (0, False, False), (1, True, False), (1, False, False)])
    assert_same(loaded, written)
    loaded.flush()
    again = Replay.load(tmp_path / "replay")
    assert_same(again, written)
    assert again.capacity == 64


def test_shards_are_appended_and_never_rewritten(tmp_path: Path) -> None:
    replay = Replay(SHAPE, 20, folder=tmp_path, seed=0)
    assert replay.flush() is None
    play(replay, episode(3))
    first = replay.flush()
    assert first == tmp_path / "shard-00000000.safetensors"
    before = (first.read_bytes(), first.stat().st_mtime_ns, first.stat().st_ino)
    assert replay.flush() is None
    play(replay, episode(2))
    assert replay.flush() == tmp_path / "shard-00000001.safetensors"
    assert (first.read_bytes(), first.stat().st_mtime_ns, first.stat().st_ino) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-00000000.safetensors",
        "shard-00000001.safetensors",
    ]
    assert load_file(first)["actions"].tolist() == [0, 1, 2]
    assert load_file(first)["frames"].dtype == np.uint8


def test_a_replay_in_memory_flushes_nothing() -> None:
    replay = Replay(SHAPE, 5, seed=0)
    play(replay, episode(2))
    assert replay.flush() is None


@pytest.mark.parametrize("flush_before_cut", [False, True])
@pytest.mark.parametrize("go_on", [False, True])
def test_cuts_survive_loading(tmp_path: Path, flush_before_cut: bool, go_on: bool) -> None:
    replay = Replay(SHAPE, 20, folder=tmp_path, seed=0)
    play(replay, [(0, False, False), (1, False, False)])
    if flush_before_cut:
        replay.flush()
    replay.cut()
    if go_on:
        play(replay, [(0, False, False), (1, True, False)])
    replay.flush()
    assert replay.flush() is None  # a cut is written once
    loaded = Replay.load(tmp_path, capacity=20)
    assert_same(loaded, replay)
    batch = loaded.sample_sequences(50, 2, min_real=1)
    assert set(batch.actions[batch.truncated].tolist()) == {0, 1}
    for each in (replay, loaded):
        play(each, [(0, False, False)])
        each.cut()
    assert_same(loaded, replay)


def written_replay(folder: Path) -> list[Path]:
    """A replay of three shards."""
    replay = Replay(SHAPE, 20, folder=folder, seed=0)
    for _ in range(3):
        play(replay, episode(3))
        replay.flush()
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "shard-00000003.safetensors.tmp",
        ".shard-00000003.safetensors.writing",
        "shard-3.safetensors",
        "shard-000000003.safetensors",
        "xshard-00000003.safetensors",
        "shard-00000003.safetensors\n",
        "shard-٠٠٠٠٠٠٠٣.safetensors",
        "notes.txt",
    ],
)
def test_files_of_other_names_are_ignored_and_left_alone(tmp_path: Path, name: str) -> None:
    written_replay(tmp_path)
    (tmp_path / name).write_bytes(b"half a shard")
    loaded = Replay.load(tmp_path, capacity=20)
    assert loaded.num_steps == 9
    play(loaded, episode(1))
    loaded.flush()
    assert Replay.load(tmp_path).num_steps == 10


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_cut_off_shard_is_named(tmp_path: Path, keep: int) -> None:
    shard = written_replay(tmp_path)[2]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ReplayCorruptError, match=shard.name):
        Replay.load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = written_replay(tmp_path)[1]
    shard.unlink()
    with pytest.raises(ReplayCorruptError, match=r"shard-00000001 is missing"):
        Replay.load(tmp_path)


def test_links_and_folders_are_not_followed(tmp_path: Path) -> None:
    shard = written_replay(tmp_path / "replay")[2]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReplayCorruptError, match=rf"{shard.name} is no plain file"):
        Replay.load(tmp_path / "replay")
    shard.unlink()
    shard.mkdir()
    with pytest.raises(ReplayCorruptError, match=rf"{shard.name} is no plain file"):
        Replay.load(tmp_path / "replay")
    shard.rmdir()
    os.mkfifo(shard)
    with pytest.raises(ReplayCorruptError, match=rf"{shard.name} is no plain file"):
        Replay.load(tmp_path / "replay")


def forge(shard: Path, *, metadata: dict[str, str] | None = None, **columns: np.ndarray | None) -> None:
    """Rewrite a shard with other columns (None: without) or metadata."""
    tensors = load_file(shard) | columns
    kept = {name: column for name, column in tensors.items() if column is not None}
    good = {"format": "rem-atari-replay-1", "first_row": "6"}
    shard.unlink()
    save_file(kept, shard, metadata=good | (metadata or {}))


@pytest.mark.parametrize(
    ("forgery", "complaint"),
    [
        ({"metadata": {"format": "rem-atari-replay-2"}}, "not in the format"),
        ({"metadata": {"first_row": "five"}}, "not in the format"),
        ({"metadata": {"first_row": "5"}}, "does not continue"),
        ({"rewards": None}, "other tensors"),
        ({"frames": None}, "other tensors"),
        ({"cut_rows": None}, "other tensors"),
        ({"more": np.zeros(3)}, "other tensors"),
        ({"actions": np.zeros(4, np.int32)}, "other tensors"),
        ({"actions": np.zeros(3, np.int64)}, "other tensors"),
        ({"frames": np.zeros((3, 4, 4, 3), np.uint8)}, "does not continue"),
        ({"cut_rows": np.array([6])}, "out of range"),
        ({"cut_rows": np.array([-1])}, "out of range"),
        ({"actions": np.array([0, -1, 0], np.int32)}, "out of range"),
        ({"env_indices": np.array([0, -1, 0], np.int32)}, "out of range"),
    ],
)
def test_a_shard_of_other_content_is_named(tmp_path: Path, forgery: dict, complaint: str) -> None:
    shard = written_replay(tmp_path)[2]
    forge(shard)
    assert Replay.load(tmp_path).num_steps == 9  # the forger's hand alone does no harm
    forge(shard, **forgery)
    with pytest.raises(ReplayCorruptError, match=rf"{shard.name}.*{complaint}"):
        Replay.load(tmp_path)


def test_a_failed_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(SHAPE, 20, folder=tmp_path, seed=0)
    play(replay, [(0, False, False)])
    replay.flush()
    replay.cut()
    play(replay, episode(2))

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            replay.flush()
    assert Replay.load(tmp_path).num_steps == 1
    replay.flush()
    assert_same(Replay.load(tmp_path), replay)


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    written_replay(tmp_path)
    with pytest.raises(FileExistsError, match=r"Replay\.load"):
        Replay(SHAPE, 20, folder=tmp_path, seed=0)
    one, other = Replay.load(tmp_path, capacity=20), Replay.load(tmp_path, capacity=20)
    play(one, episode(1))
    play(other, episode(1))
    one.flush()
    with pytest.raises(FileExistsError, match=r"shard-00000003\.safetensors exists"):
        other.flush()


def test_load_checks_what_it_is_asked_for(tmp_path: Path) -> None:
    assert Replay.load(tmp_path / "new", frame_shape=SHAPE, capacity=3).num_steps == 0
    with pytest.raises(ValueError, match="no shards"):
        Replay.load(tmp_path / "new")
    written_replay(tmp_path / "replay")
    with pytest.raises(ValueError, match=r"\(2, 2, 3\); wanted \(4, 4, 3\)"):
        Replay.load(tmp_path / "replay", frame_shape=(4, 4, 3))
    with pytest.raises(ReplayFullError, match="9 rows; its capacity is 8"):
        Replay.load(tmp_path / "replay", capacity=8)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory is in use")
def test_memory_is_taken_as_rows_arrive_and_not_by_sampling_or_flushing(tmp_path: Path) -> None:
    """There is room for the paper's 100,000 frames, 1.2 gigabytes; 2,000 of them take 25 megabytes."""
    before = resident_bytes()
    replay = Replay((64, 64, 3), 100_000, folder=tmp_path, seed=0)
    frame = np.full((64, 64, 3), 7, dtype=np.uint8)
    for row in range(2_000):
        replay.append(0, frame, 0, 0.0, row % 100 == 99, False)
    replay.flush()
    filled = resident_bytes()
    assert 20e6 < filled - before < 60e6
    for _ in range(100):
        replay.sample_sequences(16, 10, min_real=1)
        replay.sample_segments(16, 10, min_real=1)
        replay.flush()
    assert resident_bytes() - filled < 20e6


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory is in use")
def test_saving_again_and_again_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run = SavedRun(tmp_path)
    for _ in range(5):
        run.save_next()
    before = resident_bytes()
    for _ in range(40):
        run.save_next()
    assert resident_bytes() - before < 10e6
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3, "the last two and the best one"

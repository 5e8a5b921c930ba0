"""Flipped bits and cut files in checkpoints and replay; clocks that run backwards; sizes on the disk."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from saved_runs import ROWS, SHAPE, SavedRun, all_checkpoints, assert_is_step, check_run, entries_of

from rem_atari import commands
from rem_atari.cli import main
from rem_atari.errors import RunWarning
from rem_atari.replay.buffer import Replay
from rem_atari.replay.recovery import recover_shards
from rem_atari.runs.checkpoint import (
    CONTENT_FILES,
    MANIFEST_FILE,
    REPLAY_FOLDER,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
)

FILES = (*CONTENT_FILES, MANIFEST_FILE)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 2 and 3."""
    folder = tmp_path_factory.mktemp("before")
    run = SavedRun(folder)
    for _ in range(4):
        run.save_next()
    return folder


def copy(before: Path, folder: Path) -> Path:
    """A copy whose links between replay and checkpoints are links among themselves, as in the original."""
    copied: dict[int, str] = {}

    def copy_file(source: str, target: str) -> None:
        inode = os.stat(source).st_ino
        if inode in copied:
            os.link(copied[inode], target)
        else:
            copied[inode] = shutil.copyfile(source, target)

    return shutil.copytree(before, folder, copy_function=copy_file)


def flip(path: Path, draw: random.Random) -> int:
    """Flip one bit of a file: which one."""
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return bit


def cut(path: Path, draw: random.Random) -> int:
    """Cut a file off: how many bytes stay."""
    data = path.read_bytes()
    kept = draw.randrange(len(data))
    path.write_bytes(data[:kept])
    return kept


def damage_and_load(checkpoints: Path, times: int, damage: Callable[[Path, random.Random], int]) -> None:
    """Damage the newest checkpoint's files in turn, and mend them; every time the one before must be used."""
    draw = random.Random(times)
    newest = list_checkpoints(checkpoints)[-1][1]
    for number in range(times):
        file = newest / FILES[number % len(FILES)]
        whole = file.read_bytes()
        where = damage(file, draw)
        try:
            with pytest.warns(RunWarning, match="step-00000003 is damaged"):
                assert_is_step(load_checkpoint(checkpoints), 2)
        except BaseException as error:
            error.add_note(f"{file.name}, {damage.__name__} {where}")
            raise
        file.write_bytes(whole)
    assert_is_step(load_checkpoint(checkpoints), 3)


@pytest.mark.parametrize(
    ("times", "damage"),
    [
        *((100, flip), (50, cut)),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((1000, flip), (200, cut))),
    ],
)
def test_damage_to_a_checkpoint_is_found_and_the_one_before_is_used(
    tmp_path: Path, before: Path, times: int, damage: Callable[[Path, random.Random], int]
) -> None:
    damage_and_load(copy(before, tmp_path / "run") / "checkpoints", times, damage)


@pytest.mark.slow
def test_every_bit_of_a_manifest_counts(tmp_path: Path, before: Path) -> None:
    """It has no digest of its own: a flip in it must not match anything else that is there."""
    path = copy(before, tmp_path / "run") / "checkpoints" / "step-00000003"
    whole = (path / MANIFEST_FILE).read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (path / MANIFEST_FILE).write_bytes(data)
        with pytest.raises(CheckpointError):
            read_checkpoint(path, 3)


def recover(run: Path) -> tuple[Replay, list[str]]:
    checkpoint = load_checkpoint(run / "checkpoints")
    copies = run / "checkpoints" / f"step-{checkpoint.step:08d}" / REPLAY_FOLDER
    entries, notes = recover_shards(run / "replay", entries_of(checkpoint), frame_shape=SHAPE, copies=copies)
    return Replay.load(run / "replay", frame_shape=SHAPE, capacity=1_000, entries=entries), notes


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_damaged_shard_is_set_aside_and_its_loss_told(
    tmp_path: Path, before: Path, number: int, damage: Callable[[Path, random.Random], int]
) -> None:
    run = copy(before, tmp_path / "run")
    shard = run / "replay" / f"shard-{number:08d}.safetensors"
    damage(shard, random.Random(number))
    damaged = shard.read_bytes()
    replay, notes = recover(run)
    assert notes == [
        f"{shard} is damaged and was set aside as {shard.name}.damaged; {ROWS} steps of experience are lost"
    ]
    assert (run / "replay" / f"{shard.name}.damaged").read_bytes() == damaged
    assert replay.num_steps == 4 * ROWS, "rows keep their numbers"
    drawn = set(replay.sample_sequences(500, 1, min_real=1).actions.ravel().tolist())
    assert drawn == set(range(4 * ROWS)) - set(range(number * ROWS, (number + 1) * ROWS))
    replay.append(0, np.zeros(SHAPE, np.uint8), 0, 0.0, True, False)
    replay.flush()
    assert Replay.load(run / "replay").num_steps == 4 * ROWS + 1
    # The checkpoint still means the shard that is lost: to go on from it once more comes to the same.
    assert recover(run)[0].num_steps == 4 * ROWS


def test_a_deleted_or_replaced_shard_comes_back_from_the_checkpoint(tmp_path: Path, before: Path) -> None:
    run = copy(before, tmp_path / "run")
    (run / "replay" / "shard-00000001.safetensors").unlink()
    replaced = run / "replay" / "shard-00000002.safetensors"
    replaced.unlink()
    replaced.write_bytes(b"something else")
    replay, notes = recover(run)
    assert len(notes) == 2
    assert all("the checkpoint's copy of it has taken its place" in note for note in notes)
    assert replaced.with_name(f"{replaced.name}.damaged").read_bytes() == b"something else"
    assert replay.num_steps == 4 * ROWS
    assert check_run(run) == 3


def test_stray_files_are_kept_out_of_the_way(tmp_path: Path, before: Path) -> None:
    run = copy(before, tmp_path / "run")
    replay = run / "replay"
    later = (
        replay / "shard-00000004.safetensors"
    )  # what was written after the checkpoint, and is played again
    Replay.load(replay).flush()
    grown = Replay.load(replay, capacity=1_000)
    grown.append(0, np.zeros(SHAPE, np.uint8), 0, 0.0, False, False)
    grown.flush()
    assert later.is_file()
    strays = {
        "notes.txt": "notes.txt",
        "shard-00000000.safetensors.bak": "shard-00000000.safetensors.bak",
        "shard-00000005.safetensors": "shard-00000005.safetensors.damaged",
        "shard-99999999.safetensors": "shard-99999999.safetensors.damaged",
    }
    for name in strays:
        (replay / name).write_text(f"I am {name}")
    (replay / "shard-00000007.safetensors").mkdir()
    loaded, notes = recover(run)
    assert loaded.num_steps == 4 * ROWS
    assert not later.exists()
    assert [note.partition(" is no shard")[0] for note in notes] == [
        str(replay / f"shard-{number}.safetensors") for number in ("00000005", "00000007", "99999999")
    ]
    for name, kept in strays.items():
        assert (replay / kept).read_text() == f"I am {name}"
    assert (replay / "shard-00000007.safetensors.damaged").is_dir()


DAY = 86_400.0


@pytest.mark.parametrize("shift", [-DAY, DAY])
def test_the_newest_checkpoint_is_the_one_of_the_highest_step_whatever_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """The clock is set by a day between two saves, and the files' own times say the opposite of the steps."""
    run = SavedRun(tmp_path)
    run.save_next()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    for _ in range(3):
        run.save_next()
    for step, path in all_checkpoints(tmp_path / "checkpoints"):
        for each in (path, *path.iterdir()):
            os.utime(each, (real() - shift * step, real() - shift * step))
    assert load_checkpoint(tmp_path / "checkpoints").step == 3
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [2, 3]
    run.save_next()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [3, 4]
    assert check_run(tmp_path) == 4


def disk_usage(folder: Path) -> int:
    """Bytes of a folder's files, each counted once however many names it has."""
    files = {path.stat().st_ino: path.stat() for path in folder.rglob("*") if path.is_file()}
    return sum(status.st_size for status in files.values())


def test_checkpoints_share_the_shards_and_a_shard_lives_as_long_as_one_needs_it(tmp_path: Path) -> None:
    run = SavedRun(tmp_path, keep=4)
    for _ in range(8):
        run.save_next()
    shards = sorted((tmp_path / "replay").iterdir())
    # In the replay, in the checkpoints 4 to 7 that know it, and in the best one, 6.
    known_by = [sum(number <= step for step in (4, 5, 6, 7, 6)) for number in range(8)]
    assert [shard.stat().st_nlink for shard in shards] == [1 + count for count in known_by]
    experience = sum(shard.stat().st_size for shard in shards)
    own = sum(
        (tmp_path / "checkpoints" / f"step-{step:08d}" / name).stat().st_size
        for step in (4, 5, 6, 7)
        for name in FILES
    )
    assert disk_usage(tmp_path) == experience + own, "the best one takes no room: it is checkpoint 6"
    listed = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert listed > disk_usage(tmp_path) + experience, "or else nothing would be shared"


def test_without_hard_links_the_best_checkpoint_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run = SavedRun(tmp_path)
    for _ in range(4):
        run.save_next()
    assert check_run(tmp_path) == 3
    assert list((tmp_path / "checkpoints" / "step-00000003" / REPLAY_FOLDER).iterdir()) == []


def test_a_damaged_checkpoint_is_told_on_stderr_in_a_line(
    tmp_path: Path, before: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever command loads it; here it does nothing else."""
    run = copy(before, tmp_path / "run")
    flip(run / "checkpoints" / "step-00000003" / "model.safetensors", random.Random(0))
    monkeypatch.setattr(commands, "run_command", lambda words: load_checkpoint(run / "checkpoints"))
    for _ in range(2):  # told each time, though it is the same place in the code
        assert main(["list"]) == 0
        assert capsys.readouterr().err == (
            f"rem-atari: warning: checkpoint passed over: {run}/checkpoints/step-00000003 is damaged:"
            " model.safetensors does not have the sha256 its manifest says\n"
        )

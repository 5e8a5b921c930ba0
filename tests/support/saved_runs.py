"""A run's files as the trainer writes them, small: a replay that grows and checkpoints that link to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from rem_atari.replay.buffer import Replay
from rem_atari.replay.recovery import recover_shards
from rem_atari.replay.shards import ShardEntry
from rem_atari.runs.checkpoint import (
    REPLAY_FOLDER,
    Checkpoint,
    find_best,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

SHAPE = (8, 8, 3)
ROWS = 5
"""Rows in a shard; step s has shards 0 to s."""

CAPACITY = 100_000


def make_checkpoint(step: int, shards: tuple[ShardEntry, ...] = (), size: int = 5_000) -> Checkpoint:
    """A checkpoint whose every number follows from its step."""
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        model={"layer.weight": torch.randn(size, generator=generator)},
        optimizer={"part.0.step": torch.tensor(float(step))},
        state={"epoch": step, "shards": [asdict(entry) for entry in shards]},
        training={"frames": torch.randint(256, (size,), generator=generator, dtype=torch.uint8)},
    )


def assert_is_step(checkpoint: Checkpoint, step: int) -> None:
    wanted = make_checkpoint(step)
    assert checkpoint.step == checkpoint.state["epoch"] == step
    for ours, theirs in (
        (checkpoint.model, wanted.model),
        (checkpoint.optimizer, wanted.optimizer),
        (checkpoint.training, wanted.training),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def entries_of(checkpoint: Checkpoint) -> list[ShardEntry]:
    return [ShardEntry(**entry) for entry in checkpoint.state["shards"]]


class SavedRun:
    """The `checkpoints` and `replay` of a run's folder, gone on with where they stand."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.checkpoints, self.shards, self.keep = folder / "checkpoints", folder / "replay", keep
        self.step = -1
        self.entries: list[ShardEntry] = []
        self.notes: list[str] = []
        if list_checkpoints(self.checkpoints):
            checkpoint = load_checkpoint(self.checkpoints)
            self.step = checkpoint.step
            copies = self.checkpoints / f"step-{self.step:08d}" / REPLAY_FOLDER
            self.entries, self.notes = recover_shards(
                self.shards, entries_of(checkpoint), frame_shape=SHAPE, copies=copies
            )
        self.replay = Replay.load(self.shards, frame_shape=SHAPE, capacity=CAPACITY, entries=self.entries)

    def save_next(self) -> int:
        """Play, flush and save once more, every third step as the best one."""
        step = self.step + 1
        for row in range(step * ROWS, (step + 1) * ROWS):
            self.replay.append(0, np.full(SHAPE, row % 256, np.uint8), row, row / 2, row % 3 == 2, False)
        self.replay.flush()
        checkpoint = make_checkpoint(step, self.replay.shards)
        paths = [self.shards / entry.name for entry in self.replay.shards]
        save_checkpoint(self.checkpoints, checkpoint, keep=self.keep, shards=paths, best=step % 3 == 0)
        self.step = step
        return step


def check_run(folder: Path) -> int:
    """Check that every checkpoint of a run is whole and its replay complete; the newest one's step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = SavedRun(folder)
    assert run.notes == []
    assert run.replay.num_steps == (run.step + 1) * ROWS
    for step, path in all_checkpoints(run.checkpoints):
        assert_is_step(read_checkpoint(path, step), step)
    return run.step


def all_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """The last ones and the best one."""
    yield from list_checkpoints(folder)
    best = find_best(folder)
    if best is not None:
        yield best


def leftovers(folder: Path) -> list[str]:
    """What a crash left half written or half deleted."""
    return [
        path.name for path in folder.rglob(".*") if path.name.startswith((".writing", ".deleting", ".shard"))
    ]

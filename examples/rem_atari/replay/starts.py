"""Starts of dreams: real frames, each with the real steps before it."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from rem_atari.checks import rows_of
from rem_atari.errors import RunError, UsageError
from rem_atari.replay.buffer import Replay
from rem_atari.replay.shards import has_shards

MOST_BYTES = 2**30
"""Size limit of a file of starts, unpacked: a few kilobytes of zip can hold any number of zeros."""


@dataclass(frozen=True, eq=False)
class Starts:
    """N moments of real games at which a dream can begin.

    Attributes:
        frames: uint8 (N, T, S, S, 3); a dream begins at the last of the T frames.
        actions: the actions taken at the frames, int64 (N, T).
        mask: bool (N, T), False where a frame is padding; that stands on the left, and the last is real.
    """

    frames: np.ndarray
    actions: np.ndarray
    mask: np.ndarray

    @classmethod
    def at(cls, frames: np.ndarray) -> Starts:
        """Starts at frames uint8 (N, S, S, 3) without known steps before them."""
        count = len(frames)
        return cls(frames[:, None], np.zeros((count, 1), dtype=np.int64), np.ones((count, 1), dtype=bool))

    def __len__(self) -> int:
        return len(self.frames)

    def select(self, indices: ArrayLike) -> Starts:
        """Some of the N starts, in the order given."""
        rows = rows_of("Starts.select()", indices)
        return Starts(*(getattr(self, column.name)[rows] for column in fields(self)))

    def after(self, actions: ArrayLike, frames: np.ndarray, length: int) -> Starts:
        """The moments one step on.

        Args:
            actions: the actions taken at the last frames, (N,).
            frames: the next frames, uint8 (N, S, S, 3).
            length: T of the result, at most.
        """
        done = np.concatenate([self.actions[:, :-1], np.reshape(actions, (-1, 1))], axis=1)
        grown = (
            np.concatenate([self.frames, frames[:, None]], axis=1),
            np.pad(done, ((0, 0), (0, 1))),
            np.pad(self.mask, ((0, 0), (0, 1)), constant_values=True),
        )
        return Starts(*(column[:, -length:] for column in grown))


def draw_starts(replay: Path, count: int, length: int, *, seed: int = 0) -> Starts:
    """Draw starts from a replay, each moment of it at most once.

    Args:
        replay: the folder of its shards.
        count: number of starts; fewer if the replay holds fewer moments.
        length: T, the frames of a start.
        seed: seed of the choice.

    Raises:
        UsageError: there is no replay.
        ReplayCorruptError: a shard cannot be read.
    """
    if not has_shards(replay):
        raise UsageError(f"{replay} holds no replay, so there are no real frames to begin a dream at")
    stored = Replay.load(replay)
    moments = stored.segment_ends(1)
    chosen = np.random.default_rng(seed).permutation(moments)[:count]
    segments = stored.segments_at(chosen, length)
    return Starts(segments.frames.numpy(), segments.actions.numpy(), segments.mask.numpy())


def starts_to_bytes(starts: Starts) -> bytes:
    """Starts as a compressed .npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{column.name: getattr(starts, column.name) for column in fields(starts)})
    return buffer.getvalue()


def starts_from_bytes(data: bytes, frame_size: int) -> Starts:
    """The starts that `starts_to_bytes` wrote.

    Raises:
        RunError: the data are no starts, or of another frame size.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if sum(entry.file_size for entry in file.infolist()) > MOST_BYTES:
                raise ValueError(f"they take more than {MOST_BYTES} bytes")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            starts = Starts(*(file[column.name] for column in fields(Starts)))
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise RunError(f"the starts cannot be read: {error}") from error
    count, length = starts.mask.shape if starts.mask.ndim == 2 else (0, 0)
    found = [(column.dtype.name, column.shape) for column in (starts.frames, starts.actions, starts.mask)]
    wanted = [
        ("uint8", (count, length, frame_size, frame_size, 3)),
        ("int64", (count, length)),
        ("bool", (count, length)),
    ]
    if found != wanted or 0 in (count, length):
        raise RunError(f"the starts are {found}; wanted frames, actions and mask as {wanted}")
    return starts

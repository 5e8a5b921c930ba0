"""The replay on disk: append-only shards, each a safetensors file, written once and never again.

``shard-00000000.safetensors`` holds the first rows, ``shard-00000001.safetensors`` those that came next, and
so on. A shard holds the columns of `Rows` and `cut_rows`: rows of *earlier* shards whose episodes were given
up after those were written, and which are truncated from here on. A shard is complete or absent: it is
written under another name, synced and renamed. Files of other names are ignored.

A lost shard (see :mod:`rem_atari.replay.recovery`) is replaced by one without rows. Its header gives the
number of lost rows, so that the rows after it keep their numbers.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rem_atari.errors import RunError
from rem_atari.runs.durable import replace_file

FORMAT = "rem-atari-replay-1"
_SHARD_NAME = re.compile(r"shard-([0-9]{8})\.safetensors")


class ReplayCorruptError(RunError):
    """A file of a replay is missing or cannot be read; the message names it."""


@dataclass(frozen=True)
class Rows:
    """N steps of experience in order of arrival.

    Attributes:
        frames: the frames that were acted on, (N, S, S, 3) uint8.
        env_indices: the environment of each, (N,) int32.
        actions: the actions taken, (N,) int32.
        rewards: the raw rewards that followed, (N,) float32.
        terminated: the episode ended by itself with this step, (N,) bool.
        truncated: the episode was cut short after this step, (N,) bool.
    """

    frames: np.ndarray
    env_indices: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray

    @classmethod
    def allocate(cls, capacity: int, frame_shape: tuple[int, ...]) -> Rows:
        """Space for `capacity` rows; the system provides a row's memory when it is written."""
        return cls(
            frames=np.zeros((capacity, *frame_shape), dtype=np.uint8),
            env_indices=np.zeros(capacity, dtype=np.int32),
            actions=np.zeros(capacity, dtype=np.int32),
            rewards=np.zeros(capacity, dtype=np.float32),
            terminated=np.zeros(capacity, dtype=bool),
            truncated=np.zeros(capacity, dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.actions)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns by name."""
        return {column.name: getattr(self, column.name) for column in fields(self)}

    def view(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, sharing memory with these."""
        return Rows(**{name: column[start:stop] for name, column in self.columns().items()})

    def copy_from(self, other: Rows) -> None:
        """Overwrite these rows with as many others."""
        for name, column in self.columns().items():
            column[:] = getattr(other, name)


@dataclass(frozen=True)
class ShardEntry:
    """A checkpoint's entry for a shard, which identifies it.

    Attributes:
        name: the file's name.
        num_bytes: its size.
        sha256: its digest, hexadecimal.
        num_rows: rows in it.
    """

    name: str
    num_bytes: int
    sha256: str
    num_rows: int


@dataclass(frozen=True)
class ShardFile:
    """A shard's path and size, from its name and header; `lost_rows` are those of a lost shard."""

    path: Path
    first_row: int
    num_rows: int
    lost_rows: int
    frame_shape: tuple[int, ...]


def has_shards(folder: Path) -> bool:
    """Whether anything in `folder` has a shard's name; False if there is no such folder."""
    return bool(named_shards(folder))


def delete_shards(folder: Path) -> None:
    """Delete the shards in `folder`, before experience is collected again from the start."""
    for path in named_shards(folder).values():
        path.unlink()


def shard_name(number: int) -> str:
    """The file name of shard `number`, counted from 0."""
    return f"shard-{number:08d}.safetensors"


def write_shard(folder: Path, number: int, first_row: int, rows: Rows, cut_rows: list[int]) -> ShardEntry:
    """Write shard `number` of the replay in `folder`, which is created if need be.

    Args:
        folder: the replay's folder.
        number: the number of shards before this one.
        first_row: the number of rows before this shard's.
        rows: its rows, possibly none.
        cut_rows: rows below `first_row` that are truncated from here on.

    Raises:
        FileExistsError: there is such a shard already.
        OSError: it could not be written; there is no such shard then.
    """
    tensors = {name: np.ascontiguousarray(column) for name, column in rows.columns().items()}
    tensors["cut_rows"] = np.array(cut_rows, dtype=np.int64)
    return _write_new(folder, number, tensors, {"first_row": str(first_row)}, num_rows=len(rows))


def write_lost_shard(
    folder: Path, number: int, first_row: int, lost_rows: int, frame_shape: tuple[int, ...]
) -> ShardEntry:
    """Write a placeholder for shard `number`, whose `lost_rows` rows are lost; otherwise as `write_shard`."""
    tensors = Rows.allocate(0, frame_shape).columns() | {"cut_rows": np.zeros(0, dtype=np.int64)}
    header = {"first_row": str(first_row), "lost_rows": str(lost_rows)}
    return _write_new(folder, number, tensors, header, num_rows=lost_rows)


def _write_new(
    folder: Path, number: int, tensors: dict[str, np.ndarray], header: dict[str, str], *, num_rows: int
) -> ShardEntry:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / shard_name(number)
    if os.path.lexists(path):
        raise FileExistsError(f"The replay shard {path} exists already; shards are never rewritten.")
    data = save(tensors, metadata={"format": FORMAT, **header})
    replace_file(path, data)
    return ShardEntry(path.name, len(data), hashlib.sha256(data).hexdigest(), num_rows)


def find_shards(folder: Path) -> list[ShardFile]:
    """The shards in `folder` in order, their headers checked, no row read yet.

    Raises:
        ReplayCorruptError: a shard is missing, a link, unreadable, or does not continue the one before it.
    """
    shards: list[ShardFile] = []
    first_row = 0
    for number, path in sorted(named_shards(folder).items()):
        if number != len(shards):
            raise ReplayCorruptError(f"The replay shard shard-{len(shards):08d} is missing in {folder}.")
        shard = _read_header(path)
        if shard.first_row != first_row or shard.frame_shape != (shards or [shard])[0].frame_shape:
            raise ReplayCorruptError(f"The replay shard {path} does not continue the shards before it.")
        shards.append(shard)
        first_row += shard.num_rows + shard.lost_rows
    return shards


def read_shard(shard: ShardFile) -> tuple[Rows, np.ndarray]:
    """A shard's rows, and the earlier rows that it declares truncated, (C,) int64.

    Raises:
        ReplayCorruptError: the file cannot be read.
    """
    names = [column.name for column in fields(Rows)]
    try:
        with safe_open(shard.path, framework="numpy") as file:
            rows = Rows(**{name: file.get_tensor(name) for name in names})
            cut_rows = file.get_tensor("cut_rows")
    except (SafetensorError, OSError) as error:
        raise ReplayCorruptError(f"The replay shard {shard.path} cannot be read: {error}") from error
    indices = (rows.env_indices, rows.actions, cut_rows)
    if any((index < 0).any() for index in indices) or (cut_rows >= shard.first_row).any():
        raise ReplayCorruptError(f"The replay shard {shard.path} holds indices that are out of range.")
    return rows, cut_rows


def named_shards(folder: Path) -> dict[int, Path]:
    """Everything in `folder` with a shard's name, by number."""
    if not folder.is_dir():
        return {}
    matches = ((path, _SHARD_NAME.fullmatch(path.name)) for path in folder.iterdir())
    return {int(match[1]): path for path, match in matches if match}


def is_shard(path: Path) -> bool:
    """Whether a file is a shard by its header; its name and its rows are not looked at."""
    try:
        _read_header(path)
    except ReplayCorruptError:
        return False
    return True


def _read_header(path: Path) -> ShardFile:
    """A shard's header, checked against the format before anything else is read."""
    if path.is_symlink() or not path.is_file():
        raise ReplayCorruptError(f"The replay shard {path} is no plain file.")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ReplayCorruptError(f"The replay shard {path} cannot be read: {error}") from error
    first_row, lost_rows = metadata.get("first_row", ""), metadata.get("lost_rows", "0")
    numbers_are_numbers = re.fullmatch(r"[0-9]{1,18}", first_row) and re.fullmatch(r"[0-9]{1,7}", lost_rows)
    if metadata.get("format") != FORMAT or not numbers_are_numbers:
        raise ReplayCorruptError(f"The replay shard {path} is not in the format {FORMAT}.")
    _, (num_rows, *frame_shape) = found.get("frames", ("", (0,)))
    _, num_cuts = found.get("cut_rows", ("", (0,)))
    if found != _expected(num_rows, tuple(frame_shape), num_cuts):
        raise ReplayCorruptError(f"The replay shard {path} holds other tensors than it should: {found}.")
    return ShardFile(path, int(first_row), num_rows, int(lost_rows), tuple(frame_shape))


def _expected(
    num_rows: int, frame_shape: tuple[int, ...], num_cuts: tuple[int, ...]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of a shard's tensors, in safetensors' names."""
    one_each = (num_rows,)
    return {
        "frames": ("U8", (num_rows, *frame_shape)),
        "env_indices": ("I32", one_each),
        "actions": ("I32", one_each),
        "rewards": ("F32", one_each),
        "terminated": ("BOOL", one_each),
        "truncated": ("BOOL", one_each),
        "cut_rows": ("I64", num_cuts),
    }

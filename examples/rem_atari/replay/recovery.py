"""Restores a replay's shards to their state at a checkpoint, as far as the files exist."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rem_atari.replay.shards import ShardEntry, is_shard, named_shards, shard_name, write_lost_shard
from rem_atari.runs.durable import replace_file, sync_folder

SET_ASIDE = ".damaged"
"""Ending of the name of a damaged shard that was set aside."""


def recover_shards(
    folder: Path, entries: Sequence[ShardEntry], *, frame_shape: tuple[int, ...], copies: Path | None
) -> tuple[list[ShardEntry], list[str]]:
    """Make `folder` hold exactly the shards of a checkpoint.

    Shards written after the checkpoint are deleted: the resumed run plays their steps again. A
    shard that is missing or altered is replaced by the checkpoint's own copy (a hard link, so that it helps
    where a file was deleted or replaced, not where its content was changed). Without a whole copy it is lost:
    what is left of it is set aside, and an empty shard takes its place.

    Args:
        folder: the replay's folder; it need not be there.
        entries: the checkpoint's entries for its shards.
        frame_shape: shape of a frame, for a shard that is lost.
        copies: the checkpoint's folder of hard links; None: it has none.

    Returns:
        The new entries, and a sentence about each repair.

    Raises:
        ValueError: the entries are invalid.
        OSError: the folder cannot be read or written.
    """
    _check_entries(entries)
    found: list[ShardEntry] = []
    notes: list[str] = []
    first_row = 0
    for number, path in sorted(named_shards(folder).items()):
        if number >= len(entries):
            notes.extend(_clear_away(path))
    for number, entry in enumerate(entries):
        path = folder / entry.name
        if _is_whole(path, entry):
            found.append(entry)
        elif copies is not None and _is_whole(copies / entry.name, entry):
            _move_aside(path)
            replace_file(path, (copies / entry.name).read_bytes())
            found.append(entry)
            notes.append(f"{path} was missing or damaged; the checkpoint's copy of it has taken its place")
        else:
            kept = _move_aside(path)
            found.append(write_lost_shard(folder, number, first_row, entry.num_rows, frame_shape))
            fate = f"damaged and was set aside as {kept.name}" if kept else "missing"
            notes.append(f"{path} is {fate}; {entry.num_rows} steps of experience are lost")
        first_row += entry.num_rows
    if folder.is_dir():
        sync_folder(folder)
    return found, notes


def _check_entries(entries: Sequence[ShardEntry]) -> None:
    """Raise unless names and sizes are valid, because they become paths and amounts of memory."""
    for number, entry in enumerate(entries):
        if entry.name != shard_name(number):
            raise ValueError(f"shard {number} of the replay is called {entry.name!r}")
        if not 0 <= entry.num_rows < 10**7 or not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise ValueError(f"the entry of the replay's shard {number} makes no sense: {entry}")


def _is_whole(path: Path, entry: ShardEntry) -> bool:
    if path.is_symlink() or not path.is_file() or os.stat(path).st_size != entry.num_bytes:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256


def _move_aside(path: Path) -> Path | None:
    """Rename `path` to a name that no shard has; None if there is nothing."""
    if not os.path.lexists(path):
        return None
    names = (f"{path.name}{SET_ASIDE}{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(path.with_name(name)))
    return path.rename(path.with_name(free))


def _clear_away(path: Path) -> list[str]:
    """Delete a shard; anything else with its name was not written by the replay and is only renamed."""
    if is_shard(path):
        path.unlink()
        return []
    kept = _move_aside(path)
    return [] if kept is None else [f"{path} is no shard of the replay and was set aside as {kept.name}"]

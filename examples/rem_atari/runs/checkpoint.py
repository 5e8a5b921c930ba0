"""Checkpoints: safetensors and JSON in a folder that is whole or absent, checked by sha256 when read.

A checkpoint is written into a folder with a temporary name, synced to the disk, and renamed to
``step-00000042``: a crash at any moment leaves the earlier ones intact. Nothing in it is ever executed (no
pickle), and a flipped bit or a cut file is found by the digests in its manifest.

The subfolder ``replay`` holds hard links to the replay's shards, so a shard lives as long as a checkpoint
needs it and takes its space once. The best checkpoint, if it is kept, is a folder of hard links too:
``best-00000042``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rem_atari.errors import RunError, RunWarning
from rem_atari.runs.durable import sync_folder, write_durably

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINING_FILE = "training.safetensors"
STATE_FILE = "state.json"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
CONTENT_FILES = (MODEL_FILE, OPTIMIZER_FILE, TRAINING_FILE, STATE_FILE)
REPLAY_FOLDER = "replay"

MOST_BYTES = {MANIFEST_FILE: 100_000, CONFIG_FILE: 1_000_000, STATE_FILE: 100_000_000}
"""Larger files are not read, because JSON takes many times its size in memory."""

MOST_TENSOR_BYTES = 2**36
"""The same for the files of tensors."""

_NAME = re.compile(r"step-([0-9]{8,18})")
_BEST_NAME = re.compile(r"best-([0-9]{8,18})")
_TEMPORARY = ".writing-"
_DELETING = ".deleting-"
_DAMAGED = "damaged-"

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)
"""Errors of a file system without hard links, or without one for this file."""


class CheckpointError(RunError):
    """No usable checkpoint exists."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        step: its number, which grows with everything a run does, so it identifies one state of the run.
        model: the weights of the whole agent by name.
        optimizer: the tensors of the optimisers by name, see :mod:`rem_atari.training.component`.
        state: everything else, plain JSON data.
        training: all other tensors, by name, see :mod:`rem_atari.training.run_state`.
        config: a copy of the run's config.json in case it is lost, or None.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    training: Mapping[str, Tensor] = field(default_factory=dict)
    config: bytes | None = None


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, keep: int, shards: Sequence[Path] = (), best: bool = False
) -> Path:
    """Write a checkpoint and delete the oldest ones beyond `keep`.

    A step that was saved already is not written again: it is the same state.

    Args:
        folder: the run's ``checkpoints`` folder; made if it's not there.
        checkpoint: what to save; tensors may lie on any device.
        keep: number of checkpoints kept, this one included; at least 1.
        shards: files of the replay that belong to it; hard-linked if the file system allows.
        best: whether it is the best so far; the best is kept beside the last ones and replaces an earlier
            best.
    Returns:
        The checkpoint's folder.
    Raises:
        ValueError: `keep` is below 1.
        OSError: it cannot be written; the earlier checkpoints stay as they are.
    """
    if keep < 1:
        raise ValueError(f"save_checkpoint(): keep is {keep}, wanted at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(folder)
    final = folder / f"step-{checkpoint.step:08d}"
    if not final.exists():
        temporary = folder / f"{_TEMPORARY}{final.name}"
        with _deleted_on_error(temporary):
            temporary.mkdir()
            _write_content(temporary, checkpoint)
            _link_shards(temporary / REPLAY_FOLDER, shards)
            _publish(temporary, final)
    if best:
        _keep_as_best(folder, final, checkpoint.step)
    for _, path in list_checkpoints(folder)[:-keep]:
        _delete(path)
    return final


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, oldest step first; other names are ignored."""
    return _list_named(folder, _NAME)


def find_best(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the best checkpoint, or None if none was kept."""
    return max(_list_named(folder, _BEST_NAME), default=None)


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, so that a run that resumes from `step` can save its own.

    Only damaged ones are newer than the one that a run resumes from.

    Returns:
        Their new names.
    """
    moved = []
    for newer, path in list_checkpoints(folder):
        if newer > step:
            target = folder / f"{_DAMAGED}{path.name}"
            if target.exists():
                shutil.rmtree(target)
            moved.append(path.rename(target))
    return moved


def load_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint, by step, whose files are whole; a warning names each damaged one skipped.

    Args:
        folder: the run's ``checkpoints`` folder.
    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint")
    reasons = []
    for step, path in reversed(found):
        try:
            return read_checkpoint(path, step)
        except CheckpointError as error:
            reasons.append(str(error))
            warnings.warn(f"checkpoint passed over: {error}", RunWarning, stacklevel=2)
    raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole; {reasons[0]}")


def read_checkpoint(path: Path, step: int) -> Checkpoint:
    """One checkpoint, every file of it checked before anything in it is parsed.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    try:
        check_size(path / MANIFEST_FILE)
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())["files"]
        content = {name: read_checked(path / name, manifest[name]) for name in CONTENT_FILES}
        has_copy = CONFIG_FILE in manifest  # not in those of earlier versions
        copy = read_checked(path / CONFIG_FILE, manifest[CONFIG_FILE]) if has_copy else None
        state = json.loads(content[STATE_FILE])
        if not isinstance(state, dict):
            raise ValueError(f"{STATE_FILE} holds no object")
        return Checkpoint(
            step=step,
            model=safetensors.torch.load(content[MODEL_FILE]),
            optimizer=safetensors.torch.load(content[OPTIMIZER_FILE]),
            state=state,
            training=safetensors.torch.load(content[TRAINING_FILE]),
            config=copy,
        )
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: {MANIFEST_FILE} has no entry {error}") from error
    except (OSError, ValueError, TypeError, MemoryError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_config_copy(folder: Path) -> tuple[int, bytes] | None:
    """Step and config.json of the newest checkpoint with a whole copy of it, or None."""
    for step, path in reversed(list_checkpoints(folder)):
        try:
            check_size(path / MANIFEST_FILE)
            entry = json.loads((path / MANIFEST_FILE).read_bytes())["files"][CONFIG_FILE]
            return step, read_checked(path / CONFIG_FILE, entry)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a number that is not finite, or None."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _list_named(folder: Path, name: re.Pattern[str]) -> list[tuple[int, Path]]:
    """Step and folder of everything in `folder` with such a name, oldest step first."""
    if not folder.is_dir():
        return []
    matches = [(name.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match and _is_folder(path))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _write_content(folder: Path, checkpoint: Checkpoint) -> None:
    content = {
        MODEL_FILE: safetensors.torch.save(portable(checkpoint.model)),
        OPTIMIZER_FILE: safetensors.torch.save(portable(checkpoint.optimizer)),
        TRAINING_FILE: safetensors.torch.save(portable(checkpoint.training)),
        STATE_FILE: json.dumps(checkpoint.state, indent=2).encode(),
        **({} if checkpoint.config is None else {CONFIG_FILE: checkpoint.config}),
    }
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content.items()
    }
    for name, data in content.items():
        write_durably(folder / name, data)
    write_durably(folder / MANIFEST_FILE, json.dumps({"files": manifest}, indent=2).encode())


def _link_shards(folder: Path, shards: Sequence[Path]) -> None:
    """Hard-link the shards into `folder`, if the file system has hard links.

    Without links a checkpoint still knows its shards, by their digests, and finds them in the run's replay.
    """
    folder.mkdir()
    for shard in shards:
        try:
            os.link(shard, folder / shard.name, follow_symlinks=False)
        except FileNotFoundError:
            continue  # deleted from outside; the checkpoint's digest shows what is missing
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            break
    sync_folder(folder)


def _keep_as_best(folder: Path, checkpoint: Path, step: int) -> None:
    """Make `checkpoint` the best one: a folder of links to its files, or copies where there are no links."""
    final = folder / f"best-{step:08d}"
    if not final.exists():
        temporary = folder / f"{_TEMPORARY}{final.name}"
        with _deleted_on_error(temporary):
            shutil.copytree(checkpoint, temporary, copy_function=_link_or_copy)
            for each in (temporary / REPLAY_FOLDER, temporary):
                sync_folder(each)
            _publish(temporary, final)
    for other, path in _list_named(folder, _BEST_NAME):
        if other != step:
            _delete(path)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        write_durably(Path(target), Path(source).read_bytes())


@contextmanager
def _deleted_on_error(temporary: Path) -> Iterator[None]:
    """On a full disk a partial checkpoint only takes space that is needed."""
    try:
        yield
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, final: Path) -> None:
    """Give a complete folder its final name."""
    sync_folder(temporary)
    temporary.rename(final)
    sync_folder(final.parent)


def _delete(path: Path) -> None:
    # Renamed first, so that a deletion cut short leaves no half checkpoint under a valid name.
    shutil.rmtree(path.rename(path.with_name(f"{_DELETING}{path.name}")))


def portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, as safetensors requires."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def check_size(path: Path) -> int:
    """The size in bytes of a plain file that may be read; ValueError if it is none, or too large."""
    status = os.stat(path, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is no plain file")
    most = MOST_BYTES.get(path.name, MOST_TENSOR_BYTES)
    if status.st_size > most:
        raise ValueError(f"{path.name} has {status.st_size} bytes, at most {most}")
    return status.st_size


def read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    """A file's bytes; ValueError if size, digest or kind differ from the manifest."""
    size = check_size(path)
    if size != entry["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes, its manifest says {entry['bytes']}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} does not have the sha256 its manifest says")
    return data


def _delete_leftovers(folder: Path) -> None:
    """Delete files that a crash left half written or half deleted."""
    for path in folder.iterdir():
        if path.name.startswith((_TEMPORARY, _DELETING)):
            if _is_folder(path):
                shutil.rmtree(path)
            else:
                path.unlink()  # not written by this package, but in the way; links are not followed

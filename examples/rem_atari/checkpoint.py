"""Checkpoints: safetensors and JSON in a folder that is whole or absent, checked by sha256 when read.

A checkpoint is written into a folder with a temporary name, synced to the disk, and renamed to
``step-00000042``: a crash at any moment leaves the earlier ones intact. Nothing in it is ever executed (no
pickle), and a flipped bit or a cut file is found by the digests in its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from rem_atari.durable import sync_folder, write_durably
from rem_atari.errors import RunError

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
CONTENT_FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".writing-"
_DELETING = ".deleting-"


class CheckpointError(RunError):
    """There is no checkpoint that can be used."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: its number; it grows with everything a run does, so that it stands for one state of the run.
        model: the weights of the whole agent by name.
        optimizer: the tensors of the optimisers by name, see :mod:`rem_atari.training.component`.
        state: everything else, plain JSON data.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and delete the oldest ones beyond `keep`.

    A step that was saved already is left as it is: it's the same state.

    Args:
        folder: the run's ``checkpoints`` folder; made if it's not there.
        checkpoint: what to save; tensors may lie on any device.
        keep: number of checkpoints kept, this one included; at least 1.
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
        temporary.mkdir()
        _write_content(temporary, checkpoint)
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(folder)
    for _, path in list_checkpoints(folder)[:-keep]:
        # Renamed first, so that a deletion cut short leaves no half checkpoint under a valid name.
        doomed = path.rename(folder / f"{_DELETING}{path.name}")
        shutil.rmtree(doomed)
    return final


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, oldest step first; names that are not wholly ours are ignored."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match and not path.is_symlink())


def load_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint, by step, whose files are whole; a warning names each damaged one passed over.

    Args:
        folder: the run's ``checkpoints`` folder.
    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint")
    for step, path in reversed(found):
        try:
            return read_checkpoint(path, step)
        except CheckpointError as error:
            warnings.warn(f"checkpoint passed over: {error}", RuntimeWarning, stacklevel=2)
    raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole")


def read_checkpoint(path: Path, step: int) -> Checkpoint:
    """One checkpoint, every file of it checked before anything in it is parsed.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    try:
        _refuse_link(path / MANIFEST_FILE)
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())["files"]
        content = {name: _read_checked(path / name, manifest[name]) for name in CONTENT_FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return Checkpoint(
        step=step,
        model=safetensors.torch.load(content[MODEL_FILE]),
        optimizer=safetensors.torch.load(content[OPTIMIZER_FILE]),
        state=json.loads(content[STATE_FILE]),
    )


def _write_content(folder: Path, checkpoint: Checkpoint) -> None:
    content = {
        MODEL_FILE: safetensors.torch.save(_portable(checkpoint.model)),
        OPTIMIZER_FILE: safetensors.torch.save(_portable(checkpoint.optimizer)),
        STATE_FILE: json.dumps(checkpoint.state, indent=2).encode(),
    }
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content.items()
    }
    for name, data in content.items():
        write_durably(folder / name, data)
    write_durably(folder / MANIFEST_FILE, json.dumps({"files": manifest}, indent=2).encode())


def _portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read_checked(path: Path, entry: Mapping[str, Any]) -> bytes:
    """A file's bytes, or ValueError where size, digest or kind of file is not what the manifest says."""
    _refuse_link(path)
    size = os.stat(path).st_size
    if size != entry["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes, its manifest says {entry['bytes']}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} does not have the sha256 its manifest says")
    return data


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(f"{path.name} is a link")


def _delete_leftovers(folder: Path) -> None:
    """Delete what a crash left half written or half deleted."""
    for path in folder.iterdir():
        if path.name.startswith((_TEMPORARY, _DELETING)) and not path.is_symlink():
            shutil.rmtree(path)

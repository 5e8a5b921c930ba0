"""A run's config.json: written with a digest of its own, and restored if it was lost or edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rem_atari.config import Config
from rem_atari.config.overlay import DIGEST
from rem_atari.config.reading import flatten
from rem_atari.errors import UsageError
from rem_atari.runs.checkpoint import read_config_copy
from rem_atari.runs.durable import replace_file

MOST_CONFIG_BYTES = 1_000_000

RESUMED_WITH = ("threads", "schedule.", "evaluation.")
"""What `rem-atari resume` may change: config.json is written before the next checkpoint has its copy."""


@dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """A run's configuration as read from its folder.

    Attributes:
        config: the settings.
        lost_from: number of the checkpoint whose copy replaces a missing config.json, or None.
        is_edited: whether config.json differs from what the run wrote.
        edits: the settings that were edited, with old and new value, as far as a checkpoint's copy shows.
    """

    config: Config
    lost_from: int | None = None
    is_edited: bool = False
    edits: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def note(self) -> str | None:
        """A sentence on what has changed since the run wrote it, or None."""
        if self.lost_from is not None:
            return f"config.json is lost; the copy of checkpoint {self.lost_from} is used in its place"
        return f"config.json was edited: {describe_edits(self.edits)}" if self.is_edited else None


def describe_edits(edits: Mapping[str, Any]) -> str:
    """The settings that were edited, with old and new value."""
    listed = (f"{path} was {was!r} and is {now!r}" for path, (was, now) in edits.items())
    return "; ".join(listed) or "which settings is not known"


def config_text(config: Config) -> bytes:
    """The content of config.json: the settings and their digest."""
    settings = config.to_dict()
    return (json.dumps(settings | {DIGEST: _digest(settings)}, indent=2) + "\n").encode()


def write_config(path: Path, config: Config) -> None:
    """Write config.json at `path`.

    Raises:
        OSError: it cannot be written; the old file is still there.
    """
    replace_file(path, config_text(config))


def read_config(path: Path, checkpoints: Path) -> SavedConfig:
    """The configuration at `path`, or else the newest copy in the folder `checkpoints`.

    Edited is one whose digest is that of other settings, and one that the run cannot have written after its
    newest checkpoint: without a digest, or of another run.

    Raises:
        UsageError: it cannot be read, or it isn't one.
    """
    copy = read_config_copy(checkpoints)
    if not path.is_file():
        if copy is None:
            raise UsageError(f"{path} is not the configuration of a run: there is none")
        step, data = copy
        return SavedConfig(config=_parse(data, path)[0], lost_from=step)
    way_out = "" if copy is None else f"; without the file, the copy of checkpoint {copy[0]} is used"
    try:
        size = path.stat().st_size
        if size > MOST_CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes, at most {MOST_CONFIG_BYTES}")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not the configuration of a run: {error}{way_out}") from error
    config, is_whole = _parse(data, path, way_out)
    edits = {} if copy is None else _compare(_parse(copy[1], path)[0], config)
    if is_whole:
        edits = {name: edit for name, edit in edits.items() if not name.startswith(RESUMED_WITH)}
    return SavedConfig(config=config, is_edited=is_whole is False or bool(edits), edits=edits)


def parse_config(data: bytes, path: Path) -> Config:
    """The configuration in the content of a config.json; `path` is named in the message.

    Raises:
        UsageError: it isn't one.
    """
    return _parse(data, path)[0]


def _parse(data: bytes, path: Path, way_out: str = "") -> tuple[Config, bool | None]:
    """The configuration, and whether its digest is that of its settings; None: it has none, as in earlier
    versions."""
    try:
        settings = json.loads(data)
        digest = settings.pop(DIGEST, None) if isinstance(settings, dict) else None
        return Config.from_dict(settings), None if digest is None else digest == _digest(settings)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not the configuration of a run: {error}{way_out}") from error


def _digest(settings: Mapping[str, Any]) -> str:
    """Digest of the settings as JSON, independent of spacing and order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _compare(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    old, new = flatten(before.to_dict()), flatten(now.to_dict())
    return {path: (old.get(path), value) for path, value in new.items() if old.get(path) != value}

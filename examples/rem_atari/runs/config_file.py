"""A run's config.json: written with a digest of its own, and restored if it was lost or edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rem_atari.config import Config
from rem_atari.config.reading import flatten
from rem_atari.errors import UsageError
from rem_atari.runs.checkpoint import read_config_copy
from rem_atari.runs.durable import replace_file

DIGEST = "sha256"
"""The entry of config.json with a digest of all settings."""

MOST_CONFIG_BYTES = 1_000_000


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

    Raises:
        UsageError: it cannot be read, or it isn't one.
    """
    if not path.is_file():
        copy = read_config_copy(checkpoints)
        if copy is None:
            raise UsageError(f"{path} is not the configuration of a run: there is none")
        step, data = copy
        return SavedConfig(config=_parse(data, path)[0], lost_from=step)
    try:
        size = path.stat().st_size
        if size > MOST_CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes, at most {MOST_CONFIG_BYTES}")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not the configuration of a run: {error}") from error
    config, is_edited = _parse(data, path)
    if not is_edited:
        return SavedConfig(config=config)
    copy = read_config_copy(checkpoints)
    edits = {} if copy is None else _compare(_parse(copy[1], path)[0], config)
    return SavedConfig(config=config, is_edited=True, edits=edits)


def _parse(data: bytes, path: Path) -> tuple[Config, bool]:
    """The configuration, and whether its digest differs from its settings; earlier versions wrote none."""
    try:
        settings = json.loads(data)
        digest = settings.pop(DIGEST, None) if isinstance(settings, dict) else None
        return Config.from_dict(settings), digest is not None and digest != _digest(settings)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not the configuration of a run: {error}") from error


def _digest(settings: Mapping[str, Any]) -> str:
    """Digest of the settings as JSON, independent of spacing and order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _compare(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    old, new = flatten(before.to_dict()), flatten(now.to_dict())
    return {path: (old.get(path), value) for path, value in new.items() if old.get(path) != value}

"""Settings from a TOML or JSON file, which override any number of a preset's settings."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from rem_atari.config.settings import Config
from rem_atari.errors import UsageError

DIGEST = "sha256"
"""The entry of a run's config.json with a digest of all settings; it is no setting."""

MOST_BYTES = 1_000_000


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file, nested as in `Config`; a run's config.json is such a file too.

    Args:
        path: TOML if its name ends in .toml, else JSON.

    Raises:
        UsageError: the file cannot be read, or holds no settings.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        settings = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError(f"it holds {type(settings).__name__}, wanted an object with named fields")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the settings {path} cannot be read: {error}") from error
    settings.pop(DIGEST, None)
    return settings


def apply_settings(config: Config, settings: dict[str, Any]) -> Config:
    """A configuration with some of its fields set.

    A game that the settings name wins over an `env.id` that only `config` names.

    Raises:
        ValueError: there is no such field, or a value has the wrong type; the message gives its dotted path.
    """
    env = settings.get("env")
    if isinstance(env, dict) and "game" in env and "id" not in env:
        settings = settings | {"env": env | {"id": None}}
    return Config.from_dict(_merge(config.to_dict(), settings))


def _merge(fields: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in settings.items():
        is_part = isinstance(fields.get(name), dict) and isinstance(value, dict)
        merged[name] = _merge(fields[name], value) if is_part else value
    return merged

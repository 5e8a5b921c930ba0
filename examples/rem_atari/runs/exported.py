"""An exported agent: a small folder with all that playing and dreaming need, and what its training measured.

========================  ===============================================================
file                      content
========================  ===============================================================
``agent.json``            configuration, action names, figures, and a digest of each file
``model.safetensors``     the weights
``starts.npz``            real frames to begin dreams at
``metrics.jsonl``         what its run measured, if it did
``README.md``             the model card
========================  ===============================================================

``agent.json`` is written last, so a folder that has it is whole. Nothing in the folder is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from rem_atari.config import Config
from rem_atari.errors import UsageError
from rem_atari.replay.starts import Starts, starts_from_bytes, starts_to_bytes
from rem_atari.runs.checkpoint import (
    MODEL_FILE,
    Checkpoint,
    CheckpointError,
    check_size,
    portable,
    read_checked,
)
from rem_atari.runs.durable import replace_file

FORMAT = "rem-atari-agent-1"
AGENT_FILE, STARTS_FILE, METRICS_FILE, CARD_FILE = "agent.json", "starts.npz", "metrics.jsonl", "README.md"
NOTED = ("epoch", "env_steps", "num_actions", "action_names", "sees")
"""The parts of a checkpoint's state that an exported agent keeps."""


def is_exported(folder: Path) -> bool:
    """Whether `folder` is that of an exported agent."""
    return (folder / AGENT_FILE).is_file()


def write_exported(
    folder: Path,
    config: Config,
    checkpoint: Checkpoint,
    starts: Starts,
    *,
    card: str,
    figures: Mapping[str, Any],
    metrics: bytes | None,
) -> None:
    """Write an agent into a folder, which is made if it is not there.

    Args:
        folder: where to; an agent that is there already is replaced.
        config: the configuration of its run, see `movable`.
        checkpoint: its weights, and what was noted of its game.
        starts: real frames to begin dreams at.
        card: the model card, Markdown.
        figures: what was measured of it, JSON data.
        metrics: the metrics.jsonl of its run, if there is one.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (AGENT_FILE, METRICS_FILE):
        (folder / name).unlink(missing_ok=True)
    files = {
        MODEL_FILE: safetensors.torch.save(portable(checkpoint.model)),
        STARTS_FILE: starts_to_bytes(starts),
        CARD_FILE: card.encode(),
    }
    if metrics is not None:
        files[METRICS_FILE] = metrics
    for name, data in files.items():
        replace_file(folder / name, data)
    about = {
        "format": FORMAT,
        "step": checkpoint.step,
        "state": {name: checkpoint.state[name] for name in NOTED if name in checkpoint.state},
        "figures": dict(figures),
        "config": config.to_dict(),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
            if name != CARD_FILE
        },
    }
    replace_file(folder / AGENT_FILE, (json.dumps(about, indent=2, allow_nan=False) + "\n").encode())


def read_exported(folder: Path) -> tuple[Config, Checkpoint]:
    """The configuration of an exported agent, and its weights as a checkpoint without optimisers.

    Raises:
        UsageError: this is no exported agent.
        CheckpointError: a file is missing, cut short or altered.
    """
    about = read_about(folder)
    try:
        model = safetensors.torch.load(_read_file(folder, MODEL_FILE, about))
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    checkpoint = Checkpoint(step=about["step"], model=model, optimizer={}, state=about["state"])
    return Config.from_dict(about["config"]), checkpoint


def read_exported_starts(folder: Path) -> Starts:
    """The starts of an exported agent.

    Raises:
        UsageError: this is no exported agent.
        CheckpointError: their file is missing, cut short or altered.
    """
    about = read_about(folder)
    data = _read_file(folder, STARTS_FILE, about)
    return starts_from_bytes(data, Config.from_dict(about["config"]).env.frame_size)


def find_exported_metrics(folder: Path) -> Path | None:
    """The metrics.jsonl of an exported agent, whole; None if the agent came without one.

    Raises:
        UsageError: this is no exported agent.
        CheckpointError: the file is missing, cut short or altered.
    """
    about = read_about(folder)
    if METRICS_FILE not in about["files"]:
        return None
    _read_file(folder, METRICS_FILE, about)
    return folder / METRICS_FILE


def _read_file(folder: Path, name: str, about: Mapping[str, Any]) -> bytes:
    """A file of an exported agent, checked by the digest in what its folder says about it."""
    try:
        return read_checked(folder / name, about["files"][name])
    except KeyError as error:
        raise CheckpointError(f"{folder} is damaged: {AGENT_FILE} has no entry {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error


def read_about(folder: Path) -> dict[str, Any]:
    """What the folder of an exported agent says about it.

    Raises:
        UsageError: it says nothing, or something else.
    """
    path = folder / AGENT_FILE
    try:
        check_size(path)
        about = json.loads(path.read_bytes())
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"it is not in the format {FORMAT}")
        for name, kind in (("step", int), ("state", dict), ("figures", dict), ("files", dict)):
            if not isinstance(about.get(name), kind):
                raise ValueError(f"its {name} is {about.get(name)!r}")
        Config.from_dict(about.get("config", {}))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not that of an exported agent: {error}") from error
    return about


def movable(config: Config) -> Config:
    """The configuration without what belongs to the machine that it was trained on."""
    recorded = config.schedule.recorded
    return replace(
        config,
        device="cpu",
        compile=False,
        tokenizer=replace(config.tokenizer, lpips_weights=None),
        schedule=replace(config.schedule, recorded=None if recorded is None else Path(recorded).name),
    )

"""Reads a run's folder, as much of it as is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.envs.host import number_actions
from rem_atari.errors import RunError
from rem_atari.replay.buffer import Replay
from rem_atari.report.history import MetricLine
from rem_atari.runs.checkpoint import Checkpoint, CheckpointError, load_checkpoint, not_finite
from rem_atari.runs.folder import RunFolder, open_run_folder
from rem_atari.runs.metrics import parse_line
from rem_atari.runs.session import read_sessions, recorded_edits

LINES_NAMED = 5
"""At most so many damaged lines are named."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run's folder holds.

    Attributes:
        folder: where its files lie.
        config: its configuration.
        lines: the readable lines of its metrics, oldest first.
        step: number of the newest whole checkpoint, or None.
        agent: its weights, on the CPU and in eval mode; None without a whole checkpoint.
        state: what the trainer noted beside them; empty without a whole checkpoint.
        training: the experience trained on, or None.
        heldout: the steps of the last evaluation, never trained on, or None.
        notes: a sentence on each thing that is missing or damaged.
        edits: settings edited by hand since the run began, see `SavedConfig`.
    """

    folder: RunFolder
    config: Config
    lines: list[MetricLine]
    step: int | None
    agent: Agent | None
    state: Mapping[str, Any]
    training: Replay | None
    heldout: Replay | None
    notes: list[str]
    edits: Mapping[str, Any]


def load_run(path: Path) -> RunData:
    """Read a run's folder; what is missing in it becomes a note.

    Raises:
        UsageError: `path` is no run folder, or its configuration cannot be read.
    """
    folder = open_run_folder(path)
    saved = folder.read_config()
    config, notes = saved.config, [] if saved.note is None else [f"{saved.note}."]
    lines = read_lines(folder.metrics, notes)
    checkpoint = _load_checkpoint(folder, notes)
    return RunData(
        folder=folder,
        config=config,
        lines=lines,
        step=None if checkpoint is None else checkpoint.step,
        agent=None if checkpoint is None else _load_agent(checkpoint.model, config, notes),
        state={} if checkpoint is None else checkpoint.state,
        training=_load_replay(folder.replay, "training frames", notes),
        heldout=_load_replay(folder.heldout, "held-out frames", notes),
        notes=notes,
        edits=recorded_edits(read_sessions(folder.sessions)) | dict(saved.edits),
    )


def read_lines(path: Path, notes: list[str]) -> list[MetricLine]:
    """The lines of a metrics file that are JSON objects; a note is added for what is left out.

    A run that was killed may leave half a line, and a full disk any kind of them.
    """
    if not path.is_file():
        notes.append(f"There is no {path.name}: the run ended before it measured anything.")
        return []
    # A line ends with a newline alone: a text within one may hold other characters that split lines.
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [(number, parse_line(text)) for number, text in enumerate(texts, start=1) if text]
    damaged = [number for number, line in lines if line is None]
    if damaged:
        named = ", ".join(map(str, damaged[:LINES_NAMED])) + (" ..." if len(damaged) > LINES_NAMED else "")
        notes.append(f"{len(damaged)} of {len(lines)} lines of {path.name} cannot be read: line {named}.")
    return [line for _, line in lines if line is not None]


def _load_checkpoint(folder: RunFolder, notes: list[str]) -> Checkpoint | None:
    """The newest whole checkpoint, or None with a note."""
    try:
        return load_checkpoint(folder.checkpoints)
    except CheckpointError as error:
        notes.append(f"There are no weights to look at: {error}.")
        return None


def _load_agent(weights: Mapping[str, Tensor], config: Config, notes: list[str]) -> Agent | None:
    """The agent with these weights, or None with a note; the number of actions is read off the weights."""
    try:
        agent = Agent.from_config(config, num_actions=weights["controller.actor.weight"].shape[0])
        agent.load_state_dict(dict(weights))
    except (KeyError, RuntimeError):  # load_state_dict lists every name that does not fit
        notes.append("There are no weights to look at: the newest ones do not fit the configuration.")
        return None
    broken = not_finite(weights)
    if broken is not None:
        notes.append(f"There are no weights to look at: the newest ones are not finite ({broken}).")
        return None
    return agent.eval()


def _load_replay(folder: Path, name: str, notes: list[str]) -> Replay | None:
    """The replay in `folder`, or None with a note."""
    try:
        replay = Replay.load(folder)
    except (RunError, ValueError, OSError) as error:
        notes.append(f"There are no {name}: {error}")
        return None
    if replay.num_steps == 0:
        notes.append(f"There are no {name}: {folder.name} is empty.")
        return None
    return replay


def action_names(state: Mapping[str, Any], num_actions: int) -> list[str]:
    """The names of the actions that the trainer noted in a checkpoint's state, else "action 0" and so on.

    The game itself is not asked: to make it would run whatever module the configuration names.
    """
    names = state.get("action_names")
    if not isinstance(names, list) or len(names) != num_actions:
        return number_actions(num_actions)
    return [str(name) for name in names]

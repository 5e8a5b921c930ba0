"""The content of the report's page, from the files of a run's folder that exist."""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.envs import env_name
from rem_atari.envs.host import number_actions
from rem_atari.errors import RunError, RunWarning, explain
from rem_atari.films.pictures import Scene
from rem_atari.replay.buffer import Replay
from rem_atari.report.history import MetricLine, last_value, read_lines
from rem_atari.report.measure import (
    dream_ahead,
    imagine_scenes,
    look_at_drift,
    look_at_frames,
    look_at_horizon,
    look_at_predictions,
    look_at_returns,
)
from rem_atari.report.quality import Comparison, Quality
from rem_atari.report.rivals import Rivals, read_rivals
from rem_atari.runs.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from rem_atari.runs.command_line import command_line
from rem_atari.runs.folder import RunFolder, open_run_folder
from rem_atari.runs.reading import newest_summary
from rem_atari.runs.session import read_sessions, recorded_edits, train_command
from rem_atari.runs.trained import build_agent

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The content of a run's folder.

    Attributes:
        folder: where its files lie.
        name: what commands take for it.
        config: its configuration.
        lines: the readable lines of its metrics, oldest first.
        step: number of the newest whole checkpoint, or None.
        agent: its weights, on the CPU and in eval mode; None without a whole checkpoint.
        state: the trainer's state beside them; empty without a whole checkpoint.
        training: the experience trained on, or None.
        heldout: the steps of the last evaluation, never trained on, or None.
        notes: a sentence on each thing that is missing or damaged.
        edits: settings edited by hand since the run began, see `SavedConfig`.
    """

    folder: RunFolder
    name: str
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
    """Read a run's folder; missing parts become notes.

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
        name=str(path),
        config=config,
        lines=lines,
        step=None if checkpoint is None else checkpoint.step,
        agent=None if checkpoint is None else _load_agent(checkpoint, config, notes),
        state={} if checkpoint is None else checkpoint.state,
        training=_load_replay(folder.replay, "training frames", notes),
        heldout=_load_replay(folder.heldout, "held-out frames", notes),
        notes=notes,
        edits=recorded_edits(read_sessions(folder.sessions)) | dict(saved.edits),
    )


def _load_checkpoint(folder: RunFolder, notes: list[str]) -> Checkpoint | None:
    """The newest whole checkpoint, or None with a note."""
    try:
        return load_checkpoint(folder.checkpoints)
    except CheckpointError as error:
        notes.append(f"There are no weights to look at: {error}.")
        return None


def _load_agent(checkpoint: Checkpoint, config: Config, notes: list[str]) -> Agent | None:
    """The agent with a checkpoint's weights, or None with a note."""
    try:
        return build_agent(config, checkpoint)
    except CheckpointError as error:
        notes.append(f"There are no weights to look at: {error}.")
        return None


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

    The game itself is not made, because that would run the module that the configuration names.
    """
    names = state.get("action_names")
    if not isinstance(names, list) or len(names) != num_actions:
        return number_actions(num_actions)
    return [str(name) for name in names]


@dataclass(frozen=True)
class RunFile:
    """A file or folder of the run: its name, what it is, and its size in bytes."""

    name: str
    purpose: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows.

    Attributes:
        game: name of the game.
        config: the run's configuration.
        versions: names and versions of the software.
        lines: lines of metrics.jsonl.
        sessions: lines of sessions.jsonl.
        command: the command that starts such a run again.
        play: the command that lets a person play in its dream; empty without weights.
        notes: sentences on what is missing or unusual, shown at the top.
        step: number of the checkpoint whose weights were measured, or None.
        quality: the measurements on held-out frames.
        scenes: imagined films; empty where none could be made.
        edits: settings that were edited by hand after the start of the run, with old and new value.
        evaluation: the results of `rem-atari evaluate`, see `reading.newest_summary`, or None.
        rivals: the results of `rem-atari blind`, or None.
    """

    game: str
    config: Config
    versions: dict[str, str]
    lines: list[MetricLine]
    command: str
    notes: list[str]
    step: int | None
    quality: Quality
    scenes: list[Scene]
    edits: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    rivals: Rivals | None = None
    sessions: Sequence[Mapping[str, Any]] = ()
    play: str = ""

    @property
    def comparisons(self) -> list[Comparison]:
        """The agent beside its rivals on held-out frames; empty if nothing could be measured."""
        return self.quality.comparisons


def attempt(part: str, notes: list[str], make: Callable[[], T]) -> T | None:
    """The result of `make`; if it fails, None and a note, so that one part does not cost the whole report.

    Raises:
        OSError: a file cannot be read or written; this is no fault of the part.
    """
    try:
        return make()
    except OSError:
        raise
    except Exception as error:
        notes.append(f"{part} could not be made: {explain(error)}.")
        warnings.warn(notes[-1], RunWarning, stacklevel=2)
        return None


def gather(data: RunData) -> Report:
    """Measure a run as far as possible, and collect the content of its page."""
    config = data.config
    scenes = attempt("The imagined films", data.notes, partial(_imagine, data))
    return Report(
        game=env_name(config.env),
        config=config,
        versions={
            "retpop": version("retpop"),
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        lines=data.lines,
        command=train_command(config, PRESETS.get(config.preset)),
        notes=data.notes,
        step=data.step,
        quality=measure_quality(data),
        scenes=scenes or [],
        edits=data.edits,
        evaluation=newest_summary(data.folder),
        rivals=read_rivals(data.folder.blind),
        sessions=read_sessions(data.folder.sessions),
        play="" if data.agent is None else command_line(config.env, ["play", data.name]),
    )


def _imagine(data: RunData) -> list[Scene]:
    """Films from held-out starts; none without weights or held-out frames."""
    if data.agent is None or data.heldout is None:
        return []
    names = action_names(data.state, data.agent.controller.num_actions)
    return imagine_scenes(data.agent, data.config, data.heldout, names)


def quality_json(report: Report) -> str:
    """The measurements on held-out frames as JSON text, with the run and checkpoint measured."""
    epoch, steps = last_value(report.lines, "epoch"), last_value(report.lines, "env_steps")
    of = {
        "game": report.game,
        "preset": report.config.preset,
        "seed": report.config.seed,
        "step": report.step,
        "epoch": None if epoch is None else int(epoch),
        "env_steps": None if steps is None else int(steps),
    }
    return json.dumps(without_nan({**of, **report.quality.to_dict()}), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """JSON data with null for every number that is not finite, because JSON has none."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure_quality(data: RunData) -> Quality:
    """Measure the networks on held-out frames, if both exist."""
    agent, heldout, training = data.agent, data.heldout, data.training
    if agent is None or heldout is None:
        return Quality(steps=0 if heldout is None else heldout.num_steps)
    frames = predictions = None
    if training is not None:
        look = partial(look_at_frames, agent, training, heldout)
        frames = attempt("What is measured of frames", data.notes, look)
        look_on = partial(look_at_predictions, agent, data.config, training, heldout)
        predictions = attempt("What is measured of predictions", data.notes, look_on)
    ahead = attempt("Dreams to measure", data.notes, partial(dream_ahead, agent, data.config, heldout))
    horizon = drift = returns = None
    if ahead is not None:
        look_ahead = partial(look_at_horizon, agent, ahead)
        horizon = attempt("What is measured of the horizon", data.notes, look_ahead)
        drift = attempt("What is measured of drift", data.notes, partial(look_at_drift, agent, ahead))
        earned = partial(look_at_returns, ahead, data.config)
        returns = attempt("What is measured of imagined returns", data.notes, earned)
    return Quality(
        steps=heldout.num_steps,
        frames=frames,
        predictions=predictions,
        horizon=horizon,
        drift=drift,
        returns=returns,
    )

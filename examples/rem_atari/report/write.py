"""From a run's folder to its report.html and media."""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from rem_atari.config.presets import PRESETS
from rem_atari.envs import env_name
from rem_atari.errors import RunWarning, explain
from rem_atari.report.charts import charts_of
from rem_atari.report.colophon import train_command
from rem_atari.report.contents import Report, RunFile
from rem_atari.report.figures import save_curves, save_imagination, save_reconstructions
from rem_atari.report.films import Scene
from rem_atari.report.history import last_value
from rem_atari.report.load import RunData, action_names, load_run
from rem_atari.report.measure import imagine_scenes, look_at_frames, look_at_horizon, look_at_predictions
from rem_atari.report.page import render
from rem_atari.report.quality import QUALITY_FILE, Quality
from rem_atari.runs.durable import replace_file
from rem_atari.runs.evaluations import newest_summary
from rem_atari.runs.session import read_sessions

T = TypeVar("T")

PURPOSES = {
    "config.json": "the resolved configuration",
    QUALITY_FILE: "what this page measures on held-out frames, as JSON",
    "metrics.jsonl": "what each phase of each epoch measured, one JSON object a line",
    "sessions.jsonl": "when, with which code and on what the run was started and resumed",
    "tensorboard": "the same for TensorBoard",
    "checkpoints": "weights, optimisers and counters, with checksums",
    "replay": "the experience trained on, in append-only shards",
    "heldout": "steps of the last evaluation, never trained on",
    "evaluation": "whole games played by `rem-atari evaluate`: scores, episodes, films",
    "media/curves.png": "the curves of this page",
    "media/reconstructions.png": "frames beside their reconstructions",
    "media/imagination.gif": "the imagined films",
}
"""What a run's folder may hold, in the order in which the page lists it."""


def write_report(run: Path) -> Path:
    """Write a run's report.html, its measurements as quality.json, and the pictures in it as files in media/.

    Whatever the run lacks (a run stopped early, no held-out frames, a part that never trained) is said in the
    page instead of shown. Earlier reports are replaced.

    Args:
        run: the run's folder.

    Returns:
        The path of the page.

    Raises:
        UsageError: `run` is no run folder, or its configuration cannot be read.
        OSError: the report cannot be written.
    """
    data = load_run(run)
    report = gather(data)
    media = run / "media"
    media.mkdir(exist_ok=True)
    for picture, save in (
        ("curves.png", _save_curves),
        ("reconstructions.png", _save_reconstructions),
        ("imagination.gif", _save_imagination),
    ):
        attempt(f"media/{picture}", data.notes, partial(save, media / picture, report))
    replace_file(run / QUALITY_FILE, quality_json(report).encode())
    page = run / "report.html"
    replace_file(page, render(report, list_files(run)).encode())
    return page


def attempt(part: str, notes: list[str], make: Callable[[], T]) -> T | None:
    """What `make` gives; None and a note where it fails: one part must not cost the report of a whole run.

    Raises:
        OSError: the disk refused; that is no fault of the part.
    """
    try:
        return make()
    except OSError:
        raise
    except Exception as error:
        notes.append(f"{part} could not be made: {explain(error)}.")
        warnings.warn(notes[-1], RunWarning, stacklevel=2)
        return None


def _save_curves(path: Path, report: Report) -> None:
    charts = charts_of(report.lines)
    if charts:
        save_curves(path, charts)


def _save_reconstructions(path: Path, report: Report) -> None:
    if report.quality.frames is not None:
        redrawn = report.quality.frames.redrawn
        save_reconstructions(path, redrawn.frames, redrawn.reconstructions)


def _save_imagination(path: Path, report: Report) -> None:
    if report.scenes:
        save_imagination(path, report.scenes)


def gather(data: RunData) -> Report:
    """Measure what can be measured of a run, and collect all that its page shows."""
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
        sessions=read_sessions(data.folder.sessions),
    )


def _imagine(data: RunData) -> list[Scene]:
    """Films from held-out starts; none without weights or held-out frames."""
    if data.agent is None or data.heldout is None:
        return []
    names = action_names(data.state, data.agent.controller.num_actions)
    return imagine_scenes(data.agent, data.config, data.heldout, names)


def quality_json(report: Report) -> str:
    """What was measured on held-out frames as JSON text, with what it was measured of."""
    steps = last_value(report.lines, "env_steps")
    of = {
        "game": report.game,
        "preset": report.config.preset,
        "seed": report.config.seed,
        "step": report.step,
        "env_steps": None if steps is None else int(steps),
    }
    return json.dumps(without_nan({**of, **report.quality.to_dict()}), indent=2, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """JSON data with null for every number that is not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure_quality(data: RunData) -> Quality:
    """Show the networks held-out frames, as far as there are any of both."""
    agent, heldout, training = data.agent, data.heldout, data.training
    if agent is None or heldout is None:
        return Quality(steps=0 if heldout is None else heldout.num_steps)
    frames = predictions = None
    if training is not None:
        look = partial(look_at_frames, agent, training, heldout)
        frames = attempt("What is measured of frames", data.notes, look)
        look_on = partial(look_at_predictions, agent, data.config, training, heldout)
        predictions = attempt("What is measured of predictions", data.notes, look_on)
    look_ahead = partial(look_at_horizon, agent, data.config, heldout)
    horizon = attempt("What is measured of the horizon", data.notes, look_ahead)
    return Quality(steps=heldout.num_steps, frames=frames, predictions=predictions, horizon=horizon)


def list_files(run: Path) -> list[RunFile]:
    """What the folder holds of the files a run may have, with sizes in bytes."""
    return [
        RunFile(name, purpose, _size_of(run / name))
        for name, purpose in PURPOSES.items()
        if (run / name).exists()
    ]


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())

"""From a run's folder to its report.html and media."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from rem_atari.config.presets import PRESETS
from rem_atari.envs import env_name
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
    charts = charts_of(report.lines)
    if charts:
        save_curves(media / "curves.png", charts)
    if report.quality.frames is not None:
        redrawn = report.quality.frames.redrawn
        save_reconstructions(media / "reconstructions.png", redrawn.frames, redrawn.reconstructions)
    if report.scenes:
        save_imagination(media / "imagination.gif", report.scenes)
    replace_file(run / QUALITY_FILE, quality_json(report).encode())
    page = run / "report.html"
    replace_file(page, render(report, list_files(run)).encode())
    return page


def gather(data: RunData) -> Report:
    """Measure what can be measured of a run, and collect all that its page shows."""
    config = data.config
    scenes: list[Scene] = []
    if data.agent is not None and data.heldout is not None:
        names = action_names(data.state, data.agent.controller.num_actions)
        scenes = imagine_scenes(data.agent, config, data.heldout, names)
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
        scenes=scenes,
        evaluation=newest_summary(data.folder),
        sessions=read_sessions(data.folder.sessions),
    )


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
    return json.dumps({**of, **report.quality.to_dict()}, indent=2, allow_nan=False) + "\n"


def measure_quality(data: RunData) -> Quality:
    """Show the networks held-out frames, as far as there are any of both."""
    agent, heldout, training = data.agent, data.heldout, data.training
    if agent is None or heldout is None:
        return Quality(steps=0 if heldout is None else heldout.num_steps)
    return Quality(
        steps=heldout.num_steps,
        frames=None if training is None else look_at_frames(agent, training, heldout),
        predictions=None if training is None else look_at_predictions(agent, data.config, training, heldout),
        horizon=look_at_horizon(agent, data.config, heldout),
    )


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

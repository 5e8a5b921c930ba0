"""From a run's folder to its report.html and media."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from rem_atari.durable import replace_file
from rem_atari.envs import env_name
from rem_atari.evaluation_files import newest_summary
from rem_atari.presets import PRESETS
from rem_atari.report.charts import charts_of
from rem_atari.report.colophon import train_command
from rem_atari.report.contents import Report, RunFile
from rem_atari.report.figures import save_curves, save_imagination, save_reconstructions
from rem_atari.report.load import RunData, action_names, load_run
from rem_atari.report.measure import FrameEvidence, imagine_scenes, look_at_frames, look_at_predictions
from rem_atari.report.page import render

PURPOSES = {
    "config.json": "the resolved configuration",
    "metrics.jsonl": "what each phase of each epoch measured, one JSON object a line",
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
    """Write a run's report.html, and the pictures in it as files in media/.

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
    if report.redrawn is not None:
        save_reconstructions(
            media / "reconstructions.png", report.redrawn.frames, report.redrawn.reconstructions
        )
    if report.scenes:
        save_imagination(media / "imagination.gif", report.scenes)
    page = run / "report.html"
    replace_file(page, render(report, list_files(run)).encode())
    return page


def gather(data: RunData) -> Report:
    """Measure what can be measured of a run, and collect all that its page shows."""
    config = data.config
    frames: FrameEvidence | None = None
    predictions, scenes = [], []
    if data.agent is not None and data.heldout is not None:
        names = action_names(data.state, data.agent.controller.num_actions)
        scenes = imagine_scenes(data.agent, config, data.heldout, names)
        if data.training is not None:
            frames = look_at_frames(data.agent, data.training, data.heldout)
            predictions = look_at_predictions(data.agent, config, data.training, data.heldout)
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
        redrawn=None if frames is None else frames.redrawn,
        comparisons=predictions if frames is None else [*frames.comparisons, *predictions],
        codebook=None if frames is None else frames.codebook,
        scenes=scenes,
        heldout_frames=0 if data.heldout is None else data.heldout.num_steps,
        evaluation=newest_summary(data.folder),
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

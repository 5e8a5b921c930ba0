"""``rem-atari train``: train, evaluate, write the report."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rem_atari.arguments import TrainArguments
from rem_atari.commands.report import explain_unwritten
from rem_atari.config import Config
from rem_atari.errors import RunError, UsageError
from rem_atari.runs.folder import (
    RunFolder,
    create_run_folder,
    default_run_path,
    hold_run_folder,
    make_new_folder,
)

if TYPE_CHECKING:
    from rem_atari.runs.checkpoint import Checkpoint
    from rem_atari.training.setup import TrainingParts


def train(arguments: TrainArguments) -> None:
    """Train, evaluate, write the report, and print its path."""
    # Import all of it before the folder is made, so that a missing package is found now.
    import rem_atari.report
    import rem_atari.training.trainer  # noqa: F401
    from rem_atari.envs import env_name
    from rem_atari.training.schedule import replay_capacity
    from rem_atari.training.setup import prepare_training

    config = arguments.config
    check_stop_after(arguments.stop_after)
    replay_capacity(config)  # recorded episodes that cannot be read are to be found before a folder is made
    with prepare_training(config) as parts:
        path = arguments.run
        if path is None:
            path = make_new_folder(default_run_path(config, env_name(config.env), datetime.now()))
        with hold_run_folder(path):
            run = create_run_folder(path, config)
            run_and_report(config, run, parts, stop_after=arguments.stop_after)


def run_and_report(
    config: Config,
    run: RunFolder,
    parts: TrainingParts,
    checkpoint: Checkpoint | None = None,
    *,
    stop_after: float | None = None,
    edits: Mapping[str, Any] | None = None,
) -> None:
    """Train from the beginning or a checkpoint to the end, write the report, and print its path.

    Args:
        config: the run's configuration.
        run: its folder.
        parts: environments and agent.
        checkpoint: where to resume; None: the beginning.
        stop_after: seconds after which it stops; None: no limit.
        edits: hand edits of config.json, to be recorded, or None.

    Raises:
        StoppedError: a signal came, or `stop_after` seconds passed, before the run was done.
    """
    from rem_atari.config.presets import PRESETS
    from rem_atari.runs.progress import make_progress
    from rem_atari.runs.session import log_session, train_command
    from rem_atari.training.schedule import plan_run
    from rem_atari.training.signals import StopRequest
    from rem_atari.training.trainer import Trainer

    progress = make_progress(plan_run(config), config.schedule.epochs, sys.stderr)
    progress.say(f"run folder: {run.path}")
    progress.say(f"the agent sees {parts.envs.sees}")
    command = "train" if checkpoint is None else "resume"
    reproduce = train_command(config, PRESETS.get(config.preset))
    log_session(run, command, reproduce=reproduce, device=config.device, edits=edits)
    with progress, StopRequest(stop_after) as stop:
        Trainer(config, run, parts, progress, stop, checkpoint).run()
    progress.say("writing the report")
    conclude(run)


def check_stop_after(seconds: float | None) -> None:
    """Check a command's time limit.

    Raises:
        UsageError: it is not a valid time.
    """
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"--stop-after is {seconds:g}, wanted more than 0 seconds")


def conclude(run: RunFolder) -> None:
    """Write the report of a finished run, and print the result.

    Raises:
        RunError: the report could not be written.
    """
    from rem_atari.report import write_report

    try:
        page = write_report(run.path)
    except Exception as error:
        raise RunError(
            f"{explain_unwritten(run.path, error)}; its checkpoints and metrics are there"
        ) from error
    print(_summary(run.metrics))
    print(f"report: {page}")


def _summary(metrics: Path) -> str:
    """The agent's mean return beside random play's. The metrics may have been edited, so they are checked."""
    from rem_atari.evaluation import describe_mean
    from rem_atari.report.history import returns_of
    from rem_atari.runs.metrics import read_metrics

    lines = read_metrics(metrics)
    found = (("agent", returns_of(lines, "evaluate")), ("random play", returns_of(lines, "random")))
    parts = [
        f"{name} {describe_mean(returns.mean, returns.standard_error)} over {returns.episodes} episodes"
        for name, returns in found
        if returns is not None
    ]
    return f"mean return: {', '.join(parts) or 'no game was played'}"

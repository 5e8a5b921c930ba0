"""What the subcommands do. Heavy packages are imported inside, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from datetime import datetime

from rem_atari.arguments import Arguments, ListArguments, ReportArguments, TrainArguments
from rem_atari.errors import RunError, UsageError
from rem_atari.run_folder import RunFolder, create_run_folder, default_run_path, open_run_folder


def run_command(arguments: Arguments) -> None:
    """Run the subcommand that the arguments belong to.

    Raises:
        RunError: it failed, was used wrongly, or was stopped; see :mod:`rem_atari.errors`.
    """
    match arguments:
        case TrainArguments():
            train(arguments)
        case ReportArguments():
            report(arguments)
        case ListArguments():
            list_games()


def train(arguments: TrainArguments) -> None:
    """Train, evaluate, write the report, and say where it is."""
    from rem_atari.envs import env_name
    from rem_atari.metrics import read_metrics
    from rem_atari.progress import make_progress

    # Not where it is used: a package that only the report needs must not be missed after the training.
    from rem_atari.report import write_report
    from rem_atari.training.schedule import plan_run
    from rem_atari.training.setup import prepare_training
    from rem_atari.training.signals import StopRequest
    from rem_atari.training.trainer import Trainer

    config = arguments.config
    with prepare_training(config) as parts:
        path = arguments.run or default_run_path(config, env_name(config.env), datetime.now())
        run = create_run_folder(path, config)
        progress = make_progress(plan_run(config), config.schedule.epochs, sys.stderr)
        progress.say(f"run folder: {run.path}")
        with progress, StopRequest() as stop:
            Trainer(config, run, parts, progress, stop).run()
    progress.say("writing the report")
    try:
        page = write_report(run.path)
    except Exception as error:
        raise RunError(f"{_unwritten(run, error)}; its checkpoints and metrics are there") from error
    print(_summary(read_metrics(run.metrics)))
    print(f"report: {page}")


def report(arguments: ReportArguments) -> None:
    """Write a run's report anew, and say where it is."""
    from rem_atari.report import write_report

    run = open_run_folder(arguments.run)
    try:
        page = write_report(run.path)
    except UsageError:
        raise
    except Exception as error:
        raise RunError(_unwritten(run, error)) from error
    print(f"report: {page}")


def list_games() -> None:
    """Print the Atari games, one a line."""
    from rem_atari import envs

    print("\n".join(envs.list_games()))


def _unwritten(run: RunFolder, error: Exception) -> str:
    return f"the report of {run.path} could not be written ({str(error) or type(error).__name__})"


def _summary(lines: list[dict]) -> str:
    """The agent's mean return beside random play's."""
    last = {line["phase"]: line for line in lines if line["phase"] in ("evaluate", "random")}
    parts = [
        f"{name} {last[phase]['mean_return']:.2f} over {last[phase]['episodes']} episodes"
        for phase, name in (("evaluate", "agent"), ("random", "random play"))
        if phase in last and last[phase].get("mean_return") is not None
    ]
    return f"mean return: {', '.join(parts) or 'no game was played'}"

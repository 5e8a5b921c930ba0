"""``rem-atari resume RUN``: resume a stopped run exactly where it stopped."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

from rem_atari.arguments import ResumeArguments
from rem_atari.commands.counting import tell
from rem_atari.commands.train import check_stop_after, conclude, run_and_report
from rem_atari.config import Config
from rem_atari.errors import UsageError
from rem_atari.runs.config_file import write_config
from rem_atari.runs.folder import RunFolder, hold_run_folder, open_run_folder

Part = TypeVar("Part")

ONLY_RAISED = ("epochs", "collect_epochs")
"""Fields of `ScheduleConfig` that can only be raised: planned work is always done."""


def resume(arguments: ResumeArguments) -> None:
    """Resume from the newest whole checkpoint; write the report of a finished run if it is missing.

    Raises:
        UsageError: there is no run, it is in use, or a change is not allowed.
        RunError: it cannot go on, or was stopped again.
    """
    from rem_atari.training.resume import epochs_complete, newest_checkpoint
    from rem_atari.training.setup import prepare_training

    check_stop_after(arguments.stop_after)
    run = open_run_folder(arguments.run)
    with hold_run_folder(run.path):
        saved = run.read_config()
        if saved.note is not None:
            tell(f"warning: {saved.note}{'; the run goes on with it' if saved.is_edited else ''}")
        if saved.lost_from is not None:
            write_config(run.config, saved.config)
        config = change_config(saved.config, arguments)
        checkpoint = newest_checkpoint(run, tell)
        if epochs_complete(checkpoint) >= config.schedule.epochs:
            _say_finished(run, config)
            return
        with prepare_training(config) as parts:
            if config != saved.config or saved.is_edited:
                write_config(run.config, config)
            if checkpoint is None:
                tell("the run was stopped before its first checkpoint: it starts from its beginning")
            else:
                tell(f"going on from checkpoint {checkpoint.step}")
            edits = saved.edits if saved.is_edited else None
            run_and_report(config, run, parts, checkpoint, stop_after=arguments.stop_after, edits=edits)


def change_config(config: Config, arguments: ResumeArguments) -> Config:
    """A run's configuration with the requested changes.

    Raises:
        UsageError: a field that can only be raised is lowered.
    """
    for name in ONLY_RAISED:
        wanted, planned = getattr(arguments.schedule, name), getattr(config.schedule, name)
        if wanted is not None and wanted < planned:
            raise UsageError(
                f"schedule.{name} is {wanted}, and the run was begun with {planned}: it can only be raised"
            )
    return replace(
        config,
        threads=config.threads if arguments.threads is None else arguments.threads,
        schedule=_changed(config.schedule, arguments.schedule),
        evaluation=_changed(config.evaluation, arguments.evaluation),
    )


def _changed(part: Part, changes: object) -> Part:
    """A part of the configuration with those fields of `changes` that are given."""
    named = {field.name: getattr(changes, field.name) for field in fields(changes)}  # type: ignore[arg-type]
    return replace(part, **{name: value for name, value in named.items() if value is not None})  # type: ignore[type-var]


def _say_finished(run: RunFolder, config: Config) -> None:
    epochs = config.schedule.epochs
    print(f"the run is finished: {epochs} of {epochs} epochs; --schedule.epochs N makes it longer")
    if not (run.path / "report.html").is_file():
        tell("writing the report")
        conclude(run)

"""Parsing of the command line: preset, file of settings and flags, in this order, then checks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro

from rem_atari.arguments import (
    DEFAULT_PRESET,
    Arguments,
    BenchmarkArguments,
    BlindArguments,
    DiagnoseArguments,
    EvaluateArguments,
    ExportArguments,
    ListArguments,
    PlayArguments,
    RecordArguments,
    ReportArguments,
    ResumeArguments,
    RetrainArguments,
    ScoresArguments,
    SweepArguments,
    TrainArguments,
    WeightsArguments,
)
from rem_atari.config import Config, ControllerConfig, EnvConfig
from rem_atari.config.overlay import apply_settings, read_settings
from rem_atari.config.presets import PRESETS
from rem_atari.config.settings import MINARI
from rem_atari.errors import UsageError


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse the command line.

    Args:
        argv: the words after the program's name.
    Raises:
        UsageError: the preset is unknown, or the game is named twice.
        SystemExit: by tyro, which has then said what is wrong (code 2) or shown a command's help (code 0).
    """
    preset = _default_config(argv)
    train, benchmark = TrainArguments(config=preset), BenchmarkArguments(config=preset)
    sweep = SweepArguments(config=preset)
    blind = BlindArguments(env=preset.env)
    retrain = RetrainArguments(run=tyro.MISSING, controller=_controller_of_run(argv))
    commands = (
        Annotated[TrainArguments, tyro.conf.subcommand("train", default=train)]
        | Annotated[ResumeArguments, tyro.conf.subcommand("resume")]
        | Annotated[EvaluateArguments, tyro.conf.subcommand("evaluate")]
        | Annotated[BlindArguments, tyro.conf.subcommand("blind", default=blind)]
        | Annotated[RecordArguments, tyro.conf.subcommand("record")]
        | Annotated[PlayArguments, tyro.conf.subcommand("play")]
        | Annotated[ReportArguments, tyro.conf.subcommand("report")]
        | Annotated[DiagnoseArguments, tyro.conf.subcommand("diagnose")]
        | Annotated[RetrainArguments, tyro.conf.subcommand("retrain", default=retrain)]
        | Annotated[ExportArguments, tyro.conf.subcommand("export")]
        | Annotated[ScoresArguments, tyro.conf.subcommand("scores")]
        | Annotated[SweepArguments, tyro.conf.subcommand("sweep", default=sweep)]
        | Annotated[BenchmarkArguments, tyro.conf.subcommand("benchmark", default=benchmark)]
        | Annotated[WeightsArguments, tyro.conf.subcommand("weights")]
        | Annotated[ListArguments, tyro.conf.subcommand("list")]
    )
    arguments = tyro.cli(commands, prog="rem-atari", args=argv)
    if isinstance(arguments, SweepArguments):
        _check_named_once(argv)
    if isinstance(arguments, TrainArguments | SweepArguments | BenchmarkArguments):
        config = replace(arguments.config, env=_choose_game(arguments.config.env, argv))
        return replace(arguments, config=_anchor_paths(config))
    if isinstance(arguments, BlindArguments):
        return replace(arguments, env=_choose_game(arguments.env, argv))
    return arguments


def _default_config(argv: Sequence[str]) -> Config:
    """What flags override: the preset, with the settings of a file; both are read first for that reason."""
    file = _flag_value(argv, "--config") if argv[:1] in (["train"], ["sweep"], ["benchmark"]) else None
    settings = {} if file is None else read_settings(Path(file))
    name = _flag_value(argv, "--preset") or str(settings.get("preset", DEFAULT_PRESET))
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}."
        raise UsageError(f"there is no preset {name!r}; {hint}")
    try:
        return apply_settings(PRESETS[name], settings | {"preset": name})
    except ValueError as error:
        raise UsageError(f"the settings {file}: {error}") from error


def _controller_of_run(argv: Sequence[str]) -> ControllerConfig:
    """What the flags of `retrain` override: the controller of the run that it names."""
    if argv[:1] != ["retrain"]:
        return ControllerConfig()
    from rem_atari.runs.folder import is_run_folder, open_run_folder  # imports torch

    for word in argv[1:]:
        if is_run_folder(Path(word)):
            return open_run_folder(Path(word)).read_config().config.controller
    return ControllerConfig()


def _check_named_once(argv: Sequence[str]) -> None:
    """A sweep's games and seeds are named by its own flags or by those of a run, not by both."""
    for many, ones in (("--games", ("--env.game", "--env.id")), ("--seeds", ("--seed",))):
        for one in ones:
            if _flag_value(argv, many) is not None and _flag_value(argv, one) is not None:
                raise UsageError(f"{many} and {one} are both given; give one")


def _choose_game(env: EnvConfig, argv: Sequence[str]) -> EnvConfig:
    """A game named on the command line wins over an id that only the preset names."""
    if _flag_value(argv, "--env.game") is None:
        return env
    if _flag_value(argv, "--env.id") is not None and env.id is not None:
        raise UsageError(f"--env.game {env.game} and --env.id {env.id} are two games; give one")
    return replace(env, id=None)


def _anchor_paths(config: Config) -> Config:
    """Absolute paths of files that the run reads, because it may be resumed from another folder."""
    weights, recorded = config.tokenizer.lpips_weights, config.schedule.recorded
    if weights is not None:
        config = replace(config, tokenizer=replace(config.tokenizer, lpips_weights=_absolute(weights)))
    if recorded is not None and not recorded.startswith(MINARI):
        config = replace(config, schedule=replace(config.schedule, recorded=_absolute(recorded)))
    return config


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The last value given to a flag, as ``--flag value`` or ``--flag=value``; None if there is none."""
    value = None
    for word, following in pairwise([*argv, ""]):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value

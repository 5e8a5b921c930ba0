"""The command line as dataclasses: tyro makes flags, help and checks of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro

from rem_atari.config import Config
from rem_atari.errors import UsageError
from rem_atari.presets import PRESETS

DEFAULT_PRESET = "tiny"

Debug = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class TrainArguments:
    """Train an agent on a game, evaluate it, and write a report.

    A preset sets everything and flags override it, so the defaults below are those of the preset named:
    debug (seconds, learns nothing), tiny (the default: a few minutes, a real Atari game), catch (a few
    minutes, learns a toy game) or paper (the published agent: wants a GPU).

    Exit codes: 0 done, 1 failed, 2 wrong use, 3 stopped by a signal.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Path | None = None
    """Folder of the run, not there yet or empty. None: runs/<env>-<preset>-<seed>-<time>."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ReportArguments:
    """Write a run's report.html anew: curves, pictures, and how the networks do on held-out frames."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ListArguments:
    """List the Atari games that can be played."""

    debug: Debug = False
    """Show the traceback of an error."""


Arguments = TrainArguments | ReportArguments | ListArguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """What the command line asks for.

    Args:
        argv: the words after the program's name.
    Raises:
        UsageError: the preset is unknown, or the game is named twice.
        SystemExit: by tyro, which has then said what is wrong (code 2) or shown a command's help (code 0).
    """
    train = TrainArguments(config=PRESETS[_find_preset(argv)])
    commands = (
        Annotated[TrainArguments, tyro.conf.subcommand("train", default=train)]
        | Annotated[ReportArguments, tyro.conf.subcommand("report")]
        | Annotated[ListArguments, tyro.conf.subcommand("list")]
    )
    arguments = tyro.cli(commands, prog="rem-atari", args=argv)
    if isinstance(arguments, TrainArguments):
        return replace(arguments, config=_choose_game(arguments.config, argv))
    return arguments


def _find_preset(argv: Sequence[str]) -> str:
    """The preset named; it must be known before the other flags can be read, for it is their default."""
    name = _flag_value(argv, "--preset") or DEFAULT_PRESET
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}."
        raise UsageError(f"there is no preset {name!r}; {hint}")
    return name


def _choose_game(config: Config, argv: Sequence[str]) -> Config:
    """A game named on the command line wins over an id that only the preset names."""
    if _flag_value(argv, "--env.game") is None:
        return config
    if _flag_value(argv, "--env.id") is not None and config.env.id is not None:
        raise UsageError(f"--env.game {config.env.game} and --env.id {config.env.id} are two games; give one")
    return replace(config, env=replace(config.env, id=None))


def _flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The last value given to a flag, as ``--flag value`` or ``--flag=value``; None if there is none."""
    value = None
    for word, following in pairwise([*argv, ""]):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value

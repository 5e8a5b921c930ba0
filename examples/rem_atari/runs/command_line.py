"""The commands that a run suggests, so that they work where it was started."""

from __future__ import annotations

import shlex
from pathlib import Path

from rem_atari.config import EnvConfig


def program(env: EnvConfig) -> list[str]:
    """The words that start the program for a game.

    A game or a wrapper named as module:Name may be a file in the current folder, which `python -m` searches
    and a console script does not.
    """
    names_a_module = any(":" in name for name in (env.id, env.wrapper) if name is not None)
    return ["python", "-m", "rem_atari"] if names_a_module else ["rem-atari"]


def resume_command(env: EnvConfig, run: Path) -> str:
    """The command line that resumes a run."""
    return shlex.join([*program(env), "resume", str(run)])

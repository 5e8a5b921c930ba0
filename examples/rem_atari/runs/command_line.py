"""The commands that a run suggests, so that they work where it was started."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from rem_atari.config import EnvConfig


def named_modules(env: EnvConfig) -> list[str]:
    """The modules that a game and its wrapper are named by, as module:Name."""
    names = (name.partition(":") for name in (env.id, env.wrapper) if name is not None)
    return [module for module, colon, _ in names if colon]


def command_line(env: EnvConfig, words: Sequence[str]) -> str:
    """The command line that starts the program for a game with `words`.

    A module that the game is named by may lie in the current folder, which `python -m` searches and a console
    script does not, or where PYTHONPATH leads to, which may have been set for one command alone.
    """
    modules = named_modules(env)
    started = shlex.join([*(("python", "-m", "rem_atari") if modules else ("rem-atari",)), *words])
    path = os.environ.get("PYTHONPATH", "")
    if any(_is_found_by(path, module) for module in modules):
        return f"PYTHONPATH={shlex.quote(path)} {started}"
    return started


def resume_command(env: EnvConfig, run: Path) -> str:
    """The command line that resumes a run."""
    return command_line(env, ["resume", str(run)])


def _is_found_by(path: str, module: str) -> bool:
    """Whether a module is found by PYTHONPATH and not in the current folder."""
    package = module.partition(".")[0]
    folders = [folder for folder in path.split(os.pathsep) if folder]
    is_here = PathFinder.find_spec(package, [os.getcwd()]) is not None
    return bool(folders) and not is_here and PathFinder.find_spec(package, folders) is not None

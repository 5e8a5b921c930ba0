"""Catch, but for the faults: an environment that raises, crashes or hangs when it is told to.

It lies here, and not in a test, so that a process of its own can import it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from rem_atari.envs.catch import Catch

FUSES = "REM_ATARI_TEST_FUSES"
"""The environment variable that names the folder of fuses for Faulty-v0."""


def go_wrong(fault: str) -> None:
    """Do what the fault is called."""
    match fault:
        case "raise":
            raise ValueError("the ball is gone")
        case "exit":
            os._exit(5)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(1000)
        case "sleep in C":
            ctypes.PyDLL(None).sleep(1000)  # without giving up the interpreter
        case _:
            raise AssertionError(fault)


class FaultyCatch(Catch):
    """Catch that goes wrong as long as there are fuses.

    Args:
        fuses: a folder; each file in it is good for one fault, and is called like it.
        at: at which of its steps; 0: in `reset`, -1: while it is built.
    """

    def __init__(self, fuses: Path, at: int, *, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self._fuses, self._at, self._steps = fuses, at, 0
        self._blow(-1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self._blow(0)
        self.first_seed = seed
        return super().reset(seed=seed, options=options)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        if self._steps == self._at:
            self._blow(self._at)
        return super().step(action)

    def _blow(self, at: int) -> None:
        if at != self._at:
            return
        for fuse in sorted(self._fuses.iterdir()):
            fuse.unlink()
            go_wrong(fuse.name.split(".")[0])


def lay_fuses(folder: Path, *faults: str) -> Path:
    """A folder of fuses that blow in this order."""
    folder.mkdir()
    for number, fault in enumerate(faults):
        (folder / f"{fault}.{number}").touch()
    return folder


def make_faulty(fuses: Path, at: int) -> FaultyCatch:
    """What a `VectorEnv` may be given."""
    return FaultyCatch(fuses, at)


def make_registered(render_mode: str | None = None) -> FaultyCatch:
    """What gymnasium is given."""
    return FaultyCatch(Path(os.environ[FUSES]), 6, render_mode=render_mode)


gymnasium.register(id="Faulty-v0", entry_point=make_registered)

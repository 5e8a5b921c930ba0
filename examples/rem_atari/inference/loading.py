"""`load_agent`: a trained agent by its name or folder."""

from __future__ import annotations

import warnings
from os import PathLike, fspath
from pathlib import Path

from rem_atari.config import Config
from rem_atari.errors import RunWarning
from rem_atari.inference.agent import LoadedAgent
from rem_atari.replay.starts import Starts, draw_starts
from rem_atari.runs.exported import is_exported, read_exported_starts
from rem_atari.runs.trained import Step, TrainedAgent, read_trained

MOST_STARTS = 256
"""Number of starts drawn from a run's replay."""


def load_agent(
    source: str | PathLike[str], *, checkpoint: Step = "newest", device: str = "cpu"
) -> LoadedAgent:
    """A trained agent, ready to act and to dream.

    Args:
        source: the folder of a run (which may still be training), of one of its checkpoints, or of an
            exported agent; or the name of an agent that comes with the package, such as "catch".
        checkpoint: of a run: a checkpoint's number, "newest", or "best" (kept with `schedule.keep_best`).
        device: torch device: cpu, cuda or mps.

    Raises:
        TypeError: `source` is no path and no name.
        UsageError: there is no such agent or checkpoint, or the device is not there; it is a ValueError.
        CheckpointError: the agent's files are damaged.
    """
    if not isinstance(source, str | PathLike):
        raise TypeError(f"load_agent(): source is {source!r}; wanted a path or a name.")
    trained = read_trained(fspath(source), step=checkpoint, device=device, say=_warn)
    return LoadedAgent(trained, name=fspath(source), load_starts=lambda: load_starts(trained, MOST_STARTS))


def load_starts(trained: TrainedAgent, count: int) -> Starts:
    """Real frames to begin dreams at: those that came with the agent, or `count` from its run's replay.

    Raises:
        UsageError: the run has no replay.
    """
    if is_exported(trained.source):
        return read_exported_starts(trained.source)
    return draw_starts(Path(trained.source) / "replay", count, start_length(trained.config))


def start_length(config: Config) -> int:
    """Frames of a start: the one that a dream begins at, and those that the agent reads before it."""
    return max(config.controller.burn_in, config.controller.context_frames) + 1


def _warn(message: str) -> None:
    warnings.warn(message.removeprefix("warning: "), RunWarning, stacklevel=4)

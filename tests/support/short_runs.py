"""Training runs of about a second: stopped at any point, resumed, and compared bit by bit."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.errors import StoppedError
from rem_atari.replay.buffer import Replay
from rem_atari.runs.checkpoint import Checkpoint, load_checkpoint
from rem_atari.runs.folder import RunFolder, create_run_folder
from rem_atari.runs.metrics import read_metrics
from rem_atari.runs.progress import LineProgress
from rem_atari.training.resume import newest_checkpoint
from rem_atari.training.schedule import plan_run
from rem_atari.training.setup import prepare_training
from rem_atari.training.signals import StopRequest
from rem_atari.training.trainer import Trainer

TIMES = ("seconds", "cpu_seconds", "phase_seconds", "rate", "frames_per_second")

# The tokenizer is to freeze in the second epoch.
SHORT = replace(
    PRESETS["debug"],
    tokenizer=replace(PRESETS["debug"].tokenizer, freeze_foreground_error=10.0),
)


class Point(NamedTuple):
    """A moment of a run: so many units of a phase of an epoch (from 0) are done."""

    epoch: int
    phase: str
    done: int


class SpyProgress(LineProgress):
    """Tells a stop where the run is."""

    def __init__(self, config: Config, stream: io.StringIO) -> None:
        super().__init__(plan_run(config), config.schedule.epochs, stream)
        self.epoch = 0

    def phase(self, epoch: int, phase: str, units: int, *, done: int = 0):
        self.epoch = epoch
        return super().phase(epoch, phase, units, done=done)

    @property
    def point(self) -> Point:
        return Point(self.epoch, self._phase, self._done)


class StopAt(StopRequest):
    """Does at one point of the run what a signal does, or whatever else is asked for."""

    def __init__(self, progress: SpyProgress, point: Point | None, act: Callable[[], None]) -> None:
        super().__init__()
        self._progress, self._point, self._act = progress, point, act

    def check(self) -> None:
        now = self._progress.point
        if self._point is not None and now[:2] == self._point[:2] and now.done >= self._point.done:
            self._act()


def stop() -> None:
    raise StoppedError("stopped by a test")


@dataclass
class Outcome:
    """How a run, or a part of one, ended."""

    trainer: Trainer
    stopped: bool
    shown: str


def run_part(
    folder: Path,
    config: Config = SHORT,
    *,
    until: Point | None = None,
    resume: bool = False,
    act: Callable[[], None] = stop,
) -> Outcome:
    """Train in `folder` to the end or a point; `resume`: go on with what is there, as the command does."""
    run = RunFolder(folder) if resume else create_run_folder(folder, config)
    shown = io.StringIO()
    progress = SpyProgress(config, shown)
    with prepare_training(config) as parts:
        checkpoint = newest_checkpoint(run, progress.say) if resume else None
        trainer = Trainer(config, run, parts, progress, StopAt(progress, until, act), checkpoint)
        try:
            trainer.run()
        except StoppedError:
            return Outcome(trainer, True, shown.getvalue())
        return Outcome(trainer, False, shown.getvalue())


def newest(folder: Path) -> Checkpoint:
    return load_checkpoint(folder / "checkpoints")


def fingerprint(folder: Path) -> dict[str, Any]:
    """All that a run's newest checkpoint holds, hashed by part; neither times nor how the replay is cut up.

    Weights, optimisers, random numbers, environments, memory, tokens, counters, experience and metrics.
    """
    checkpoint = newest(folder)
    state = {
        name: value
        for name, value in checkpoint.state.items()
        if name not in ("pace", "seconds", "cpu_seconds", "shards", "notes")
    }
    state["collection"] = state["collection"] | {"seconds": 0}
    state["turn"] = state["turn"] | {"seconds": 0}
    replay = Replay.load(folder / "replay")
    # Everything drawn from it depends on every link, and the random numbers are the checkpoint's.
    replay.set_sampling_state(checkpoint.state["random"]["replay"])
    return {
        "step": checkpoint.step,
        "model": hash_tensors(checkpoint.model),
        "optimizer": hash_tensors(checkpoint.optimizer),
        **{name: hash_tensors({name: tensor}) for name, tensor in checkpoint.training.items()},
        **{f"state/{name}": value for name, value in state.items()},
        "experience": hash_replay(replay),
        "metrics": measured(folder),
    }


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def hash_replay(replay: Replay) -> str:
    digest = hashlib.sha256()
    rows = replay.num_steps
    for column in replay._rows.columns().values():
        digest.update(column[:rows].tobytes())
    episodes = replay._episodes
    for links in (episodes._before, episodes._after, episodes._place):
        digest.update(links[:rows].tobytes())
    digest.update(json.dumps(sorted(episodes._open.items())).encode())
    return digest.hexdigest()


def measured(folder: Path) -> list[dict[str, Any]]:
    """A run's lines of metrics without the times."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]

"""Resumption: find the checkpoint at which a run stopped, and restore its files to that point."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rem_atari.config import Config
from rem_atari.replay.buffer import Replay
from rem_atari.replay.recovery import recover_shards
from rem_atari.replay.shards import ShardEntry
from rem_atari.runs.checkpoint import (
    REPLAY_FOLDER,
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    set_aside_newer,
)
from rem_atari.runs.folder import RunFolder
from rem_atari.training.schedule import replay_capacity
from rem_atari.training.seeding import derive_seed


def newest_checkpoint(run: RunFolder, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint from which a run continues; None if it was stopped before its first one.

    Args:
        run: the run's folder.
        say: called for every damaged checkpoint that is skipped.
    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    if not list_checkpoints(run.checkpoints):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = load_checkpoint(run.checkpoints)
    for warning in caught:
        say(f"warning: {warning.message}")
    return checkpoint


def epochs_complete(checkpoint: Checkpoint | None) -> int:
    """The number of complete epochs in a checkpoint.

    Raises:
        CheckpointError: it says nothing of the kind.
    """
    epoch = 0 if checkpoint is None else checkpoint.state.get("epoch")
    if type(epoch) is not int:
        raise CheckpointError(f"the checkpoint's epoch is {epoch!r}, wanted an integer")
    return epoch


def reopen_replay(
    config: Config, run: RunFolder, checkpoint: Checkpoint | None, say: Callable[[str], None]
) -> tuple[Replay, list[str]]:
    """A run's replay as it was at a checkpoint; what was written later is deleted, or set aside if damaged.

    Args:
        config: the run's configuration.
        run: its folder.
        checkpoint: the checkpoint to continue from; None: the run's beginning.
        say: called with what was set aside.
    Returns:
        The replay, and a sentence on each shard that was not whole.
    Raises:
        CheckpointError: what it says of the replay makes no sense.
        RunError: the replay, or what it is to take in, cannot be read.
        OSError: it cannot be written.
    """
    step = -1 if checkpoint is None else checkpoint.step
    for path in set_aside_newer(run.checkpoints, step):
        say(f"warning: the damaged checkpoint is now called {path}")
    side = config.env.frame_size
    shape = (side, side, 3)
    copies = None if checkpoint is None else run.checkpoints / f"step-{step:08d}" / REPLAY_FOLDER
    try:
        entries = [] if checkpoint is None else [ShardEntry(**entry) for entry in checkpoint.state["shards"]]
        entries, notes = recover_shards(run.replay, entries, frame_shape=shape, copies=copies)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {step} does not describe its replay: {error}") from error
    # Recorded episodes are read once; a run that has them in its replay goes on without their files.
    is_whole = config.schedule.recorded is not None and bool(entries)
    replay = Replay.load(
        run.replay,
        frame_shape=shape,
        capacity=None if is_whole else replay_capacity(config),
        seed=derive_seed(config.seed, "replay"),
        entries=entries,
    )
    return replay, notes


@dataclass(frozen=True)
class LogState:
    """A checkpoint's entries about progress and logs.

    Attributes:
        metric_lines: lines of metrics written before it.
        seconds: wall time of the run so far.
        cpu_seconds: how much time of processors; 0 in checkpoints of earlier versions, which do not say.
        pace: seconds a unit of each phase.
        machine: what it was made on, see `describe_machine`.
    """

    metric_lines: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    pace: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint | None) -> LogState:
        """What `checkpoint` says; None: that of a new run.

        Raises:
            CheckpointError: it says nothing of the kind.
        """
        if checkpoint is None:
            return cls()
        state = checkpoint.state
        try:
            return cls(
                metric_lines=max(int(state["metric_lines"]), 0),
                seconds=float(state["seconds"]),
                cpu_seconds=float(state.get("cpu_seconds", 0.0)),
                pace={str(phase): float(pace) for phase, pace in state["pace"].items()},
                machine=dict(state["machine"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.step} does not say what was logged: {error}"
            ) from error


def describe_machine(device: str) -> dict[str, Any]:
    """The properties of a machine that may change the last bits of a run's numbers."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else device,
    }


def explain_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """A sentence on how two machines differ, `then` a checkpoint's; None if they do not."""
    changed = [
        f"{name} {then.get(name)!r}, now {value!r}" for name, value in now.items() if then.get(name) != value
    ]
    if not changed:
        return None
    return (
        f"note: the run was saved with {'; '.join(changed)}: what follows may differ in the last bits from"
        " what it would have been"
    )

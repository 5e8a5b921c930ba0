"""A trained agent from the folder of its run. The run may still be training: nothing is locked or changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.errors import UsageError
from rem_atari.runs.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_best,
    list_checkpoints,
    load_checkpoint,
    not_finite,
    read_checkpoint,
)
from rem_atari.runs.folder import RunFolder, open_run_folder
from rem_atari.training.setup import check_device, set_threads

ATTEMPTS = 3
"""A training may delete the checkpoint that is being read; there is a newer one then."""


@dataclass(frozen=True, kw_only=True)
class TrainedAgent:
    """An agent as a checkpoint holds it.

    Attributes:
        run: the folder of its run.
        config: the run's configuration, with the device that the agent is on.
        agent: in eval mode.
        step: the checkpoint's number.
        state: what the trainer noted beside the weights.
    """

    run: RunFolder
    config: Config
    agent: Agent
    step: int
    state: Mapping[str, Any]

    @property
    def epoch(self) -> int | None:
        """Epochs complete, as far as the checkpoint tells."""
        return _count(self.state.get("epoch"))

    @property
    def env_steps(self) -> int | None:
        """Environment steps collected, as far as the checkpoint tells."""
        return _count(self.state.get("env_steps"))


def load_trained(
    path: Path,
    *,
    step: int | Literal["newest", "best"],
    device: str | None,
    say: Callable[[str], None],
) -> TrainedAgent:
    """Open a run's folder and build its agent. Sets torch's thread count to the run's.

    Args:
        path: the run's folder.
        step: number of the checkpoint, the newest whole one, or the one kept as the best.
        device: where the agent goes; None: where it was trained.
        say: told of every damaged checkpoint that is passed over.

    Raises:
        UsageError: this is no run folder, it has no such checkpoint, or the device is not there.
        CheckpointError: there is no whole checkpoint, or it does not fit the configuration.
    """
    run = open_run_folder(path)
    config = run.load_config()
    config = replace(config, device=config.device if device is None else device)
    check_device(config.device)
    set_threads(config)
    checkpoint = _find_checkpoint(run, step, say)
    agent = build_agent(config, checkpoint).to(config.device)
    return TrainedAgent(run=run, config=config, agent=agent, step=checkpoint.step, state=checkpoint.state)


def _find_checkpoint(
    run: RunFolder, step: int | Literal["newest", "best"], say: Callable[[str], None]
) -> Checkpoint:
    if step == "newest":
        return _load_newest(run, say)
    if step == "best":
        best = find_best(run.checkpoints)
        if best is None:
            raise UsageError(
                f"{run.path} has kept no best checkpoint; training does with --schedule.keep-best"
            )
        return read_checkpoint(best[1], best[0])
    known = dict(list_checkpoints(run.checkpoints))
    if step not in known:
        there = ", ".join(map(str, known)) or "none"
        raise UsageError(f"{run.checkpoints} holds no checkpoint {step}; there are: {there}")
    return read_checkpoint(known[step], step)


def _load_newest(run: RunFolder, say: Callable[[str], None]) -> Checkpoint:
    if not list_checkpoints(run.checkpoints):
        raise CheckpointError(f"{run.path} has no checkpoint yet: nothing has been saved in it so far")
    for attempt in range(ATTEMPTS):
        before = list_checkpoints(run.checkpoints)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RuntimeWarning)
                checkpoint = load_checkpoint(run.checkpoints)
        except CheckpointError:
            if attempt + 1 == ATTEMPTS or list_checkpoints(run.checkpoints) == before:
                raise
            continue
        for warning in caught:
            say(f"warning: {warning.message}")
        return checkpoint
    raise AssertionError("the last attempt returns or raises")


def build_agent(config: Config, checkpoint: Checkpoint) -> Agent:
    """The agent with a checkpoint's weights, on the CPU and in eval mode.

    The number of actions is read off the weights.

    Raises:
        CheckpointError: they do not fit the configuration.
    """
    weights: dict[str, Tensor] = dict(checkpoint.model)
    broken = not_finite(weights)
    if broken is not None:
        raise CheckpointError(f"the weights of checkpoint {checkpoint.step} are not finite: {broken}")
    try:
        agent = Agent.from_config(config, num_actions=weights["controller.actor.weight"].shape[0])
        agent.load_state_dict(weights)
    except (
        KeyError,
        RuntimeError,
        ValueError,
    ) as error:  # load_state_dict lists every name that does not fit
        raise CheckpointError(f"checkpoint {checkpoint.step} does not fit the run's configuration") from error
    return agent.eval()


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None

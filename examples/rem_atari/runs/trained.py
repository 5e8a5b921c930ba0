"""Trained agents in a run, a checkpoint, an exported folder, or this package.

A run may still be training: nothing is locked or changed.
"""

from __future__ import annotations

import re
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
    MANIFEST_FILE,
    Checkpoint,
    CheckpointError,
    find_best,
    list_checkpoints,
    load_checkpoint,
    not_finite,
    read_checkpoint,
)
from rem_atari.runs.config_file import parse_config
from rem_atari.runs.exported import find_exported_metrics, is_exported, read_exported
from rem_atari.runs.folder import RunFolder, open_run_folder, without_links
from rem_atari.training.setup import check_device, set_threads

ATTEMPTS = 3
"""Attempts to read: training may delete the checkpoint that is being read; then there is a newer one."""

BUNDLED = Path(__file__).parent.parent / "bundled"
"""Agents that come with the package, an exported folder each."""

Step = int | Literal["newest", "best"]


@dataclass(frozen=True, kw_only=True)
class TrainedAgent:
    """An agent as a checkpoint holds it.

    Attributes:
        run: the folder of its run, or the one that stands in for it: where results about it belong.
        source: the folder that it was read from.
        config: the run's configuration, with the device that the agent is on.
        agent: in eval mode.
        step: the checkpoint's number.
        state: what the trainer noted beside the weights.
    """

    run: RunFolder
    source: Path
    config: Config
    agent: Agent
    step: int
    state: Mapping[str, Any]

    @property
    def metrics(self) -> Path | None:
        """What its run measured, one JSON object a line; None if there is none.

        Raises:
            CheckpointError: the file of an exported agent is missing, cut short or altered.
        """
        if is_exported(self.source):
            return find_exported_metrics(self.source)
        return self.run.metrics if self.run.metrics.is_file() else None

    @property
    def epoch(self) -> int | None:
        """Epochs complete, as far as the checkpoint tells."""
        return _count(self.state.get("epoch"))

    @property
    def env_steps(self) -> int | None:
        """Environment steps collected, as far as the checkpoint tells."""
        return _count(self.state.get("env_steps"))

    @property
    def action_names(self) -> tuple[str, ...]:
        """The game's names of its actions, or "action 0" and so on where none were noted."""
        count = self.agent.controller.num_actions
        names = self.state.get("action_names")
        if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
            return tuple(names)
        return tuple(f"action {number}" for number in range(count))

    @property
    def sees(self) -> str | None:
        """What the frames show, as far as the checkpoint tells."""
        sees = self.state.get("sees")
        return sees if isinstance(sees, str) else None


def load_trained(
    path: Path | str,
    *,
    step: Step,
    device: str | None,
    say: Callable[[str], None],
) -> TrainedAgent:
    """`read_trained`, which see; also sets torch's thread count to the run's."""
    trained = read_trained(path, step=step, device=device, say=say)
    set_threads(trained.config)
    return trained


def read_trained(
    path: Path | str,
    *,
    step: Step,
    device: str | None,
    say: Callable[[str], None],
) -> TrainedAgent:
    """Find an agent and build it.

    Args:
        path: the folder of a run, of one of its checkpoints or of an exported agent, or else the name of an
            agent that comes with the package.
        step: of a run: number of the checkpoint, the newest whole one, or the one kept as the best.
        device: where the agent goes; None: where it was trained.
        say: called for every damaged checkpoint that is skipped.

    Raises:
        UsageError: there is no such agent, the run has no such checkpoint, or the device is not there.
        CheckpointError: there is no whole checkpoint, or it does not fit the configuration.
    """
    run, source, config, checkpoint = _find(path, step, say)
    config = replace(config, device=config.device if device is None else device)
    check_device(config.device)
    agent = build_agent(config, checkpoint).to(config.device)
    return TrainedAgent(
        run=run, source=source, config=config, agent=agent, step=checkpoint.step, state=checkpoint.state
    )


def list_bundled() -> list[str]:
    """Names of the agents that come with the package."""
    return sorted(path.name for path in BUNDLED.iterdir() if is_exported(path)) if BUNDLED.is_dir() else []


def _find(
    path: Path | str, step: Step, say: Callable[[str], None]
) -> tuple[RunFolder, Path, Config, Checkpoint]:
    """The run's folder, the agent's folder, the configuration and the checkpoint."""
    folder = Path(path)
    if not folder.exists():
        if str(path) not in list_bundled():
            raise UsageError(_unknown(path))
        results = RunFolder(Path("runs") / "bundled" / folder)
        return (results, BUNDLED / folder, *read_exported(BUNDLED / folder))
    if is_exported(folder):
        return (without_links(RunFolder(folder)), folder, *read_exported(folder))
    if (folder / MANIFEST_FILE).is_file():
        return (RunFolder(folder.resolve().parent.parent), folder, *_read_one(folder))
    run = open_run_folder(folder)
    return run, run.path, run.load_config(), _find_checkpoint(run, step, say)


def _unknown(path: Path | str) -> str:
    there = ", ".join(list_bundled()) or "none"
    return (
        f"there is no agent {str(path)!r}: wanted the folder of a run, of a checkpoint or of an exported"
        f" agent, or the name of one that comes with the package ({there})"
    )


def _read_one(folder: Path) -> tuple[Config, Checkpoint]:
    """A checkpoint by its own folder, with the configuration that it holds a copy of."""
    number = re.search(r"-([0-9]{1,18})$", folder.resolve().name)
    checkpoint = read_checkpoint(folder, int(number[1]) if number else 0)
    if checkpoint.config is None:
        raise UsageError(f"{folder} holds no configuration; name the folder of its run")
    return parse_config(checkpoint.config, folder), checkpoint


def _find_checkpoint(run: RunFolder, step: Step, say: Callable[[str], None]) -> Checkpoint:
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

    The number of actions is read from the weights.

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

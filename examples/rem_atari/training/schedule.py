"""The schedule of a run's epochs as plain numbers, computed in advance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rem_atari.config import Config, OptimConfig

UNITS = {
    "random": "episodes",
    "collect_random": "steps",
    "collect": "steps",
    "tokenizer": "updates",
    "world_model": "updates",
    "controller": "updates",
    "evaluate": "episodes",
}
"""The unit that each phase counts, which is also the name of a metric."""


@dataclass(frozen=True)
class Work:
    """A phase of one epoch.

    Attributes:
        epoch: the epoch, from 0.
        phase: name of the phase.
        units: its amount of work, in `UNITS`.
        max_seconds: bound on its wall time, or None.
    """

    epoch: int
    phase: str
    units: int
    max_seconds: float | None


def updates_in_epoch(optim: OptimConfig, epoch: int, *, first: bool) -> int:
    """Updates that a component makes in an epoch; `first`: it has not trained before."""
    if epoch < optim.start_epoch:
        return 0
    if first and optim.first_updates is not None:
        return optim.first_updates
    return optim.updates_per_epoch


def steps_before(config: Config) -> int:
    """Environment steps before the first epoch: random ones, or the recorded ones in place of all others.

    Raises:
        UsageError: the recorded ones cannot be read.
    """
    # Imported here because it needs the environments' packages, and most callers that plan do not.
    from rem_atari.replay.recorded import count_recorded

    recorded = config.schedule.recorded
    return config.schedule.random_steps if recorded is None else count_recorded(recorded)


def steps_in_epoch(config: Config, epoch: int) -> int:
    """Environment steps collected in an epoch, those before the first epoch not counted."""
    collects = config.schedule.recorded is None and epoch < config.schedule.collect_epochs
    return config.schedule.steps_per_epoch if collects else 0


def replay_capacity(config: Config) -> int:
    """Environment steps that a run can collect; each collection steps all environments equally often.

    Raises:
        UsageError: recorded episodes cannot be read.
    """
    if config.schedule.recorded is not None:
        return steps_before(config)
    num_envs, schedule = config.env.num_envs, config.schedule
    parts = [schedule.random_steps] + [steps_in_epoch(config, epoch) for epoch in range(schedule.epochs)]
    return sum(math.ceil(steps / num_envs) * num_envs for steps in parts)


def evaluation_episodes(config: Config, epoch: int) -> int:
    """Episodes evaluated after an epoch; 0: none."""
    if epoch == config.schedule.epochs - 1:
        return config.evaluation.final_episodes
    every = config.evaluation.every
    return config.evaluation.episodes if every > 0 and (epoch + 1) % every == 0 else 0


def plan_run(config: Config) -> list[Work]:
    """All phases of a run in order, as planned; a tokenizer that freezes may skip some.

    Reading recorded episodes is left out, because it takes almost no time.
    """
    schedule, evaluation = config.schedule, config.evaluation
    random_steps = schedule.random_steps if schedule.recorded is None else 0
    work = [
        Work(0, "random", evaluation.random_episodes, evaluation.max_seconds),
        Work(0, "collect_random", random_steps, schedule.collect_max_seconds),
    ]
    components = {
        "tokenizer": config.tokenizer.optim,
        "world_model": config.world_model.optim,
        "controller": config.controller.optim,
    }
    if config.tokenizer.kind == "patches":
        del components["tokenizer"]  # which never trains
    for epoch in range(schedule.epochs):
        work.append(Work(epoch, "collect", steps_in_epoch(config, epoch), schedule.collect_max_seconds))
        for phase, optim in components.items():
            units = updates_in_epoch(optim, epoch, first=epoch == optim.start_epoch)
            work.append(Work(epoch, phase, units, optim.max_seconds))
        work.append(Work(epoch, "evaluate", evaluation_episodes(config, epoch), evaluation.max_seconds))
    return [part for part in work if part.units > 0]

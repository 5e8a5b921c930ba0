"""From a configuration to the parts of a training run, with everything checked before any of it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce

import torch

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.envs import make_env
from rem_atari.envs.vector import VectorEnv
from rem_atari.errors import UsageError
from rem_atari.training.seeding import derive_seed

SMALLEST: dict[str, float] = {
    "seed": 0,
    "threads": 0,
    "env.num_envs": 1,
    "controller.burn_in": 0,
    "controller.min_real_frames": 1,
    "controller.epsilon": 0,
    "schedule.epochs": 1,
    "schedule.steps_per_epoch": 1,
    "schedule.collect_epochs": 1,
    "schedule.random_steps": 0,
    "schedule.checkpoint_every": 1,
    "schedule.keep_checkpoints": 1,
    "evaluation.every": 0,
    "evaluation.episodes": 1,
    "evaluation.final_episodes": 1,
    "evaluation.num_envs": 1,
    "evaluation.random_episodes": 0,
    "evaluation.heldout_steps": 0,
} | {
    f"{component}.optim.{name}": smallest
    for component in ("tokenizer", "world_model", "controller")
    for name, smallest in (
        ("lr", 0),
        ("weight_decay", 0),
        ("clip_norm", 0),
        ("batch_size", 1),
        ("updates_per_epoch", 0),
        ("start_epoch", 0),
    )
}
"""Smallest values allowed, by the field's dotted path."""

ABOVE_ZERO = ("controller.temperature", "evaluation.temperature")


@dataclass(frozen=True)
class TrainingParts:
    """What a run is made of before it starts.

    Attributes:
        envs: the environments that collect experience.
        agent: with fresh weights, on the configured device.
    """

    envs: VectorEnv
    agent: Agent


@contextmanager
def prepare_training(config: Config) -> Iterator[TrainingParts]:
    """Check a configuration and build a run's parts; the environments are closed at the end.

    Sets torch's thread count and its global seed, from which the weights and dropout are drawn.

    Raises:
        UsageError: a value is out of its range, values do not fit each other, or the game is unknown.
    """
    check_config(config)
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    torch.manual_seed(derive_seed(config.seed, "torch"))
    try:
        make = partial(make_env, config.env, training=True)
        envs = VectorEnv(make, config.env.num_envs, seed=derive_seed(config.seed, "environments"))
        agent = Agent.from_config(config, envs.num_actions).to(config.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        yield TrainingParts(envs, agent)
    finally:
        envs.close()


def check_config(config: Config) -> None:
    """Check what no part checks for itself.

    Raises:
        UsageError: a value is out of its range, or asks for what this machine or version does not have.
    """
    for path, smallest in SMALLEST.items():
        if _value(config, path) < smallest:
            raise UsageError(f"{path} is {_value(config, path)}, wanted at least {smallest}")
    for path in ABOVE_ZERO:
        if _value(config, path) <= 0:
            raise UsageError(f"{path} is {_value(config, path)}, wanted more than 0")
    if config.controller.min_real_frames > config.controller.burn_in + 1:
        raise UsageError(
            f"controller.min_real_frames is {config.controller.min_real_frames}, but a segment has only"
            f" controller.burn_in + 1 = {config.controller.burn_in + 1} frames"
        )
    if config.tokenizer.perceptual_weight > 0:
        raise UsageError(
            "the perceptual loss (LPIPS) is not available yet;"
            " --tokenizer.perceptual-weight 0 trains without it"
        )
    _check_device(config.device)


def _value(config: Config, path: str) -> float:
    return reduce(getattr, path.split("."), config)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {name!r} cannot be used: {error}") from error

"""The parts of a training run from its configuration, which is checked before anything starts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial

import numpy as np
import torch

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.envs import make_env
from rem_atari.envs.vector import VectorEnv
from rem_atari.errors import UsageError
from rem_atari.models.lpips import Lpips
from rem_atari.training.seeding import derive_seed
from rem_atari.weights import find_weights, load_perceptual

AT_LEAST_ONE = (
    "env.frame_size",
    "env.frame_skip",
    "env.noop_max",
    "env.max_raw_frames",
    "env.eval_max_raw_frames",
    "env.action_repeat",
    "env.num_envs",
    "tokenizer.channels",
    "tokenizer.codebook_size",
    "tokenizer.code_dim",
    "tokenizer.groups",
    "world_model.embed_dim",
    "world_model.num_layers",
    "world_model.num_heads",
    "world_model.ffn_dim",
    "world_model.sequence_blocks",
    "controller.channels",
    "controller.hidden_dim",
    "controller.lstm_dim",
    "controller.min_real_frames",
    "controller.reward_start_steps",
    "controller.uses",
    "controller.minibatches",
    "controller.random_repeat",
    "schedule.epochs",
    "schedule.collect_epochs",
    "schedule.steps_per_epoch",
    "schedule.checkpoint_every",
    "schedule.keep_checkpoints",
    "evaluation.episodes",
    "evaluation.final_episodes",
    "evaluation.num_envs",
    "evaluation.max_steps",
    *(
        f"{component}.optim.{name}"
        for component in ("tokenizer", "world_model", "controller")
        for name in ("batch_size", "first_updates")
    ),
)

SMALLEST = dict.fromkeys(AT_LEAST_ONE, 1) | {
    "controller.horizon": 2,
    "tokenizer.fsq_levels": 3,
    "world_model.refine_passes": 2,
}
"""Smallest values allowed, by the field's dotted path; of a number that is not listed it is 0."""

ABOVE_ZERO = ("controller.temperature", "env.timeout_seconds")

MOST_THREADS = 1024
"""Most CPU threads: torch does not check the number and crashes with too many."""

AT_MOST_ONE = (
    "controller.gamma",
    "controller.td_lambda",
    "controller.epsilon",
    "controller.reward_start_share",
    "controller.clip_ratio",
    "world_model.priority_share",
    "env.minatar.sticky_actions",
)


@dataclass(frozen=True)
class TrainingParts:
    """The parts of a run before it starts.

    Attributes:
        envs: the environments that collect experience.
        agent: with fresh weights, on the configured device.
        perceptual: the network of the tokenizer's perceptual loss; None where it trains without.
    """

    envs: VectorEnv
    agent: Agent
    perceptual: Lpips | None


@contextmanager
def prepare_training(config: Config) -> Iterator[TrainingParts]:
    """Check a configuration and build a run's parts; the environments are closed at the end.

    Sets torch's thread count and the global seeds: torch's, from which the weights and dropout are drawn, and
    numpy's and Python's, which nothing here draws from, but an environment might.

    Raises:
        UsageError: a value is out of its range, values do not fit each other, or the game is unknown.
    """
    check_config(config)
    perceptual = load_perceptual(config.tokenizer, config.device)
    set_threads(config)
    torch.manual_seed(derive_seed(config.seed, "torch"))
    np.random.seed(derive_seed(config.seed, "numpy") % 2**32)
    random.seed(derive_seed(config.seed, "python"))
    try:
        make = partial(make_env, config.env, training=True)
        envs = VectorEnv(
            make,
            config.env.num_envs,
            seed=derive_seed(config.seed, "environments"),
            processes=config.env.processes,
            timeout=config.env.timeout_seconds,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    with closing(envs):
        yield TrainingParts(envs, _build_agent(config, envs.num_actions), perceptual)


def set_threads(config: Config) -> None:
    """Give torch as many threads as the configuration says; 0 leaves torch's own choice.

    Raises:
        UsageError: they are more than `MOST_THREADS`.
    """
    _check_number("threads", config.threads)
    if config.threads > 0:
        torch.set_num_threads(config.threads)


def _build_agent(config: Config, num_actions: int) -> Agent:
    """The agent on its device; sizes that do not fit each other raise UsageError."""
    try:
        agent = Agent.from_config(config, num_actions).to(config.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if config.compile:
        agent.compile_networks()
    return agent


def check_config(config: Config) -> None:
    """Check the settings that no part checks itself.

    Raises:
        UsageError: a value is out of range, or needs what this machine or version does not have.
    """
    for path, number in _numbers(config):
        _check_number(path, number)
    if not config.tokenizer.channels:
        raise UsageError("tokenizer.channels is empty, wanted at least one number")
    if config.controller.min_real_frames > config.controller.burn_in + 1:
        raise UsageError(
            f"controller.min_real_frames is {config.controller.min_real_frames}, but a segment has only"
            f" controller.burn_in + 1 = {config.controller.burn_in + 1} frames"
        )
    if config.controller.context_frames > max(config.controller.burn_in, 1):
        raise UsageError(
            f"controller.context_frames is {config.controller.context_frames}, wanted at most"
            f" controller.burn_in, which is {config.controller.burn_in}"
        )
    if config.controller.minibatches > config.controller.optim.batch_size:
        raise UsageError(
            f"controller.minibatches is {config.controller.minibatches}, wanted at most"
            f" controller.optim.batch_size, which is {config.controller.optim.batch_size}"
        )
    for component in ("tokenizer", "world_model", "controller"):
        average = getattr(config, component).optim.average
        if average >= 1:
            raise UsageError(f"{component}.optim.average is {average}, wanted less than 1")
    if config.world_model.event_share >= 1:
        raise UsageError(f"world_model.event_share is {config.world_model.event_share}, wanted less than 1")
    check_device(config.device)
    find_weights(config.tokenizer)


def _numbers(part: object, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted path and value of every number in a configuration; the numbers of a tuple share its path."""
    for field in fields(part):  # type: ignore[arg-type]
        path, value = f"{prefix}{field.name}", getattr(part, field.name)
        if is_dataclass(value):
            yield from _numbers(value, f"{path}.")
        else:
            entries = value if isinstance(value, tuple) else (value,)
            yield from ((path, entry) for entry in entries if isinstance(entry, int | float))


def _check_number(path: str, number: float) -> None:
    smallest = SMALLEST.get(path, 0)
    if not math.isfinite(number):
        wanted = "a finite number"
    elif path in ABOVE_ZERO and number <= 0:
        wanted = "more than 0"
    elif number < smallest:
        wanted = f"at least {smallest}"
    elif path in AT_MOST_ONE and number > 1:
        wanted = "at most 1"
    elif path == "threads" and number > MOST_THREADS:
        wanted = f"at most {MOST_THREADS}"
    else:
        return
    raise UsageError(f"{path} is {number}, wanted {wanted}")


def check_device(name: str) -> None:
    """Check that torch can use the device.

    Raises:
        UsageError: it is of an unsupported kind, or missing.
    """
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "mps"):
        raise UsageError(f"the device {name!r} cannot be used; wanted cpu, cuda or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        # torch's own message is a page long.
        raise UsageError(f"the device {name!r} cannot be used: torch finds no such GPU on this machine")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        # torch's message has paragraphs of advice after its first sentence.
        reason = str(error).splitlines()[0]
        raise UsageError(f"the device {name!r} cannot be used: {reason}") from error

"""The one loop in which the controller acts, in the real game and in imagination alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rem_atari.models.controller import Carry, Controller, reset_carry
from rem_atari.models.sampling import sample_categorical


@dataclass(frozen=True)
class TokenStep:
    """The answers of B environments to one action each.

    Attributes:
        seen: the observations to act on next, as the controller sees them (`Agent.show`: codes (B, K, E)
            unless it is in pixel space); already the new episode's first where `restarted`.
        rewards: rewards of the actions, (B,) float32.
        ended: episodes that ended by themselves, (B,) bool; the value after them is 0.
        truncated: episodes cut short from outside, (B,) bool.
        restarted: rows whose `seen` begins a new episode, (B,) bool. A real environment restarts what ended
            or was truncated; an imagined one never restarts.
        bonus: what the environment pays for curiosity besides, (B,) float32. None: nothing.
    """

    seen: Tensor
    rewards: Tensor
    ended: Tensor
    truncated: Tensor
    restarted: Tensor
    bonus: Tensor | None = None


class TokenEnv(Protocol):
    """B environments side by side that a controller can act in: the real game, or the world model."""

    @property
    def num_actions(self) -> int:
        """Number of actions A; an action is an integer in [0, A)."""
        ...

    def step(self, actions: Tensor) -> TokenStep:
        """Take one step in every environment; `actions` (B,) int64."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """T steps in each of B environments.

    Attributes:
        seen: the observations acted on, as the controller sees them, (B, T, ...).
        logits: the policy's logits before temperature and ε, (B, T, A).
        values: the critic's values of the observations acted on, (B, T).
        actions: the actions taken, (B, T) int64.
        rewards: their rewards, (B, T) float32.
        ended: (B, T) bool, the step ended its episode.
        truncated: (B, T) bool, the step's episode was cut short after it.
        bonus: what was paid for curiosity besides the rewards, (B, T) float32. None: nothing.
    """

    seen: Tensor
    logits: Tensor
    values: Tensor
    actions: Tensor
    rewards: Tensor
    ended: Tensor
    truncated: Tensor
    bonus: Tensor | None = None


def choose_actions(logits: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> Tensor:
    """Sample from each row of `logits` (B, A); at temperature 0 take the most likely action; (B,) int64."""
    return sample_categorical(logits, generator, temperature=temperature)


def rollout(
    env: TokenEnv,
    controller: Controller,
    carry: Carry,
    observation: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    explore: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator,
) -> tuple[Trajectory, Carry, Tensor]:
    """Let the controller act for `steps` steps in B environments.

    In each step the controller sees the observation, an action is drawn, the controller sees the action that
    is *taken* (with exploration perhaps not its policy's), and the environment steps. Where an episode
    restarts, the controller's memory starts anew.

    Gradients flow through the controller if they are enabled. Training does not need them: it evaluates all
    steps of a trajectory at once afterwards (`Controller.judge`).

    Args:
        env: B environments.
        controller: the acting controller; the caller sets its mode (train or eval).
        carry: the controller's memory of what came before; `Controller.initial_carry` at the start.
        observation: what to act on first, as `TokenStep.seen`.
        steps: steps to take, at least 1.
        temperature: temperature of the actions.
        explore: turns the actions drawn, (B,) int64, into those that are taken; None: they are taken.
        generator: source of the actions' randomness, on the controller's device.

    Returns:
        The trajectory, and the carry and the observation to go on from.

    Raises:
        ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"rollout(): steps is {steps}; it must be at least 1.")
    seen, logits, values, taken, answers = [], [], [], [], []
    for _ in range(steps):
        decision = controller(observation, carry)
        actions = choose_actions(decision.logits, generator, temperature=temperature)
        if explore is not None:
            actions = explore(actions)
        carry = controller.observe_action(actions, decision.carry)
        answer = env.step(actions)
        carry = reset_carry(carry, answer.restarted)
        seen.append(observation)
        observation = answer.seen
        logits.append(decision.logits)
        values.append(decision.value)
        taken.append(actions)
        answers.append(answer)
    bonuses = [answer.bonus for answer in answers if answer.bonus is not None]
    trajectory = Trajectory(
        seen=torch.stack(seen, dim=1),
        logits=torch.stack(logits, dim=1),
        values=torch.stack(values, dim=1),
        actions=torch.stack(taken, dim=1),
        rewards=torch.stack([answer.rewards for answer in answers], dim=1),
        ended=torch.stack([answer.ended for answer in answers], dim=1),
        truncated=torch.stack([answer.truncated for answer in answers], dim=1),
        bonus=torch.stack(bonuses, dim=1) if bonuses else None,
    )
    return trajectory, carry, observation

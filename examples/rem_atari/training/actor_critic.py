"""The controller's training: imagined steps, their λ-returns, and the actor-critic loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rem_atari.agent import Agent
from rem_atari.config import ControllerConfig
from rem_atari.models.controller import Carry, Controller, entropy
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.play.imagination import ImaginedEnv
from rem_atari.play.rollout import Trajectory, rollout
from rem_atari.training.returns import lambda_return
from rem_atari.training.updates import Lap, untimed

LEAST_DEVIATION = 0.1
"""Least divisor of advantages: without rewards, advantages are only the critic's errors."""


class Imagination(NamedTuple):
    """Imagined episodes, and the other inputs of their loss.

    Attributes:
        before: the controller's memory before the first observation.
        trajectory: the episodes.
        bootstrap: the value of the observation after the last step, (B,).
    """

    before: Carry
    trajectory: Trajectory
    bootstrap: Tensor

    def select(self, rows: Tensor) -> Imagination:
        """Some of the episodes, by their indices (n,)."""
        columns = ((column.name, getattr(self.trajectory, column.name)) for column in fields(Trajectory))
        chosen = {name: None if steps is None else steps[rows] for name, steps in columns}
        return Imagination(
            tuple(part[rows] for part in self.before), Trajectory(**chosen), self.bootstrap[rows]
        )


def controller_loss(
    agent: Agent, segments: SequenceTokens, cfg: ControllerConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Imagine from the segments' last frames, and return the loss of what the controller did.

    Args:
        agent: whose controller learns; world model in eval mode.
        segments: B segments of burn_in + 1 steps, padded on the left, their last step real.
        cfg: horizon, discount, weights.
        generator: source of every draw, on the agent's device.

    Returns:
        The loss, whose gradient reaches only the controller, and the metrics as scalars without gradient; see
        `actor_critic_loss`.

    Source: arXiv 2402.05643, with the loss of IRIS (arXiv 2209.00588, appendix B).
    """
    return learn_from(imagine(agent, segments, cfg, generator), agent.controller, cfg)


@torch.no_grad()
def imagine(
    agent: Agent,
    segments: SequenceTokens,
    cfg: ControllerConfig,
    generator: torch.Generator,
    lap: Lap = untimed,
    *,
    skip_ended: bool = False,
) -> Imagination:
    """Imagine `horizon` observations, the segments' last frames the first of them, without gradient.

    One pass of the world model a step; nothing waits for the device, and no shape depends on what comes out,
    unless ended episodes are skipped.

    Args:
        agent, segments, cfg, generator: as in `controller_loss`.
        skip_ended: as in `ImaginedEnv`; for a loss that leaves out the steps after an end.
        lap: told as "burn-in" and "steps" end.
    """
    env = ImaginedEnv(
        agent.world_model,
        agent.tokenizer,
        generator,
        agent.show,
        disagreement_weight=cfg.disagreement_weight,
        mean_rewards=cfg.mean_rewards,
        skip_ended=skip_ended,
    )
    before, observation = start_imagination(env, agent, segments, cfg.context_frames)
    lap("burn-in")
    trajectory, after, observation = rollout(
        env, agent.controller, before, observation, cfg.horizon - 1, generator=generator
    )
    bootstrap = agent.controller(observation, after).value
    lap("steps")
    return Imagination(before, trajectory, bootstrap)


def learn_from(
    imagination: Imagination, controller: Controller, cfg: ControllerConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of imagined episodes.

    The loss covers all observations of an episode but the last, whose value is the bootstrap. Observations
    and actions are fixed, so the gradient needs only one pass of the controller over all steps at once.
    """
    trajectory = imagination.trajectory
    # Autocast keeps the weights that it has cast. torch 2.9 hands out those that imagining cast without
    # gradient, and the controller's layers learn nothing (2.13 does not).
    torch.clear_autocast_cache()
    logits, critic = controller.judge(trajectory.seen, trajectory.actions, imagination.before)
    judged = replace(trajectory, logits=logits, values=controller.values(critic))
    return actor_critic_loss(
        judged, imagination.bootstrap, cfg, partial(controller.value_loss, critic), acted=trajectory.logits
    )


def start_imagination(
    env: ImaginedEnv, agent: Agent, segments: SequenceTokens, context: int = 1
) -> tuple[Carry, Tensor]:
    """Bring the controller and the world model to the segments' last frames, without gradient.

    The controller's memory burns in on all frames but the last. The world model takes in the blocks of the
    `context` frames before the last, those of them that are real; at the published sizes its one block and
    the imagined ones are a sequence as long as in training.

    Returns:
        The controller's carry, and what it sees of the last frames (`Agent.show`).
    """
    past = agent.show(segments.tokens[:, :-1])
    carry = agent.controller.burn_in(past, segments.actions[:, :-1], segments.mask[:, :-1])
    if segments.tokens.shape[1] == 1 or context == 0:
        return carry, env.reset(segments.tokens[:, -1])
    before = slice(-1 - context, -1)
    observation = env.reset(
        segments.tokens[:, -1],
        context_tokens=segments.tokens[:, before],
        context_actions=segments.actions[:, before],
        context_mask=segments.mask[:, before],
    )
    return carry, observation


def actor_critic_loss(
    trajectory: Trajectory,
    bootstrap: Tensor,
    cfg: ControllerConfig,
    value_loss: Callable[[Tensor], Tensor] | None = None,
    acted: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with the critic as baseline, the critic's error, and a bonus for entropy.

        -log π(a) (G - sg V)  +  (V - sg G)²  -  entropy_weight · H(π)

    with the advantage G - sg V scaled where `scale_advantages` says so, and, where imagined steps bring more
    than one update, PPO's clipped ratio of chances (arXiv 1707.06347, equation 7) in place of the logarithm;
    averaged over the steps; with `mask_after_end`, over those up to the first end.

    Args:
        trajectory: T steps in B environments.
        bootstrap: the value after the last step, (B,), without gradient.
        cfg: discount, λ, entropy weight and mask.
        value_loss: the critic's loss at each step, given the returns (B, T); None: the square above.
        acted: the logits by which the actions were drawn, (B, T, A); None: the trajectory's.

    Returns:
        The loss, and the metrics as scalars without gradient: loss, policy, value (its square),
        entropy in nats, imagined_return (mean over environments of the rewards' sum up to the end),
        imagined_reward (mean over the steps up to the end), imagined_end (share of those steps that end) and,
        where curiosity pays, imagined_bonus (what it pays, mean over the same steps; not in the others).
    """
    paid = trajectory.rewards if trajectory.bonus is None else trajectory.rewards + trajectory.bonus
    returns = lambda_return(
        paid,
        trajectory.ended,
        trajectory.values.detach(),
        bootstrap,
        gamma=cfg.gamma,
        lambda_=cfg.td_lambda,
    )
    alive = before_the_end(trajectory.ended).float()
    weights = alive if cfg.mask_after_end else torch.ones_like(alive)
    advantages = returns - trajectory.values.detach()
    if cfg.scale_advantages:
        advantages = advantages / _deviation(advantages, weights).clamp(min=LEAST_DEVIATION)
    taken = _log_chances(trajectory.logits, trajectory.actions)
    if cfg.uses * cfg.minibatches == 1:
        gain = taken * advantages
    else:
        before = _log_chances(trajectory.logits if acted is None else acted, trajectory.actions).detach()
        gain = _clipped_gain((taken - before).exp(), advantages, cfg.clip_ratio)
    policy = -_weighted_mean(gain, weights)
    squares = (trajectory.values - returns).square()
    value = _weighted_mean(squares if value_loss is None else value_loss(returns), weights)
    mean_entropy = _weighted_mean(entropy(trajectory.logits), weights)
    loss = policy + value - cfg.entropy_weight * mean_entropy
    metrics = {
        "loss": loss,
        "policy": policy,
        "value": _weighted_mean(squares, weights),
        "entropy": mean_entropy,
        "imagined_return": (trajectory.rewards * alive).sum(dim=1).mean(),
        "imagined_reward": _weighted_mean(trajectory.rewards, alive),
        "imagined_end": _weighted_mean(trajectory.ended.float(), alive),
    }
    if trajectory.bonus is not None:
        metrics["imagined_bonus"] = _weighted_mean(trajectory.bonus, alive)
    return loss, {name: metric.detach() for name, metric in metrics.items()}


def before_the_end(ended: Tensor) -> Tensor:
    """Steps up to the first end, (B, T) bool; the step that ends an episode is one of them."""
    ends = ended.long()
    return ends.cumsum(dim=1) - ends == 0


def _log_chances(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probabilities of actions (B, T) under logits (B, T, A): (B, T)."""
    return functional.log_softmax(logits, dim=-1).gather(-1, actions[..., None]).squeeze(-1)


def _clipped_gain(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's objective: a ratio further than `clip` from 1 gains nothing more."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def _deviation(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted standard deviation of all values, a scalar."""
    mean = _weighted_mean(values, weights)
    return _weighted_mean((values - mean).square(), weights).sqrt()


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()

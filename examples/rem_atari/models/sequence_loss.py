"""The loss of the world model on sequences of predictions and targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rem_atari.config import WorldModelConfig
from rem_atari.models.rewards import TINY, RewardCode, reward_classes
from rem_atari.models.sequence_tokens import SequenceTokens


class SequenceLogits(NamedTuple):
    """Predictions over a sequence of N blocks, without those of the skipped first blocks.

    Attributes:
        tokens: of each block's own observation, from what came before the block, (B, N, K, V).
        rewards: of each block's reward, from the block and what came before, (B, N, C).
        ends: of each block's end flag, likewise, (B, N, 2).
        unknown: the tokens that were to be predicted, (B, N, K) bool; the others were given. None: all.
        heads: the logits of `Disagreement`'s heads, (H, B, N, K, V). None: there are no heads.
    """

    tokens: Tensor
    rewards: Tensor
    ends: Tensor
    unknown: Tensor | None = None
    heads: Tensor | None = None


class WorldModelLoss(NamedTuple):
    """The training loss and its metrics.

    Attributes:
        total: the loss, a scalar.
        metrics: scalars without gradient: loss, tokens, reward, end (mean cross-entropies in nats),
            reward_base (what the reward's would be knowing only how often each occurs in the batch),
            token_accuracy, reward_accuracy (of signs), end_accuracy (shares), and, where there are heads that
            may disagree, heads (their mean cross-entropy, which is part of the loss).
        sequences: the loss of each sequence by itself, (B,) without gradient.
    """

    total: Tensor
    metrics: dict[str, Tensor]
    sequences: Tensor


def sequence_loss(
    logits: SequenceLogits,
    batch: SequenceTokens,
    reward_code: RewardCode,
    cfg: WorldModelConfig,
    weights: Tensor | None,
) -> WorldModelLoss:
    """The weighted sum of the mean cross-entropies of tokens, rewards and ends; see `BaseWorldModel.loss`.

    Args:
        logits: predictions for all blocks but the first `context_blocks`.
        batch: the sequences.
        reward_code: the classes of rewards.
        cfg: the context and the weights of rewards and ends.
        weights: the weight of each sequence, (B,); None: equal weights.
    """
    skipped = cfg.context_blocks
    real = batch.mask[:, skipped:].float()
    end_known = real * (~batch.truncated | batch.ended)[:, skipped:]
    tokens, rewards, ends = (
        column[:, skipped:] for column in (batch.tokens, batch.rewards, batch.ended.long())
    )
    of_tokens = _cross_entropies(logits.tokens, tokens)
    unknown = torch.ones_like(of_tokens) if logits.unknown is None else logits.unknown.float()
    of_rewards = reward_code.loss(logits.rewards, rewards)
    of_ends = _cross_entropies(logits.ends, ends)

    def add(token: Tensor, reward: Tensor, end: Tensor) -> Tensor:
        return token + cfg.reward_weight * reward + cfg.end_weight * end

    with torch.no_grad():
        steps = add(_weighted_mean(of_tokens, unknown, dim=-1), of_rewards, of_ends * end_known)
        sequences = _weighted_mean(steps, real, dim=1)
    if weights is not None:
        real, end_known = real * weights[:, None], end_known * weights[:, None]
    counted = unknown * real[..., None]
    token = _weighted_mean(of_tokens, counted)
    reward, end = _weighted_mean(of_rewards, real), _weighted_mean(of_ends, end_known)
    total = add(token, reward, end)
    of_heads = {}
    if logits.heads is not None:
        losses = _cross_entropies(logits.heads, tokens.expand(len(logits.heads), *tokens.shape))
        of_heads = {"heads": _weighted_mean(losses, counted)}
        total = total + of_heads["heads"]
    signs = reward_code.sign_logits(logits.rewards.detach())
    metrics = {
        "loss": total.detach(),
        "tokens": token.detach(),
        "reward": reward.detach(),
        "reward_base": reward_code.base_rate(rewards, real),
        "end": end.detach(),
        "token_accuracy": _accuracy(logits.tokens, tokens, counted),
        "reward_accuracy": _accuracy(signs, reward_classes(rewards), real),
        "end_accuracy": _accuracy(logits.ends, ends, end_known),
        **{name: loss.detach() for name, loss in of_heads.items()},
    }
    return WorldModelLoss(total, metrics, sequences)


def _cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target (...) under logits (..., V), in float32."""
    losses = functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return losses.view_as(targets)


def _accuracy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted share of targets (...) that the largest of the logits (..., V) hits."""
    return _weighted_mean((logits.detach().argmax(dim=-1) == targets).float(), weights)


def _weighted_mean(values: Tensor, weights: Tensor, dim: int | None = None) -> Tensor:
    """Mean of values (...) by weights that broadcast to them, of all or over `dim`; 0 where weights are 0."""
    weights = weights.expand_as(values)
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=TINY)

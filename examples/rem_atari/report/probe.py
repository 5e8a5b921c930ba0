"""Runs the trained networks on held-out sequences: tensors in, arrays out for :mod:`.analysis`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.models.world_model import BaseWorldModel, reward_classes
from rem_atari.report.analysis import TokenPredictions, TokenScores, score_tokens

SEQUENCES_AT_ONCE = 16
"""Sequences in one pass of the world model; bounds the memory of its logits."""


@dataclass(frozen=True)
class Evidence:
    """Predictions beside what came.

    Attributes:
        predictions: the world model's, (N, K).
        target: what came, (N, K).
        previous: what a token is compared with to tell whether it changed, (N, K).
    """

    predictions: TokenPredictions
    target: NDArray[np.int64]
    previous: NDArray[np.int64]

    def score(self, predictions: TokenPredictions) -> TokenScores:
        """How well these predictions, the world model's or another's, meet what came."""
        return score_tokens(predictions, self.target, self.previous)


def token_pairs(batch: SequenceTokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of frames and of the frame before each, (N, K) both, wherever a sequence has two in a row."""
    follows = batch.mask[:, 1:] & batch.mask[:, :-1]
    return batch.tokens[:, 1:][follows].cpu().numpy(), batch.tokens[:, :-1][follows].cpu().numpy()


@torch.no_grad()
def predict_sequences(
    world_model: BaseWorldModel, codebook: Tensor, batch: SequenceTokens, *, first: int
) -> tuple[Evidence, Evidence, Evidence]:
    """What the world model, given the real past, says of next frames, of rewards and of ends.

    Args:
        world_model: in eval mode.
        codebook: the tokenizer's codes, (V, E).
        batch: held-out sequences of more than `first` steps, padding on the right.
        first: steps before this one give context alone; at least 1, since a first frame has none before it.
    Returns:
        Evidence for tokens (N, K); for reward classes (N, 1), whose "previous" is the class of no reward; and
        for ends (M, 1), whose "previous" is no end, without steps after which an episode was cut short.
    """
    tokens: list[Evidence] = []
    rewards: list[Evidence] = []
    ends: list[Evidence] = []
    for part in _parts(batch):
        logits = world_model(part.tokens, part.actions, codebook, skip_blocks=first)
        real = part.mask[:, first:]
        target = part.tokens[:, first:][real]
        tokens.append(_evidence(logits.tokens[real], target, part.tokens[:, first - 1 : -1][real]))
        signs = reward_classes(part.rewards[:, first:][real])[:, None]
        rewards.append(_evidence(logits.rewards[real][:, None], signs, torch.ones_like(signs)))
        known = real & ~(part.truncated & ~part.ended)[:, first:]
        ended = part.ended[:, first:][known].long()[:, None]
        ends.append(_evidence(logits.ends[known][:, None], ended, torch.zeros_like(ended)))
    return _join(tokens), _join(rewards), _join(ends)


def _parts(batch: SequenceTokens) -> Iterator[SequenceTokens]:
    """The batch, SEQUENCES_AT_ONCE sequences at a time."""
    for start in range(0, batch.tokens.shape[0], SEQUENCES_AT_ONCE):
        yield batch.select(slice(start, start + SEQUENCES_AT_ONCE))


def _evidence(logits: Tensor, target: Tensor, previous: Tensor) -> Evidence:
    """Evidence from logits (N, K, V) and targets (N, K)."""
    log_prob = functional.log_softmax(logits.double(), dim=-1).gather(-1, target[..., None])[..., 0]
    predictions = TokenPredictions(log_prob.cpu().numpy(), logits.argmax(dim=-1).cpu().numpy())
    return Evidence(predictions, target.cpu().numpy(), previous.cpu().numpy())


def _join(parts: Sequence[Evidence]) -> Evidence:
    return Evidence(
        TokenPredictions(
            np.concatenate([part.predictions.log_prob for part in parts]),
            np.concatenate([part.predictions.choice for part in parts]),
        ),
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.previous for part in parts]),
    )

"""Sequences of environment steps with frames as tokens: the input of the world model and of imagination."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor

from rem_atari.models.base_tokenizer import BaseTokenizer

if TYPE_CHECKING:
    from rem_atari.replay.batch import SequenceBatch


@dataclass(frozen=True)
class SequenceTokens:
    """B sequences of T steps; all tensors on one device.

    Attributes:
        tokens: the frames acted on, (B, T, K) int64.
        actions: the actions taken, (B, T) int64.
        rewards: their raw rewards, (B, T) float32.
        ended: (B, T) bool, the episode came to an end of its own with this step.
        truncated: (B, T) bool, the episode was cut short from outside after this step.
        mask: (B, T) bool, False where a step is padding.
    """

    tokens: Tensor
    actions: Tensor
    rewards: Tensor
    ended: Tensor
    truncated: Tensor
    mask: Tensor

    @classmethod
    def from_batch(cls, batch: SequenceBatch, tokens: Tensor) -> SequenceTokens:
        """A batch from the replay on the device of `tokens` (B, T, K), which stand for its frames."""
        device = tokens.device
        return cls(
            tokens=tokens,
            actions=batch.actions.to(device),
            rewards=batch.rewards.to(device),
            ended=batch.ended.to(device),
            truncated=batch.truncated.to(device),
            mask=batch.mask.to(device),
        )

    def select(self, sequences: slice) -> SequenceTokens:
        """Some of the B sequences."""
        return SequenceTokens(*(getattr(self, column.name)[sequences] for column in fields(self)))

    def since(self, step: int) -> SequenceTokens:
        """The steps from `step` on."""
        return SequenceTokens(*(getattr(self, column.name)[:, step:] for column in fields(self)))


def tokenize(batch: SequenceBatch, tokenizer: BaseTokenizer) -> SequenceTokens:
    """A batch from the replay on the tokenizer's device, its frames tokenised."""
    return SequenceTokens.from_batch(batch, tokenizer.encode(batch.frames.to(tokenizer.codes.device)))

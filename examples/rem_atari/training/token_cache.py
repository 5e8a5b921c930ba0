"""Tokens of replay frames, each frame encoded once for as long as the tokenizer stays as it is."""

from __future__ import annotations

import torch

from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.models.tokenizer import Tokenizer
from rem_atari.replay import Replay, SequenceBatch


class TokenCache:
    """The tokenizer in front of the replay: world model and controller draw the same frames many times.

    Which frames have tokens is kept on the CPU, so that a GPU is never waited for.

    Args:
        replay: whose rows are tokenised.
        tokenizer: in eval mode; whoever trains it calls `clear`.
    """

    def __init__(self, replay: Replay, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        shape = (replay.capacity, tokenizer.num_tokens)
        self._tokens = torch.zeros(shape, dtype=torch.int32, device=tokenizer.codes.device)
        self._known = torch.zeros(replay.capacity, dtype=torch.bool)

    def clear(self) -> None:
        """Forget all tokens: the tokenizer has changed."""
        self._known.zero_()

    def tokenize(self, batch: SequenceBatch) -> SequenceTokens:
        """A batch from the replay, on the tokenizer's device, as tokens; those of padding are 0."""
        self._encode(batch)
        device = self._tokens.device
        tokens = self._tokens[batch.rows.clamp(min=0).to(device)].long()
        return SequenceTokens.from_batch(batch, tokens.masked_fill(~batch.mask[..., None].to(device), 0))

    def _encode(self, batch: SequenceBatch) -> None:
        """Encode those of the batch's frames that have no tokens yet, each once."""
        new = (batch.mask & ~self._known[batch.rows]).flatten().nonzero().squeeze(1)
        rows, order = batch.rows.flatten()[new].sort()
        first = torch.ones_like(rows, dtype=torch.bool)
        first[1:] = rows[1:] != rows[:-1]
        if not len(rows):
            return
        rows, device = rows[first], self._tokens.device
        frames = batch.frames.flatten(0, 1)[new[order[first]]].to(device)
        self._tokens[rows.to(device)] = self.tokenizer.encode(frames).int()
        self._known[rows] = True

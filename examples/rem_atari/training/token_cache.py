"""Tokens of replay frames; each frame is encoded once while the tokenizer does not change."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rem_atari.models.base_tokenizer import BaseTokenizer
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.replay.batch import SequenceBatch
from rem_atari.replay.buffer import Replay


class TokenCache:
    """A cache of frames' tokens, because world model and controller draw the same frames many times.

    The table of frames with tokens is on the CPU, so that the host never waits for a GPU.

    Args:
        replay: whose rows are tokenised.
        tokenizer: in eval mode; call `clear` when its tokens change.
    """

    def __init__(self, replay: Replay, tokenizer: BaseTokenizer) -> None:
        self.tokenizer = tokenizer
        shape = (replay.capacity, tokenizer.num_tokens)
        self._tokens = torch.zeros(shape, dtype=torch.int32, device=tokenizer.codes.device)
        self.known = torch.zeros(replay.capacity, dtype=torch.bool)
        """The rows that have tokens, (capacity,)."""

    def clear(self) -> None:
        """Forget all tokens: the tokenizer has changed."""
        self.known.zero_()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The rows that have tokens, and the tokens, for a checkpoint.

        Encoding the frames again could differ: by rounding, a frame's tokens may depend on its batch.
        """
        rows = self.known.nonzero().squeeze(1)
        return {"rows": rows, "tokens": self._tokens[rows.to(self._tokens.device)].cpu()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the cache by what :meth:`tensors` returned.

        Raises:
            ValueError: these are no tokens of this tokenizer, or rows that the replay has no room for.
        """
        rows, tokens = tensors["rows"], tensors["tokens"]
        if tokens.shape != (len(rows), self.tokenizer.num_tokens) or rows.ndim != 1:
            raise ValueError(f"the cached tokens are {tuple(tokens.shape)} for {tuple(rows.shape)} rows")
        for name, values, bound in (
            ("row", rows, len(self.known)),
            ("token", tokens, self.tokenizer.codebook_size),
        ):
            if len(rows) > 0 and not 0 <= int(values.min()) <= int(values.max()) < bound:
                raise ValueError(f"a cached {name} is not below {bound}")
        self.clear()
        self._tokens[rows.to(self._tokens.device)] = tokens.to(self._tokens)
        self.known[rows] = True

    def tokenize(self, batch: SequenceBatch) -> SequenceTokens:
        """A batch from the replay, on the tokenizer's device, as tokens; those of padding are 0."""
        self._encode(batch)
        device = self._tokens.device
        tokens = self._tokens[batch.rows.clamp(min=0).to(device)].long()
        return SequenceTokens.from_batch(batch, tokens.masked_fill(~batch.mask[..., None].to(device), 0))

    def _encode(self, batch: SequenceBatch) -> None:
        """Encode those of the batch's frames that have no tokens yet, each once."""
        rows = batch.rows[batch.mask & ~self.known[batch.rows]].unique()
        if not len(rows):
            return
        device = self._tokens.device
        tokens = self.tokenizer.encode(batch.stored.index_select(0, rows).to(device))
        self._tokens[rows.to(device)] = tokens.int()
        self.known[rows] = True

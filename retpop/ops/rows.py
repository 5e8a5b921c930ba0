"""POP's arguments beside its tensors, and its rows: a sequence's tokens followed by all prediction tokens.

A row is (B, T + P·M, ...). A short row has only the last token of each of the N blocks before the
predictions, (B, N + P·M, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retpop.ops.powers import DecayPowers


def join_row(main: Tensor, pred: Tensor) -> Tensor:
    """One row of (B, T, ...) and (B, P, M, ...)."""
    return torch.cat((main, pred.flatten(1, 2)), dim=1)


def split_row(row: Tensor, predictions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The two parts of a row with ``predictions`` = (P, M), as views: (B, T, ...) and (B, P, M, ...)."""
    num_predictions, size = predictions
    # One `split`, whose gradient is one `cat`; those of two slices are two full rows, and their sum.
    behind = num_predictions * size
    main, pred = row.split((row.shape[1] - behind, behind), dim=1)
    return main, pred.unflatten(1, (num_predictions, size))


class PopSpec(NamedTuple):
    """POP's arguments beside its tensors.

    Attributes:
        powers: the decays, with the scale c.
        predictions: (P, M).
        block_size, offset, reset: as in `retpop.pop_retention`.
        main_out: "all"; or "last": queries and outputs of the sequence are those of each block's last
            token: short rows.
        out_dtype: of the outputs; None: the values'.
    """

    powers: DecayPowers
    predictions: Sequence[int]
    block_size: int
    offset: int
    reset: Tensor | None
    main_out: str = "all"
    out_dtype: torch.dtype | None = None

    def readers(self, row: Tensor) -> Tensor:
        """The tokens of a row whose outputs are needed: the row itself, or a short one."""
        if self.main_out == "all":
            return row
        main, pred = split_row(row, self.predictions)
        return join_row(main[:, self.block_size - 1 :: self.block_size], pred)

    def all_tokens(self, row: Tensor) -> Tensor:
        """The inverse of `readers`: the full row, with zeros for the tokens that are left out."""
        if self.main_out == "all":
            return row
        last, pred = split_row(row, self.predictions)
        before = last.new_zeros(*last.shape[:2], self.block_size - 1, *last.shape[2:])
        return join_row(torch.cat((before, last.unsqueeze(2)), dim=2).flatten(1, 2), pred)

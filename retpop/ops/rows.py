"""Rows of POP: the T tokens of a sequence with all P·M prediction tokens behind them, (B, T + P·M, ...).

A short row has only the last token of each of the N blocks before the predictions, (B, N + P·M, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def last_tokens(main: Tensor, block_size: int) -> Tensor:
    """The last token of every block of (B, T, ...), as a view: (B, N, ...)."""
    return main[:, block_size - 1 :: block_size]


def shortened(row: Tensor, predictions: Sequence[int], block_size: int) -> Tensor:
    """A row's last tokens of blocks and its predictions: (B, N + P·M, ...)."""
    main, pred = split_row(row, predictions)
    return join_row(last_tokens(main, block_size), pred)


def lengthened(short: Tensor, predictions: Sequence[int], block_size: int) -> Tensor:
    """A row that `shortened` makes ``short`` again, with zeros for the tokens that it leaves out."""
    last, pred = split_row(short, predictions)
    before = last.new_zeros(*last.shape[:2], block_size - 1, *last.shape[2:])
    return join_row(torch.cat((before, last.unsqueeze(2)), dim=2).flatten(1, 2), pred)

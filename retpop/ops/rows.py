"""Rows of POP: the T tokens of a sequence with all P·M prediction tokens behind them, (B, T + P·M, ...)."""

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
    length = row.shape[1] - num_predictions * size
    return row[:, :length], row[:, length:].unflatten(1, (num_predictions, size))

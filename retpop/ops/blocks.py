"""Tokens as blocks by head, a few at a time: how the PyTorch backend's forward and backward walk a batch.

A block is L tokens of one row and one head; products take many at once, as (N·B·H, L, D) in memory. Numbers
of blocks come first, so that the states at N + 1 boundaries, (N + 1, B, H, Dk, Dv), are before the blocks
without the last, and after them without the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

VALUES_A_THREAD = 2**17
"""How many numbers of a tensor each thread of a CPU takes at once: those of a stretch then stay in its core's
cache, and their memory is used again, where fresh memory would cost as much as the arithmetic."""


class Stretch(NamedTuple):
    """Blocks that are taken at once: all of some rows of a batch, or one block of each.

    Attributes:
        rows: of the batch.
        blocks: their numbers in the row.
        tokens: the tokens that are in them.
        size: tokens in a block.
    """

    rows: slice
    blocks: slice
    tokens: slice
    size: int

    @property
    def num_blocks(self) -> int:
        """Blocks of each row."""
        return int(self.blocks.stop - self.blocks.start)

    def ends(self) -> Stretch:
        """The same blocks of a sequence that holds nothing but the last token of each."""
        return Stretch(self.rows, self.blocks, self.blocks, 1)

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Blocks of (B, T, H, D) by head, cast: (N·B·H, L, D). Perhaps ``x`` itself: not to be written to."""
        x = _by_head(x[self.rows, self.tokens], self.size)
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 2)

    def put(self, into: Tensor, blocks: Tensor) -> None:
        """Write blocks by head to their place in (B, T, H, D); the other way round."""
        place = _by_head(into[self.rows, self.tokens], self.size)
        place.copy_(blocks.view(place.shape))


def _by_head(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)  # (B, N·L, H, D) as (N, B, H, L, D)


def stretches(x: Tensor, size: int) -> Iterator[Stretch]:
    """Cut (B, T, H, D) into blocks of ``size`` tokens, the last perhaps shorter, and those into stretches.

    Those of a row come in its order, and all rows' full blocks before what is left over.
    """
    full, left = divmod(x.shape[1], size)
    yield from _cut(x, size, 0, full)
    if left:
        for part in _cut(x, left, full, 1):
            yield part._replace(tokens=slice(full * size, full * size + left))


def _cut(x: Tensor, size: int, first: int, count: int) -> Iterator[Stretch]:
    """Stretches of ``count`` blocks of equal size, from number ``first`` on."""
    batch = x.shape[0]
    at_once = VALUES_A_THREAD * torch.get_num_threads() if x.is_cpu else x.numel()
    limit = at_once // (size * x.shape[2] * x.shape[3])  # blocks
    rows, blocks = max(1, min(batch, limit)), max(1, limit // max(1, batch))
    for start in range(first, first + count, blocks):
        end = min(start + blocks, first + count)
        for row in range(0, batch, rows):
            yield Stretch(slice(row, row + rows), slice(start, end), slice(start * size, end * size), size)


def flat(states: Tensor) -> Tensor:
    """A stretch's states (N, B, H, Dk, Dv) as a view (N·B·H, Dk, Dv)."""
    return states.view(-1, *states.shape[-2:])


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """Blocks (N·B·H, L, D) times powers of γ, (H, L, D) or (N, H, L, D) or of width 1."""
    return (_in_rows(x, by) * by).view(x.shape)


def scale_in_place(x: Tensor, by: Tensor) -> Tensor:
    """`scaled`, written over ``x``."""
    _in_rows(x, by).mul_(by)
    return x


def _in_rows(x: Tensor, by: Tensor) -> Tensor:
    return x.view(-1, *by.shape[:-2], *x.shape[1:])

"""Blocks of tokens and the states at their boundaries: the formulas of chunkwise retention and POP.

A block is L tokens of one row and one head; products take many at once, as (N·B·H, L, D) in memory. The
block index comes first: of the states at N + 1 boundaries, (N + 1, B, H, Dk, Dv), the first N are before the
blocks and the last N after them. Results are written in place, in the states' dtype.

The formulas are those of `plain`. With G the gradient of the state after a block, S the state before it, and
g_i the gradient of output o_i, the gradients are

    dq_i = Σ_{j<=i} c γ^(i-j) (g_i · v_j) k_j  +  c γ^(i+1) S g_i
    dk_j = Σ_{i>=j} c γ^(i-j) (g_i · v_j) q_i  +  γ^(L-1-j) G v_j
    dv_j = Σ_{i>=j} c γ^(i-j) (q_i · k_j) g_i  +  γ^(L-1-j) Gᵀ k_j
    dS   = γ^L G + Σ_i c γ^(i+1) q_i g_iᵀ

The last line runs backwards over the blocks, as the states run forwards; the others take blocks at once.

ln γ needs no products of its own. With S_n the state after token n of a block and G_n its gradient, token n
adds d_n = ⟨G_n, γ S_{n-1}⟩ to the gradient of ln γ, and the recurrences of S and G give

    d_n = q_n · dq_n - k_n · dk_n + d_{n+1},    d_{L+1} = ⟨G, S_L⟩
    Σ_n d_n = Σ_n n (q_n · dq_n - k_n · dk_n) + L ⟨G, S_L⟩    (n = 1 .. L)

A block begins with its own exact d_{L+1}, so rounding errors do not add up over a long sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from retpop.ops.powers import Across, BlockPowers, advance_in_place

VALUES_A_THREAD = 2**17
"""Numbers of a tensor that each CPU thread takes at once. A group then stays in the core's cache and reuses
memory; fresh memory would cost as much as the arithmetic."""

Tokens = Sequence[Tensor]
"""Tensors of tokens: queries, keys and values, (B, T, H, D), outputs, or gradients of them."""


class Group(NamedTuple):
    """A group of blocks that are computed at once: all of some rows of a batch, or one block of each.

    Attributes:
        rows: of the batch.
        blocks: their indices in the row.
        tokens: their tokens.
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

    def ends(self) -> Group:
        """The same blocks of a sequence that holds only the last token of each."""
        return Group(self.rows, self.blocks, self.blocks, 1)

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Blocks of (B, T, H, D) by head, cast: (N·B·H, L, D). Perhaps ``x`` itself: not to be written to."""
        x = _by_head(x[self.rows, self.tokens], self.size)
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 2)

    def put(self, into: Tensor, blocks: Tensor) -> None:
        """The inverse of `take`: write blocks by head to their place in (B, T, H, D)."""
        place = _by_head(into[self.rows, self.tokens], self.size)
        place.copy_(blocks.view(place.shape))


def _by_head(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)  # (B, N·L, H, D) as (N, B, H, L, D)


def groups(x: Tensor, size: int) -> Iterator[Group]:
    """Cut (B, T, H, D) into blocks of ``size`` tokens, the last perhaps shorter, in groups.

    The blocks of a row come in order, and all full blocks before the shorter last ones.
    """
    full, left = divmod(x.shape[1], size)
    yield from _cut(x, size, 0, full)
    if left:
        for group in _cut(x, left, full, 1):
            yield group._replace(tokens=slice(full * size, full * size + left))


def _cut(x: Tensor, size: int, first: int, count: int) -> Iterator[Group]:
    """Groups of ``count`` blocks of equal size, from index ``first`` on."""
    batch = x.shape[0]
    cached = x.is_cpu and not torch.compiler.is_compiling()  # the backward pass may be compiled alone
    at_once = VALUES_A_THREAD * torch.get_num_threads() if cached else x.numel()
    limit = at_once // (size * x.shape[2] * x.shape[3])  # blocks
    rows, blocks = max(1, min(batch, limit)), max(1, limit // max(1, batch))
    for start in range(first, first + count, blocks):
        end = min(start + blocks, first + count)
        for row in range(0, batch, rows):
            yield Group(slice(row, row + rows), slice(start, end), slice(start * size, end * size), size)


class Blocks(NamedTuple):
    """Blocks of tokens by head: each (N·B·H, L, D).

    If only the last token's output is needed, ``q`` holds one token per block, and the powers are for it.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    def outputs(self, starts: Tensor, powers: BlockPowers) -> Tensor:
        """The outputs, (N·B·H, L, Dv), from the states before the blocks, (N, B, H, Dk, Dv)."""
        scores = _scale(torch.bmm(self.q, self.k.mT), powers.within)
        out = _scale(torch.bmm(self.q, flat(starts)), powers.from_start)
        return out.baddbmm_(scores, self.v)

    def gradients(
        self,
        grad: Tensor,
        read: Tensor,
        starts: Tensor,
        ends: Tensor | None,
        powers: BlockPowers,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """dq, dk and dv, laid out as the blocks; None where they are not needed.

        Args:
            grad: of the outputs.
            read: ``grad`` times ``powers.from_start``.
            starts: the states before the blocks, (N, B, H, Dk, Dv).
            ends: the gradients of the states after them, likewise; None if nothing follows.
            powers: of γ for L tokens.
            needs: which of the three are needed, and whether `add_decay_gradient` needs the first two.
        """
        dq = dk = dv = None
        of_queries, of_keys = needs[0] or needs[3], needs[1] or needs[3]
        if of_queries or of_keys:
            pairs = _scale(torch.bmm(grad, self.v.mT), powers.within)
        if of_queries:
            dq = torch.bmm(pairs, self.k).baddbmm_(read, flat(starts).mT)
        if of_keys:
            dk = torch.bmm(pairs.mT, self.q)
            if ends is not None:
                dk.baddbmm_(scaled(self.v, powers.to_end), flat(ends).mT)
        if needs[2]:
            scores = _scale(torch.bmm(self.q, self.k.mT), powers.within)
            dv = torch.bmm(scores.mT, grad)
            if ends is not None:
                dv.baddbmm_(scaled(self.k, powers.to_end), flat(ends))
        return [dq, dk, dv]

    def add_decay_gradient(self, into: Tensor, found: Sequence[Tensor | None], after: Tensor | None) -> None:
        """Add the blocks' part of the gradient of ln γ to ``into`` (H,).

        Args:
            into: the sum.
            found: dq and dk, first of all.
            after: L ⟨G, S_L⟩ of each block, (N·B·H,); None if nothing follows.
        """
        dq, dk = cast(Tokens, found[:2])
        steps = torch.arange(1, self.k.shape[1] + 1, dtype=into.dtype, device=into.device)
        read = torch.linalg.vecdot(self.q, dq) @ steps[-self.q.shape[1] :]
        share = read - torch.linalg.vecdot(self.k, dk) @ steps
        into += (share if after is None else share + after).view(-1, into.shape[0]).sum(0)

    def additions(self, powers: BlockPowers, into: Tensor) -> None:
        """What each block adds to the state after it, (N, B, H, Dk, Dv)."""
        flat(into).baddbmm_(scaled(self.k, powers.to_end).mT, self.v, beta=0)


def inner(grads: Tensor, states: Tensor) -> Tensor:
    """⟨G, S⟩ of states (N, B, H, Dk, Dv), (N·B·H,)."""
    return torch.linalg.vecdot(flat(grads).flatten(1), flat(states).flatten(1))


def carry(states: Tensor, across: Across, resets: Tensor | None = None) -> None:
    """Add to each state (N + 1, B, H, Dk, Dv) the decayed one before it; the first is complete."""
    for n in range(1, states.shape[0]):
        advance_in_place(states[n - 1], across, states[n])
        if resets is not None:  # not a product: 0 * NaN would carry a NaN into the next episode
            states[n].masked_fill_(resets[n], 0)


def carry_back(grads: Tensor, across: Across, resets: Tensor | None = None) -> None:
    """Add to the gradients of states (N + 1, B, H, Dk, Dv) the part from the states after them.

    The last one is complete; the others hold the part from outputs.
    """
    for n in range(grads.shape[0] - 2, -1, -1):
        advance_in_place(grads[n + 1], across, grads[n])
        if resets is not None:  # earlier states have no influence; 0 * NaN would carry a NaN back
            grads[n].masked_fill_(resets[n], 0)


def flat(states: Tensor) -> Tensor:
    """A group's states (N, B, H, Dk, Dv) as a view (N·B·H, Dk, Dv)."""
    return states.view(-1, *states.shape[-2:])


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """Blocks (N·B·H, L, D) times powers of γ, (H, L, D) or (N, H, L, D) or of width 1."""
    return (_in_rows(x, by) * by).view(x.shape)


def _scale(x: Tensor, by: Tensor) -> Tensor:
    """`scaled`, written over ``x``."""
    _in_rows(x, by).mul_(by)
    return x


def _in_rows(x: Tensor, by: Tensor) -> Tensor:
    return x.view(-1, *by.shape[:-2], *x.shape[1:])

"""The gradients of retention and POP by explicit formulas, in plain PyTorch operations.

The Triton backend's backward, until kernels stand behind the same operations. With G the gradient of the
state after a block of L tokens, S the state before it, and g_i the gradient of output o_i:

    dq_i = Σ_{j<=i} c γ^(i-j) (g_i · v_j) k_j  +  c γ^(i+1) S g_i
    dk_j = Σ_{i>=j} c γ^(i-j) (g_i · v_j) q_i  +  γ^(L-1-j) G v_j
    dv_j = Σ_{i>=j} c γ^(i-j) (q_i · k_j) g_i  +  γ^(L-1-j) Gᵀ k_j
    dS   = γ^L G + Σ_i c γ^(i+1) q_i g_iᵀ

The last line runs backwards over the blocks, as the states run forwards; the others take all blocks at once.
Everything is computed in the states' dtype, and each gradient is cast to the dtype of what it belongs to.
"""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from retpop.ops import packed, torch_backend
from retpop.ops.decay_powers import Across, BlockPowers, DecayPowers, advance
from retpop.ops.torch_backend import by_head, by_token


class Gradients(NamedTuple):
    """Gradients of queries, keys, values and the state before them."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor


class PopGradients(NamedTuple):
    """Gradients of a sequence and its state, and those of the predictions' queries, keys and values."""

    main: Gradients
    pred: tuple[Tensor, Tensor, Tensor]


class Blocks(NamedTuple):
    """Blocks of tokens with the gradient of their outputs, by head: each (B, N, H, L, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    def to_state(self, from_start: Tensor) -> Tensor:
        """What each block's outputs give to the gradient of the state before it: (B, N, H, Dk, Dv)."""
        return (self.q * from_start).transpose(-1, -2) @ self.grad

    def gradients(
        self, starts: Tensor, ends: Tensor | None, tables: BlockPowers
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, (B, N, L, H, D).

        Args:
            starts: the states before the blocks, (B, N, H, Dk, Dv).
            ends: the gradients of the states after them, likewise; None where nothing comes after.
            tables: the powers of γ for L tokens.
        """
        scores = (self.q @ self.k.transpose(-1, -2)) * tables.within
        pairs = (self.grad @ self.v.transpose(-1, -2)) * tables.within
        dq = pairs @ self.k + (self.grad * tables.from_start) @ starts.transpose(-1, -2)
        dk = pairs.transpose(-1, -2) @ self.q
        dv = scores.transpose(-1, -2) @ self.grad
        if ends is not None:
            dk = dk + (self.v * tables.to_end) @ ends.transpose(-1, -2)
            dv = dv + (self.k * tables.to_end) @ ends
        return by_token(dq), by_token(dk), by_token(dv)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    grad_state: Tensor,
    powers: DecayPowers,
    *,
    state: Tensor,
    chunk_size: int,
) -> Gradients:
    """Gradients of `torch_backend.retention`.

    Args:
        q, k, v: (B, T, H, D), in the state's dtype.
        grad: of the outputs, (B, T, H, Dv).
        grad_state: of the final state, (B, H, Dk, Dv).
        powers: the decays, with the scale c.
        state: before the first token.
        chunk_size: tokens in a chunk.
    """
    length = q.shape[1]
    full = length - length % chunk_size
    cuts = [(0, full, chunk_size), (full, length, length - full)]
    stretches = []
    for first, last, size in cuts:
        if first < last:
            tables = powers.block(size)
            part = _blocks(size, *(x[:, first:last] for x in (q, k, v, grad)))
            before, after = torch_backend.block_states(part.k, part.v, state, tables)
            stretches.append((part, torch.stack(before, dim=1), tables))
            state = after[-1]
    parts = []
    for part, start, tables in reversed(stretches):
        ends, grad_state = _sweep(grad_state, part.to_state(tables.from_start), tables.across)
        parts.append([x.flatten(1, 2) for x in part.gradients(start, ends, tables)])
    if not parts:
        return Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), grad_state.clone())
    dq, dk, dv = (torch.cat(list(reversed(x)), dim=1) for x in zip(*parts, strict=True))
    return Gradients(dq, dk, dv, grad_state)


def pop_retention(
    main: tuple[Tensor, Tensor, Tensor],
    pred: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    grad_pred: Tensor,
    grad_state: Tensor,
    powers: DecayPowers,
    *,
    state: Tensor,
    block_size: int,
    offset: int,
    reset: Tensor | None,
) -> PopGradients:
    """Gradients of `torch_backend.pop_retention`.

    Args:
        main: q, k, v, (B, N·L, H, D), in the state's dtype.
        pred: their prediction twins, (B, P, M, H, D).
        grad, grad_pred, grad_state: of the outputs, the predictions and the final state.
        powers: the decays, with the scale c.
        state: before the first block.
        block_size, offset, reset: as in `retpop.pop_retention`.
    """
    num_blocks, num_predictions = main[0].shape[1] // block_size, pred[0].shape[1]
    boundaries = state.new_zeros(state.shape[0], num_blocks + 1, *state.shape[1:])
    states = [state]
    tables = powers.block(block_size)
    if num_blocks:
        part = _blocks(block_size, *main, grad)
        before, after = torch_backend.block_states(part.k, part.v, state, tables, reset)
        states = [*before, after[-1]]
    found = torch.zeros_like(pred[0]), torch.zeros_like(pred[1]), torch.zeros_like(pred[2])
    if num_predictions and pred[0].shape[2]:
        pred_tables = powers.block(pred[0].shape[2])
        twins = Blocks(*(by_head(x, state.dtype) for x in (*pred, grad_pred)))
        starts = torch.stack(states[offset : offset + num_predictions], dim=1)
        found = twins.gradients(starts, None, pred_tables)
        boundaries[:, offset : offset + num_predictions] = twins.to_state(pred_tables.from_start)
    grad_state = grad_state + boundaries[:, -1]
    if not num_blocks:
        dq, dk, dv = (torch.zeros_like(x) for x in main)
        return PopGradients(Gradients(dq, dk, dv, grad_state), found)
    added = part.to_state(tables.from_start) + boundaries[:, :-1]
    ends, grad_state = _sweep(grad_state, added, tables.across, reset)
    grads = part.gradients(torch.stack(states[:-1], dim=1), ends, tables)
    dq, dk, dv = (x.flatten(1, 2) for x in grads)
    return PopGradients(Gradients(dq, dk, dv, grad_state), found)


def packed_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    grad_state: Tensor,
    powers: DecayPowers,
    *,
    state: Tensor,
    chunk_size: int,
    packing: packed.Packing,
) -> Gradients:
    """Gradients of `packed.retention`: inputs (1, T, H, D), states (S, H, Dk, Dv)."""
    if q.shape[1] == 0:
        return Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), grad_state.clone())
    plan = packing.plan(chunk_size)
    width = plan.tokens.shape[1]
    filled = torch.arange(width, device=q.device) < plan.lengths[:, None]  # (chunks, C)
    q, k, v, grad = (
        x[0, plan.tokens].masked_fill(~filled[:, :, None, None], 0).unsqueeze(0) for x in (q, k, v, grad)
    )
    part = Blocks(*(by_head(x, state.dtype) for x in (q, k, v, grad)))
    starts, _ = packed.scan(part.k, part.v, state, powers, plan, filled)
    tables = powers.block(width)
    added = part.to_state(tables.from_start).squeeze(0)
    ends, grad_state = _packed_sweep(grad_state, added, packed.across_chunks(powers, plan), plan)
    tables = tables._replace(to_end=packed.to_chunk_end(powers, plan, width))
    found = part.gradients(starts.unsqueeze(0), ends.unsqueeze(0), tables)
    dq, dk, dv = (x[0, filled].unsqueeze(0) for x in found)
    return Gradients(dq, dk, dv, grad_state)


def _sweep(
    grad_state: Tensor, added: Tensor, across: Across, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each block, (B, N, H, Dk, Dv), and of the one before the first."""
    ends = []
    for n in range(added.shape[1] - 1, -1, -1):
        ends.append(grad_state)
        grad_state = advance(grad_state, across, added[:, n])
        if reset is not None:
            # What came before a reset has no influence; `where`, since 0 * NaN would carry a NaN back.
            grad_state = torch.where(reset[:, n, None, None, None], torch.zeros_like(grad_state), grad_state)
    return torch.stack(ends[::-1], dim=1), grad_state


def _packed_sweep(
    grad_state: Tensor, added: Tensor, across: Across, plan: packed.ChunkPlan
) -> tuple[Tensor, Tensor]:
    """As `_sweep` over the chunks of all sequences: (chunks, H, Dk, Dv), and (S, H, Dk, Dv)."""
    grad_state = grad_state[plan.order]
    ends = []
    for chunks in reversed(plan.steps):
        active = grad_state[: chunks.shape[0]]
        ends.append(active)
        before = advance(active, across.each(itemgetter(chunks)), added[chunks])
        grad_state = torch.cat((before, grad_state[chunks.shape[0] :]))
    in_order = torch.cat(ends)[torch.cat(plan.steps[::-1]).argsort()]
    return in_order, grad_state[plan.order.argsort()]


def _blocks(size: int, *tokens: Tensor) -> Blocks:
    return Blocks(*(by_head(x.unflatten(1, (-1, size)), x.dtype) for x in tokens))

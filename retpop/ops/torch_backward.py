"""The gradients of retention and POP by explicit formulas, a stretch of blocks at a time, as `torch_forward`.

With G the gradient of the state after a block of L tokens, S the state before it, and g_i the gradient of
output o_i:

    dq_i = Σ_{j<=i} c γ^(i-j) (g_i · v_j) k_j  +  c γ^(i+1) S g_i
    dk_j = Σ_{i>=j} c γ^(i-j) (g_i · v_j) q_i  +  γ^(L-1-j) G v_j
    dv_j = Σ_{i>=j} c γ^(i-j) (q_i · k_j) g_i  +  γ^(L-1-j) Gᵀ k_j
    dS   = γ^L G + Σ_i c γ^(i+1) q_i g_iᵀ

The last line runs backwards over the blocks, as the states run forwards; the others take blocks at once.
Everything is computed in the states' dtype, and each gradient cast to the dtype of what it belongs to; those
of packed sequences stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from retpop.ops import packed
from retpop.ops.blocks import Stretch, flat, scale_in_place, scaled, stretches
from retpop.ops.decay_powers import Across, BlockPowers, DecayPowers, advance, advance_in_place
from retpop.ops.rows import PopSpec
from retpop.ops.torch_forms import by_head
from retpop.ops.torch_forward import (
    Tokens,
    parts,
    prediction_stretches,
    readers_of,
    reset_boundaries,
)


class Blocks(NamedTuple):
    """Blocks of tokens with the gradient of their outputs, by head: each (N·B·H, L, D).

    Where only the last token's output is wanted, ``q`` and ``grad`` hold one token a block, and the tables
    that come with them are for it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    def gradients(
        self,
        read: Tensor,
        starts: Tensor,
        ends: Tensor | None,
        tables: BlockPowers,
        needs: Sequence[bool] = (True, True, True),
    ) -> list[Tensor | None]:
        """dq, dk and dv, laid out as the blocks; None where they are not needed.

        Args:
            read: ``grad`` times ``tables.from_start``.
            starts: the states before the blocks, (N, B, H, Dk, Dv).
            ends: the gradients of the states after them, likewise; None where nothing comes after.
            tables: the powers of γ for L tokens.
            needs: which of the three are wanted.
        """
        dq = dk = dv = None
        if needs[0] or needs[1]:
            pairs = scale_in_place(torch.bmm(self.grad, self.v.mT), tables.within)
        if needs[0]:
            dq = torch.bmm(pairs, self.k).baddbmm_(read, flat(starts).mT)
        if needs[1]:
            dk = torch.bmm(pairs.mT, self.q)
            if ends is not None:
                dk.baddbmm_(scaled(self.v, tables.to_end), flat(ends).mT)
        if needs[2]:
            scores = scale_in_place(torch.bmm(self.q, self.k.mT), tables.within)
            dv = torch.bmm(scores.mT, self.grad)
            if ends is not None:
                dv.baddbmm_(scaled(self.k, tables.to_end), flat(ends))
        return [dq, dk, dv]


def retention(
    tokens: Tokens,
    grad: Tensor,
    grad_state: Tensor,
    powers: DecayPowers,
    *,
    states: Tensor,
    chunk_size: int,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `torch_forward.retention`.

    Args:
        tokens: q, k, v, (B, T, H, D).
        grad: of the outputs, (B, T, H, Dv).
        grad_state: of the final state, (B, H, Dk, Dv).
        powers: the decays, with the scale c.
        states: what the forward pass kept.
        chunk_size: tokens in a chunk.
        needs: which gradients are wanted.

    Returns:
        dq, dk, dv and the gradient of the state before the first token; None where it is not wanted.
    """
    found = [x.new_empty(x.shape) for x in tokens]
    cuts = list(stretches(tokens[1], chunk_size))
    grads = states.new_empty(1 + (cuts[0].num_blocks if cuts else 0), *grad_state.shape)
    grads[0] = grad_state
    for part in reversed(cuts):  # the first place holds the gradient of the state after this stretch
        window = grads[: part.num_blocks + 1, part.rows]
        window[-1] = grads[0, part.rows]
        tables = powers.block(part.size)
        blocks = Blocks(*(part.take(x, states.dtype) for x in (*tokens, grad)))
        read = scaled(blocks.grad, tables.from_start)
        if any(needs[1:]):  # all but the queries' gradient come from later blocks as well
            flat(window[:-1]).baddbmm_(blocks.q.mT, read, beta=0)
            _carry_back(window, tables.across)
        starts = states[part.blocks, part.rows]
        _put((part,) * 3, found, blocks.gradients(read, starts, window[1:], tables, needs))
    return [x if need else None for x, need in zip((*found, grads[0].clone()), needs, strict=True)]


def pop(
    tokens: Tokens,
    grads: Tokens,
    grad_state: Tensor,
    spec: PopSpec,
    *,
    states: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `torch_forward.pop`.

    Args:
        tokens: q, k, v of rows, or of the sequence and then of the predictions.
        grads: of the outputs, one of rows or two.
        grad_state: of the final state, (B, H, Dk, Dv).
        spec: what is told beside them.
        states: what the forward pass returned.
        needs: which gradients are wanted.

    Returns:
        The gradients of ``tokens`` and of the state before the first block; None where it is not wanted.
    """
    found = [x.new_empty(x.shape) for x in tokens]
    (main, pred), ((grad,), (grad_pred,)), (into, into_pred) = (
        parts(x, spec) for x in (tokens, grads, found)
    )
    carried = needs[1] or needs[2] or needs[-1]  # keys, values and state: not the queries
    boundaries = torch.zeros_like(states)
    boundaries[-1] = grad_state
    for part in prediction_stretches(pred, spec):
        tables = spec.powers.block(part.size)
        blocks = Blocks(*(part.take(x, states.dtype) for x in (*pred, grad_pred)))
        read = scaled(blocks.grad, tables.from_start)
        starts, grad_starts = (x[spec.offset :][part.blocks, part.rows] for x in (states, boundaries))
        if carried:
            flat(grad_starts).baddbmm_(blocks.q.mT, read)
        _put((part,) * 3, into_pred, blocks.gradients(read, starts, None, tables, needs[-4:-1]))
    resets = reset_boundaries(spec)
    for part in reversed(list(stretches(main[1], spec.block_size))):
        at = slice(part.blocks.start, part.blocks.stop + 1), part.rows
        window, starts = boundaries[at], states[part.blocks, part.rows]
        readers, tables = readers_of(part, spec)
        places = readers, part, part, readers
        pairs = zip(places, (*main, grad), strict=True)
        blocks = Blocks(*(place.take(x, states.dtype) for place, x in pairs))
        read = scaled(blocks.grad, tables.from_start)
        if carried:
            flat(window[:-1]).baddbmm_(blocks.q.mT, read)
            _carry_back(window, tables.across, None if resets is None else resets[at])
        _put(places[:3], into, blocks.gradients(read, starts, window[1:], tables, needs[:3]))
    return [x if need else None for x, need in zip((*found, boundaries[0].clone()), needs, strict=True)]


def packed_retention(
    tokens: Tokens,
    grad: Tensor,
    grad_state: Tensor,
    powers: DecayPowers,
    *,
    state: Tensor,
    chunk_size: int,
    packing: packed.Packing,
) -> list[Tensor | None]:
    """Gradients of `packed.retention`: dq, dk and dv, (1, T, H, D), and that of the states (S, H, Dk, Dv)."""
    if grad.shape[1] == 0:
        dq, dk, dv = (torch.zeros_like(x) for x in tokens)
        return [dq, dk, dv, grad_state.clone()]
    plan = packing.plan(chunk_size)
    width = plan.tokens.shape[1]
    filled = torch.arange(width, device=grad.device) < plan.lengths[:, None]  # (chunks, C)
    q, k, v, grad = (
        by_head(x[0, plan.tokens].masked_fill(~filled[:, :, None, None], 0).unsqueeze(0), state.dtype)
        for x in (*tokens, grad)
    )
    starts, _ = packed.scan(k, v, state, powers, plan, filled)
    part = Blocks(*(x.flatten(0, 2) for x in (q, k, v, grad)))
    tables = powers.block(width)._replace(to_end=packed.to_chunk_end(powers, plan, width))
    read = scaled(part.grad, tables.from_start)
    added = torch.bmm(part.q.mT, read).view(starts.shape)
    ends, grad_state = _packed_sweep(grad_state, added, packed.across_chunks(powers, plan), plan)
    found = part.gradients(read, starts, ends, tables)
    unpacked = (
        x.view(like.shape).transpose(2, 3)[0, filled].unsqueeze(0)
        for x, like in zip(found, (q, k, v), strict=True)
        if x is not None
    )
    return [*unpacked, grad_state]


def _put(places: Sequence[Stretch], into: Tokens, found: Sequence[Tensor | None]) -> None:
    for place, x, gradient in zip(places, into, found, strict=True):
        if gradient is not None:
            place.put(x, gradient)


def _carry_back(grads: Tensor, across: Across, resets: Tensor | None = None) -> None:
    """Add to the gradients of states (N + 1, B, H, Dk, Dv) what comes from the states after them.

    The last of them is finished. The others hold what comes from outputs.
    """
    for n in range(grads.shape[0] - 2, -1, -1):
        advance_in_place(grads[n + 1], across, grads[n])
        if resets is not None:  # what came before has no influence; 0 * NaN would carry a NaN back
            grads[n].masked_fill_(resets[n], 0)


def _packed_sweep(
    grad_state: Tensor, added: Tensor, across: Across, plan: packed.ChunkPlan
) -> tuple[Tensor, Tensor]:
    """Gradients of the states after all chunks, (chunks, H, Dk, Dv), and of those before all sequences."""
    grad_state = grad_state[plan.order]
    ends = []
    for chunks in reversed(plan.steps):
        active = grad_state[: chunks.shape[0]]
        ends.append(active)
        before = advance(active, across.each(itemgetter(chunks)), added[chunks])
        grad_state = torch.cat((before, grad_state[chunks.shape[0] :]))
    in_order = torch.cat(ends)[torch.cat(plan.steps[::-1]).argsort()]
    return in_order, grad_state[plan.order.argsort()]

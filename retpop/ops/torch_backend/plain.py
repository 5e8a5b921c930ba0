"""Retention and POP in plain PyTorch operations, which autograd, compilers and transforms see through.

There are two main functions. `block_states` finds the state at every boundary between blocks;
`block_outputs` computes the outputs of all blocks at once, each from its own state. Parallel mode is one
block of T tokens, chunkwise mode many blocks, and POP adds a second `block_outputs` for the prediction
blocks:

    B_{n+1} = γ^L B_n + Σ_j γ^(L-1-j) k_jᵀ v_j
    o_i     = c γ^(i+1) q_i B_n + Σ_{j<=i} c γ^(i-j) (q_i · k_j) v_j

Source: RetNet, arXiv 2307.08621, equations 5 (parallel), 6 (recurrent), 7 (chunkwise); POP, arXiv
2402.05643, section 3.2.

All of it is computed in the states' dtype, float32 or wider. A product of bfloat16 matrices is rounded to
bfloat16, and two or three such roundings double the error of the outputs (docs/performance_notes.md). float16
cannot hold sums over a few thousand tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retpop.arguments import is_transformed, state_dtype, zero_state
from retpop.ops.powers import BlockPowers, DecayPowers, advance, advance_in_place, restart
from retpop.ops.rows import PopSpec, join_row, split_row

DEFAULT_CHUNK_SIZE = 64

ROWS_AT_ONCE = 128
"""Queries that parallel mode takes at once, with the keys up to the last of them."""


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    *,
    mode: str,
    state: Tensor | None,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Retention of inputs (B, T, H, D) in one of the three modes; returns outputs and final state."""
    length = q.shape[1]
    if length == 1:
        out, state = _token(q, k, v, powers, state)
    elif mode == "parallel" and length:
        out, state = _parallel(q, k, v, powers, state)
    else:
        state = zero_state(q, v, q.shape[0]) if state is None else state
        if length == 0:
            out, state = v.clone(), state.clone()  # empty, and part of the graph
        elif mode == "recurrent":
            out, state = _recurrent(q, k, v, powers, state)
        else:
            out, state = _chunkwise(q, k, v, powers, state, chunk_size)
    return (out if out.dtype == out_dtype else out.to(out_dtype)), state


def pop(tokens: Sequence[Tensor], state: Tensor, spec: PopSpec) -> tuple[Tensor, ...]:
    """POP of three rows, or of sequence and prediction tensors; returns outputs and final state."""
    if len(tokens) == 3:
        (q, q_pred), (k, k_pred), (v, v_pred) = (split_row(x, spec.predictions) for x in tokens)
        out, pred, final = pop((q, k, v, q_pred, k_pred, v_pred), state, spec)
        return join_row(out, pred), final
    q, k, v, q_pred, k_pred, v_pred = tokens
    out_dtype = spec.out_dtype or v.dtype
    if k.shape[1]:
        out, states = _pop_blocks(q, k, v, spec, state)
    else:  # predictions only, which need no powers for a block
        out, states = v.clone(), [state.clone()]
    if q_pred.shape[1] and q_pred.shape[2]:
        starts = torch.stack(states[spec.offset : spec.offset + q_pred.shape[1]], dim=1)
        tables = spec.powers.block(q_pred.shape[2])
        q_pred, k_pred, v_pred = (by_head(x, state.dtype) for x in (q_pred, k_pred, v_pred))
        pred = by_token(block_outputs(q_pred, k_pred, v_pred, starts, tables))
    else:
        pred = v_pred.clone()
    return out.to(out_dtype), pred.to(out_dtype), states[-1]


def block_states(
    k: Tensor, v: Tensor, state: Tensor, tables: BlockPowers, reset: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The states before and after each of N blocks, (B, H, Dk, Dv) each: they differ where ``reset`` is.

    Args:
        k, v: (B, N, H, L, D).
        state: B_0, (B, H, Dk, Dv).
        tables: the powers of γ for L tokens.
        reset: (B, N), bool: B_n is zero where reset[:, n].
    """
    added = block_additions(k, v, tables.to_end)
    before, after = [], []
    for n, added_by_block in enumerate(added.unbind(1)):
        if reset is not None:
            state = restart(state, reset[:, n])
        before.append(state)
        state = advance(state, tables.across, added_by_block)
        after.append(state)
    return before, after


def block_additions(k: Tensor, v: Tensor, to_end: Tensor) -> Tensor:
    """What each block of (B, N, H, L, D) adds to the state after it: (B, N, H, Dk, Dv)."""
    return (k * to_end).transpose(-1, -2) @ v


def block_outputs(q: Tensor, k: Tensor, v: Tensor, states: Tensor, tables: BlockPowers) -> Tensor:
    """The outputs of all blocks at once, each from the state before it.

    Args:
        q, k, v: (B, N, H, L, D).
        states: (B, N, H, Dk, Dv).
        tables: the powers of γ for L tokens, with the scale c in them.

    Returns:
        (B, N, H, L, Dv).
    """
    out = weighted(q @ k.transpose(-1, -2), tables.within) @ v
    if is_transformed():
        return torch.addcmul(out, q @ states, tables.from_start)
    return out.addcmul_(q @ states, tables.from_start)


def weighted(scores: Tensor, within: Tensor) -> Tensor:
    """Scores times powers of γ, in place of the scores, which have no other reader."""
    return scores * within if is_transformed() else scores.mul_(within)


def by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks (B, N, L, H, D) cast and laid out as (B, N, H, L, D), so that no product copies them again."""
    return x.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format).contiguous()


def by_token(x: Tensor) -> Tensor:
    """The other way round, as a view."""
    return x.transpose(2, 3)


def widen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in the dtype of their states."""
    dtype = state_dtype(v.dtype)
    return (q, k, v) if v.dtype == dtype else (q.to(dtype), k.to(dtype), v.to(dtype))


def _pop_blocks(q: Tensor, k: Tensor, v: Tensor, spec: PopSpec, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs of the main sequence, and the states B_0 .. B_N at its boundaries."""
    k, v = _blocks(k, spec.block_size, state.dtype), _blocks(v, spec.block_size, state.dtype)
    tables = spec.powers.block(spec.block_size)
    before, after = block_states(k, v, state, tables, spec.reset)
    if spec.main_out == "last":  # the last token reads the state after its block, as in a recurrent step
        out = read(q.to(state.dtype), torch.stack(after, dim=1), spec.powers.scale)
    else:
        q = _blocks(q, spec.block_size, state.dtype)
        out = by_token(block_outputs(q, k, v, torch.stack(before, dim=1), tables)).flatten(1, 2)
    return out, [*before, after[-1]]


def _blocks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return by_head(x.unflatten(1, (-1, size)), dtype)


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    q, k, v = (_blocks(x, size, state.dtype) for x in (q, k, v))
    tables = powers.block(size)
    before, after = block_states(k, v, state, tables)
    out = block_outputs(q, k, v, torch.stack(before, dim=1), tables)
    return by_token(out).flatten(1, 2), after[-1]


def _parallel(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One block of T tokens; scores are computed some rows at a time, without the zero half."""
    length, dtype = q.shape[1], state_dtype(v.dtype)
    q, k, v = (_blocks(x, length, dtype) for x in (q, k, v))
    tables = powers.block(length)
    outs = []
    starts = [0] if torch.compiler.is_compiling() else range(0, length, ROWS_AT_ONCE)
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        scores = q[..., start:end, :] @ k[..., :end, :].transpose(-1, -2)
        outs.append(weighted(scores, tables.within[:, start:end, :end]) @ v[..., :end, :])
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-2)
    after = block_additions(k, v, tables.to_end).squeeze(1)
    if state is not None:
        out = torch.addcmul(out, q @ state.unsqueeze(1), tables.from_start)
        after = advance(state, tables.across, after)
    return by_token(out).flatten(1, 2), after


def _chunkwise(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """All full chunks at once, then the remaining tokens as one shorter block."""
    length = q.shape[1]
    full = length - length % chunk_size
    sizes = [full, length - full] if 0 < full < length else [length]
    outs = []
    for q_part, k_part, v_part in zip(*(x.split(sizes, dim=1) for x in (q, k, v)), strict=True):
        size = min(chunk_size, q_part.shape[1])
        out, state = _blockwise(q_part, k_part, v_part, powers, state, size)
        outs.append(out)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)), state


def _token(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token, (B, 1, H, D). Decoding repeats this step, so every operation counts."""
    q, k, v = widen(q, k, v)
    after = k.squeeze(1).unsqueeze(-1) * v.transpose(1, 2)  # kᵀ v, (B, H, Dk, Dv)
    if state is not None:
        after = advance_in_place(state, powers.across_token(), after)
    return read(q, after, powers.scale), after


def _recurrent(q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor) -> tuple[Tensor, Tensor]:
    across = powers.across_token()
    q, k, v = widen(q, k, v)
    outs = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unsqueeze(-1).unbind(1), v.unsqueeze(-2).unbind(1), strict=True):
        state = advance_in_place(state, across, k_t * v_t)
        outs.append(read(q_t, state, powers.scale))
    return torch.stack(outs, dim=1), state


def read(q: Tensor, state: Tensor, scale: float) -> Tensor:
    """The output c · q S of queries (..., H, Dk) at as many states (..., H, Dk, Dv): (..., H, Dv)."""
    rows = q.reshape(-1, 1, q.shape[-1]) * scale
    out = torch.bmm(rows, state.reshape(-1, *state.shape[-2:]))  # `matmul` has twice the overhead
    return out.view(*q.shape[:-1], state.shape[-1])

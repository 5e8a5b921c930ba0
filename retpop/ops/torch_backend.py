"""Retention and POP in plain PyTorch operations: the fast form for a CPU, and for any device.

Everything rests on two functions. `block_states` finds the state at every boundary between blocks;
`attend` computes the outputs of all blocks at once, each from its own state. Parallel mode is one block of
T tokens, chunkwise mode many blocks, and POP adds a second `attend` for the prediction blocks:

    B_{n+1} = γ^L B_n + Σ_j γ^(L-1-j) k_jᵀ v_j
    o_i     = c γ^(i+1) q_i B_n + Σ_{j<=i} c γ^(i-j) (q_i · k_j) v_j

Source: RetNet, arXiv 2307.08621, equations 5 (parallel), 6 (recurrent), 7 (chunkwise); POP, arXiv
2402.05643, section 3.2.

All of it is computed in the states' dtype, float32 or wider: rounding scores and states to bfloat16 on
their way would triple the error of the outputs, and float16 cannot hold sums over a few thousand tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from retpop.ops.decay_powers import Across, BlockPowers, DecayPowers, advance
from retpop.ops.dtypes import state_dtype

DEFAULT_CHUNK_SIZE = 64


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    *,
    mode: str,
    state: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Retention of inputs (B, T, H, D) in one of the three modes; returns outputs and final state."""
    length = q.shape[1]
    if state is None:
        state = zero_state(q, v, q.shape[0])
    if length == 0:
        return v.clone(), state  # empty, and part of the graph
    dtype = v.dtype
    q, k, v = widen(q, k, v)
    if mode == "recurrent" or length == 1:
        out, state = _recurrent(q, k, v, powers, state)
    elif mode == "parallel":
        out, state = _blockwise(q, k, v, powers, state, length)
    else:
        out, state = _chunkwise(q, k, v, powers, state, chunk_size or DEFAULT_CHUNK_SIZE)
    return out.to(dtype), state


def pop_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    powers: DecayPowers,
    *,
    block_size: int,
    offset: int,
    state: Tensor | None,
    reset: Tensor | None,
    main_out: str = "all",
) -> tuple[Tensor, Tensor, Tensor]:
    """POP of tokens (B, N·L, H, D) and predictions (B, P, M, H, D); outputs, predictions, final state.

    With ``main_out="last"``, ``q`` and the outputs are those of the last token of each block, (B, N, H, D).
    """
    if state is None:
        state = zero_state(q, v, q.shape[0])
    if k.shape[1]:
        out, states = _pop_blocks(q, k, v, powers, block_size, state, reset, main_out)
    else:  # predictions alone, which need no powers for a block
        out, states = v.clone(), [state]
    if q_pred.shape[1] and q_pred.shape[2]:
        starts = torch.stack(states[offset : offset + q_pred.shape[1]], dim=1)
        pred = attend(*widen(q_pred, k_pred, v_pred), starts, powers.block(q_pred.shape[2])).to(v_pred.dtype)
    else:
        pred = v_pred.clone()
    return out, pred, states[-1]


def block_states(
    k: Tensor, v: Tensor, state: Tensor, tables: BlockPowers, reset: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The states before and after each of N blocks, (B, H, Dk, Dv) each: they differ where ``reset`` is.

    Args:
        k, v: (B, N, L, H, D).
        state: B_0, (B, H, Dk, Dv).
        tables: the powers of γ for L tokens.
        reset: (B, N), bool: B_n is zero where reset[:, n].
    """
    added = block_additions(k, v, tables.to_end)
    before, after = [], []
    for n, added_by_block in enumerate(added.unbind(1)):
        if reset is not None:
            # `where`, not a product: 0 * NaN would carry a NaN over into the next episode.
            state = torch.where(reset[:, n, None, None, None], torch.zeros_like(state), state)
        before.append(state)
        state = advance(state, tables.across, added_by_block)
        after.append(state)
    return before, after


def block_additions(k: Tensor, v: Tensor, to_end: Tensor) -> Tensor:
    """What each block of (B, N, L, H, D) adds to the state after it: (B, N, H, Dk, Dv)."""
    k, v = _by_head(k), _by_head(v)
    return (k * to_end).transpose(-1, -2) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, states: Tensor, tables: BlockPowers) -> Tensor:
    """The outputs of all blocks at once, each from the state before it.

    Args:
        q, k, v: (B, N, L, H, D).
        states: (B, N, H, Dk, Dv).
        tables: the powers of γ for L tokens, with the scale c in them.

    Returns:
        (B, N, L, H, Dv).
    """
    batch, num_blocks, _, num_heads = q.shape[:4]
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    scores = (q @ k.transpose(-1, -2)) * tables.within
    from_state = (q * tables.from_start) @ states
    # One addition inside the product: one pass over memory less than `from_state + scores @ v`.
    out = torch.baddbmm(*(x.flatten(0, 2) for x in (from_state, scores, v)))
    return rearrange(out, "(b n h) l d -> b n l h d", b=batch, n=num_blocks, h=num_heads)


def _by_head(x: Tensor) -> Tensor:
    return rearrange(x, "b n l h d -> b n h l d")


def zero_state(q: Tensor, v: Tensor, rows: int) -> Tensor:
    """The state before any token, (rows, H, Dk, Dv)."""
    return q.new_zeros(rows, *q.shape[2:], v.shape[-1], dtype=state_dtype(q.dtype))


def widen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in the dtype of their states, which is what everything here is computed in."""
    dtype = state_dtype(v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _pop_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    block_size: int,
    state: Tensor,
    reset: Tensor | None,
    main_out: str,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs of the main sequence, and the states B_0 .. B_N at its boundaries."""
    dtype = v.dtype
    q, k, v = widen(q, k, v)
    k, v = _blocks(k, block_size), _blocks(v, block_size)
    tables = powers.block(block_size)
    before, after = block_states(k, v, state, tables, reset)
    if main_out == "last":  # the last token reads the state after its block, as in a recurrent step
        out = read(q, torch.stack(after, dim=1), powers.scale)
    else:
        out = attend(_blocks(q, block_size), k, v, torch.stack(before, dim=1), tables)
        out = rearrange(out, "b n l h d -> b (n l) h d")
    return out.to(dtype), [*before, after[-1]]


def _blocks(x: Tensor, size: int) -> Tensor:
    return rearrange(x, "b (n l) h d -> b n l h d", l=size)


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    q, k, v = (_blocks(x, size) for x in (q, k, v))
    tables = powers.block(size)
    before, after = block_states(k, v, state, tables)
    out = attend(q, k, v, torch.stack(before, dim=1), tables)
    return rearrange(out, "b n l h d -> b (n l) h d"), after[-1]


def _chunkwise(
    q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Full chunks all at once, then the tokens left over as one shorter block."""
    length = q.shape[1]
    full = length - length % chunk_size
    outs = []
    if full:
        out, state = _blockwise(q[:, :full], k[:, :full], v[:, :full], powers, state, chunk_size)
        outs.append(out)
    if full < length:
        out, state = _blockwise(q[:, full:], k[:, full:], v[:, full:], powers, state, length - full)
        outs.append(out)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)), state


def _recurrent(q: Tensor, k: Tensor, v: Tensor, powers: DecayPowers, state: Tensor) -> tuple[Tensor, Tensor]:
    across = powers.across(torch.ones(1, 1, dtype=torch.int64, device=q.device))
    outs = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
        state = step(k_t, v_t, state, across)
        outs.append(read(q_t, state, powers.scale))
    return torch.stack(outs, dim=1), state


def step(k: Tensor, v: Tensor, state: Tensor, across: Across) -> Tensor:
    """The state after one more token of keys and values (B, H, D): γ S + kᵀ v."""
    return advance(state, across, k.unsqueeze(-1) * v.unsqueeze(-2))


def read(q: Tensor, state: Tensor, scale: float) -> Tensor:
    """The output c · q S of queries (..., H, Dk) at their states: (..., H, Dv)."""
    return (scale * q.unsqueeze(-2) @ state).squeeze(-2)

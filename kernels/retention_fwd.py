"""Chunkwise retention, forward: outputs and final state of plain or packed sequences, by two schedules.

With S the state before a chunk of n tokens:

    o_i = c γ^(i+1) q_i S + Σ_{j<=i} c γ^(i-j) (q_i · k_j) v_j
    S'  = γ^n S + Σ_j γ^(n-1-j) k_jᵀ v_j

A *stretch* is a run of tokens of a sequence that one program walks, chunk by chunk, with the state in
registers and the next chunk on its way. A program owns a stretch, a head and a slice of Dv.

One sweep: a stretch is a whole sequence, one launch does it all, and only inputs and outputs move.
Split: where batch x heads x slices leave much of the GPU idle, sequences are cut into stretches, and there
are three launches: what each stretch adds to the state (it reads k and v), a scan over stretches, and the
sweep of every stretch from its own state. `configs.retention_config` chooses; results agree to rounding.

Packed sequences find their bounds on the device, so that nothing is read on the host. The number of their
stretches is known only there: the grid of a split has room for the largest possible number, and the programs
left over do nothing.

Grid: (stretches · H · slices of Dv,), slices next to each other, because they read the same q and k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split, tiles
from .configs import RetentionConfig, retention_config
from .launch import (
    Launch,
    Target,
    dot_precision,
    launched,
    named_strides,
    target_of,
    token_strides,
    with_contiguous_rows,
)
from .retention_step import plan_retention_step


@triton.jit(do_not_specialize=split.RUN_TIME)
def retention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_log_decay,
    p_state,
    p_bounds,
    p_reset,
    p_out,
    p_final,
    scale,
    H,
    T,
    num_sequences,
    stretch,
    per_sequence,
    stride_q_b: tl.int64,
    stride_q_t,
    stride_q_h,
    stride_k_b: tl.int64,
    stride_k_t,
    stride_k_h,
    stride_v_b: tl.int64,
    stride_v_t,
    stride_v_h,
    stride_out_b: tl.int64,
    stride_out_t,
    stride_out_h,
    stride_state_b,
    stride_state_h,
    stride_state_k,
    stride_state_v,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS_K: tl.constexpr,
    COLS_V: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    UNIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The sweep of one stretch, with p_state the state before each stretch (None: zeros):

        o_i = c γ^(i+1) q_i S + Σ_{j<=i} c γ^(i-j) (q_i · k_j) v_j,   S <- γ^n S + Σ_j γ^(n-1-j) k_jᵀ v_j

    chunk by chunk; the stretch that ends a sequence leaves S in p_final (None: nowhere). Strides of token
    tensors are counted in UNIT elements. Where p_reset is set, a chunk begins, and S before it is 0. EARLY: a
    split, in which a head that forgets fast enough starts its stretches early, from zeros (`split.forgets`).
    """
    stride_q_t = tiles.token_stride(stride_q_t, 0, UNIT)
    stride_k_t = tiles.token_stride(stride_k_t, stride_q_t, UNIT)
    stride_v_t = tiles.token_stride(stride_v_t, stride_k_t, UNIT)
    stride_out_t = tiles.token_stride(stride_out_t, stride_q_t, UNIT)
    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_nh = tl.program_id(0) // SLICES
    i_n = i_nh // H
    i_h = (i_nh % H).to(tl.int64)
    i_s, i_row, start, end, first, last = split.find_stretch(
        i_n, p_bounds, T, num_sequences, stretch, per_sequence, SEQUENCES
    )
    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    early = 0
    if EARLY:
        early = tl.where(first < start, split.early_tokens(log_decay, stretch, ROWS), 0)
    if p_bounds is None:
        p_q += i_row.to(tl.int64) * stride_q_b * UNIT
        p_k += i_row.to(tl.int64) * stride_k_b * UNIT
        p_v += i_row.to(tl.int64) * stride_v_b * UNIT
        p_out += i_row.to(tl.int64) * stride_out_b * UNIT
    p_q += i_h * stride_q_h * UNIT
    p_k += i_h * stride_k_h * UNIT
    p_v += i_h * stride_v_h * UNIT
    p_out += i_h * stride_out_h * UNIT

    if p_state is None:
        b_state = tl.zeros((COLS_K, COLS_V), tl.float32)
    else:
        p_state += i_n.to(tl.int64) * stride_state_b + i_h * stride_state_h
        has_state = ((start < end) | (end == last)) & (early == 0)  # one that is left over has none
        rows = tl.where(has_state, DK, 0)
        strides = (stride_state_k, stride_state_v)
        b_state = tiles.load_state(p_state, strides, first_col, COLS_K, COLS_V, rows, DV)
    if EARLY:
        b_state = split.take_in(
            b_state,
            p_k,
            p_v,
            stride_k_t,
            stride_v_t,
            tl.where(start < end, start - early, start),
            start,
            first_col,
            log_decay,
            ROWS,
            (COLS_K, COLS_V, DK, DV),
            PRECISION,
            SCALE_V,
            True,
        )
    b_within = tiles.decay_within(log_decay, scale, ROWS)
    b_from_start = tiles.decay_from_start(log_decay, scale, ROWS)
    loop_end = end
    if p_reset is not None:
        p_reset += i_row.to(tl.int64) * T
        loop_end += split.count_resets(p_reset, start, end) * ROWS  # each may cut a chunk in two
    stop = start
    for i in range(start, loop_end, ROWS):
        if p_reset is None:
            i_t = i
            stop = end
        else:
            i_t = stop
            stop = split.end_of_chunk(p_reset, i_t, end, ROWS)
            b_state = tl.where(split.is_reset(p_reset, i_t, end), 0.0, b_state)
        # Ahead of the loads: otherwise sm_90's registers hold both forms of the state at once.
        b_operand, grow = tiles.as_operand(b_state, p_k.dtype.element_ty)
        b_q = tiles.load_tile(p_q, stride_q_t, stop, 0, ROWS, COLS_K, DK, i_t)
        b_k = tiles.load_tile(p_k, stride_k_t, stop, 0, ROWS, COLS_K, DK, i_t)
        b_v = tiles.load_tile(p_v, stride_v_t, stop, first_col, ROWS, COLS_V, DV, i_t)
        b_q, grow_q = tiles.as_operand(b_q, b_k.dtype, tiles.LARGEST_TOKEN)
        b_out = tiles.chunk_output(b_q, b_k, b_v, b_operand, grow, b_from_start, b_within, PRECISION)
        tiles.store_tile(p_out, b_out * grow_q, stride_out_t, stop, first_col, ROWS, COLS_V, DV, i_t)
        length = tl.minimum(stop - i_t, ROWS)
        b_to_end = tiles.decay_to_end(log_decay, length, ROWS)
        whole, rest = tiles.decay_across(log_decay, length)
        b_state = tiles.chunk_state(b_state, b_k, b_v, b_to_end, whole, rest, PRECISION, SCALE_V)
    if p_final is not None:
        p_final += (i_s.to(tl.int64) * H + i_h) * (DK * DV)
        tiles.store_tile(p_final, b_state, DV, tl.where(end == last, DK, 0), first_col, COLS_K, COLS_V, DV)


def plan_retention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    states: Tensor | None = None,
    with_final: bool = True,
    with_states: bool = False,
    config: RetentionConfig | None = None,
    target: Target | None = None,
) -> tuple[list[Launch], tuple[Tensor | None, ...]]:
    """The launches of `retention_fwd`, and the tensors that they fill; the state is one only `with_final`.

    Queries may be wider than keys and values: those of the backward are gradients of outputs. It may also
    give the ``states`` before each stretch, found with the same stretch: then they are not found again.
    """
    if q.shape[1] == 1 and cu_seqlens is None and reset is None and config is None:
        step = (x.squeeze(1) for x in (q, k, v))
        launches, (out, final) = plan_retention_step(
            *step, log_decay, state, scale, out_dtype=out_dtype, with_final=with_final, target=target
        )
        return launches, (out.unsqueeze(1), final, None)[: 2 + with_states]
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = torch.empty((B, T, H, Dv), dtype=out_dtype or v.dtype, device=v.device)
    final = torch.empty((sequences, H, Dk, Dv), dtype=torch.float32, device=v.device)
    if sequences == 0 or T == 0:
        final = final.zero_() if state is None else final.copy_(state)
        return [], (out, final, None)[: 2 + with_states]
    target = target or target_of(q.device)
    precision = dot_precision(v.dtype, target.architecture, (Dk, Dv))
    if config is None:
        config = retention_config(
            tokens=B * T,
            sequences=sequences,
            num_heads=H,
            head_dims=(Dk, Dv),
            dtype=v.dtype,
            precision=precision,
            **target._asdict(),
        )
    if reset is not None:
        config = replace(config, stretch=None)
    q, k, v = (with_contiguous_rows(x) for x in (q, k, v))
    shared = {
        **{"p_log_decay": log_decay.contiguous(), "H": H, "T": T, "num_sequences": sequences},
        **{"p_bounds": None if cu_seqlens is None else cu_seqlens.contiguous()},
    }
    tokens = {"q": q, "k": k, "v": v, "out": out}
    launches: list[Launch] = []
    stretches, stretch = split.cut(T, sequences, config.stretch, packed=cu_seqlens is not None)
    shared |= stretch
    if config.stretch is None:
        states = None
    elif states is None:
        launches, states = split.plan_states(
            *(k, v, state, None, shared, config),
            stretches=stretches,
            rows=config.rows,
            precision=precision,
        )
    before = state if states is None else states
    sweep = Launch(
        kernel=retention_fwd_kernel,
        grid=(stretches * H * triton.cdiv(Dv, config.cols_v),),
        arguments={
            **shared,
            **{f"p_{name}": x for name, x in tokens.items()},
            **{"p_reset": None if reset is None else reset.contiguous(), "p_state": before},
            **{"p_final": final if with_final else None, "scale": scale},
            **{"DK": Dk, "DV": Dv, "ROWS": config.rows, "COLS_K": config.cols_k, "COLS_V": config.cols_v},
            **{"PRECISION": precision, "SCALE_V": config.scale_v},
            **token_strides(tokens),
            **named_strides("state", before, "bhkv"),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return [*launches, sweep], (out, final, states)[: 2 + with_states]


def retention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    with_states: bool = False,
    config: RetentionConfig | None = None,
) -> tuple[Any, ...]:
    """Retention of T tokens from a state.

    Args:
        q, k: (B, T, H, Dk), any strides; float32, float16 or bfloat16, as v.
        v: (B, T, H, Dv).
        log_decay: ln γ, (H,), float32; -inf for γ = 0.
        state: (B, H, Dk, Dv) float32 before the first token; None: zeros.
        scale: c.
        cu_seqlens: bounds of S sequences packed into one row, (S + 1,), int32 or int64, on the device; states
            are then (S, H, Dk, Dv), and that of an empty sequence passes through.
        reset: (B, T), bool: where set, the state is 0 before the token; None: nowhere. Sequences then go in
            one sweep.
        out_dtype: of out, None for v's; float32 holds what float16 cannot, the sums of a slow decay.
        with_states: whether to return the states before all stretches.
        config: tiles and schedule; None: `configs.retention_config` chooses, or for one token the kernel of
            `retention_step` runs.

    Returns:
        out (B, T, H, Dv), and the state after the last token, float32. Both are new. ``with_states``: also
        the states before all stretches of a split, which `retention_bwd` takes, or None without a split.
    """
    arguments = (q, k, v, log_decay, state, scale, cu_seqlens, reset)
    outputs: tuple[Any, ...] = launched(
        plan_retention_fwd,
        *arguments,
        target=target_of(q.device),
        out_dtype=out_dtype,
        with_states=with_states,
        config=config,
    )
    return outputs

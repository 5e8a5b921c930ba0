"""Chunkwise retention, backward: gradients of queries, keys, values and the first state, plain or packed.

With S_i the state after token i, g_i the gradient of output o_i, G_j that of the state after token j, c the
scale:

    dq_i = c g_i S_iᵀ          dk_j = v_j G_jᵀ          dv_j = k_j G_j

dq has the form of an output o_i = c q_i S_i: it is `retention_fwd` on (g, v, k) with the state transposed. dk
and dv come from reverse sweeps, chunk by chunk from the last. With E the gradient of the state after a chunk
of n tokens:

    dv_j = γ^(n-1-j) k_j E  + Σ_{i>=j} c γ^(i-j) (k_j·q_i) g_i
    dk_j = γ^(n-1-j) v_j Eᵀ + Σ_{i>=j} c γ^(i-j) (v_j·g_i) q_i
    E'   = γ^n E + Σ_i c γ^(i+1) q_iᵀ g_i

One sweep finds both where a program holds all of E: head dims up to 64, or 128 (`configs_bwd`). Beyond, there
is one for each, in slices: a program with a slice of Dv would hold only part of dk's sum over Dv, and no
float is added atomically.

Schedules are the forward's, backwards: one launch whose stretches are whole sequences; or, where those leave
much of the GPU idle, what each stretch adds to E (the same kernel, writing no dk and dv), a scan from the
last stretch to the first, and the sweep of every stretch from its own E. For dq a split needs the state
before each stretch. The forward, if it was split, has found just these: given them, dq is one launch.
`configs_bwd.retention_bwd_config` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import split, tiles
from .configs import padded, retention_config
from .configs_bwd import RetentionBwdConfig, Sweep, retention_bwd_config, sweeps_for
from .launch import (
    Launch,
    Target,
    Tensors,
    dot_precision,
    launched,
    target_of,
    token_strides,
    with_contiguous_rows,
    zero,
)
from .retention_fwd import plan_retention_fwd


@triton.jit
def _pull_chunks(
    pointers,
    strides,
    place,
    b_grad,
    powers,
    p_reset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
):
    """`tiles.pull_tile` for each chunk, the last first; returns the gradient of the state before the first.

    Args:
        pointers, strides: as `tiles.pull_tile` takes them.
        place: first token, end, first column of the slice.
        b_grad: E after the last token.
        powers: ln γ, within (transposed), from_start.
        p_reset: of token 0, or None.
    """
    start, last, first_col = place
    log_decay, b_within, b_from_start = powers
    end = last
    num_chunks = tl.cdiv(end - start, ROWS)
    if p_reset is not None:
        num_chunks += split.count_resets(p_reset, start, end)  # each may cut a chunk in two
    for i in range(num_chunks):
        if p_reset is None:
            i_t = start + (num_chunks - 1 - i) * ROWS
        else:
            b_grad = tl.where(split.is_reset(p_reset, end, last), 0.0, b_grad)
            i_t = split.start_of_chunk(p_reset, start, end, ROWS)
        length = tl.minimum(end - i_t, ROWS)
        whole, rest = tiles.decay_across(log_decay, length)
        b_grad = tiles.pull_tile(
            pointers,
            strides,
            (i_t, end, end, end, first_col),
            b_grad,
            b_grad,
            (tiles.decay_to_end(log_decay, length, ROWS), b_within, b_from_start, whole, rest),
            ROWS,
            COLUMNS,
            PRECISION,
            SCALE_V,
        )
        if p_reset is not None:
            end = i_t
    if p_reset is not None:
        b_grad = tl.where(split.is_reset(p_reset, end, last), 0.0, b_grad)
    return b_grad


@triton.jit(do_not_specialize=split.RUN_TIME)
def retention_bwd_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_dk,
    p_dv,
    p_log_decay,
    p_after,
    p_bounds,
    p_reset,
    p_before,
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
    stride_g_b: tl.int64,
    stride_g_t,
    stride_g_h,
    stride_dk_b: tl.int64,
    stride_dk_t,
    stride_dk_h,
    stride_dv_b: tl.int64,
    stride_dv_t,
    stride_dv_h,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLS_K: tl.constexpr,
    COLS_V: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EARLY: tl.constexpr,
    FIRST: tl.constexpr,
):
    """The reverse sweep of one stretch, with p_after E after each stretch (None: zeros):

        dv_j = γ^(n-1-j) k_j E  + Σ_{i>=j} c γ^(i-j) (k_j·q_i) g_i,    E <- γ^n E + Σ_i c γ^(i+1) q_iᵀ g_i
        dk_j = γ^(n-1-j) v_j Eᵀ + Σ_{i>=j} c γ^(i-j) (v_j·g_i) q_i

    chunk by chunk from the last; results without a pointer (dk, dv, E before the stretch) are not computed.
    Strides of token tensors are counted in UNIT elements; a token stride of None equals another one
    (`launch.token_strides`).
    TRANSPOSED: the states are transposed. Where p_reset is set, a chunk begins, and E before it is 0.
    EARLY: a split. With p_before, what each stretch adds; for a sequence's first one only if FIRST, and for a
    head that forgets fast enough (`split.forgets`) for no other. Without, such a head starts its stretches
    early, from zeros or at the end of the sequence.
    """
    stride_q_t = tiles.token_stride(stride_q_t, 0, UNIT)
    stride_k_t = tiles.token_stride(stride_k_t, stride_q_t, UNIT)
    stride_v_t = tiles.token_stride(stride_v_t, stride_k_t, UNIT)
    stride_g_t = tiles.token_stride(stride_g_t, stride_q_t, UNIT)
    stride_dk_t = tiles.token_stride(stride_dk_t, stride_g_t, UNIT)
    stride_dv_t = tiles.token_stride(stride_dv_t, stride_dk_t, UNIT)
    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    COLUMNS: tl.constexpr = (COLS_K, COLS_V, DK, DV)
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_nh = tl.program_id(0) // SLICES
    i_n = i_nh // H
    i_h = (i_nh % H).to(tl.int64)
    _, i_row, start, end, first, last = split.find_stretch(
        i_n, p_bounds, T, num_sequences, stretch, per_sequence, SEQUENCES
    )
    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    early = 0
    rows = DK
    if SEQUENCES > 0:
        rows = tl.where((start < end) | (end == last), DK, 0)  # a stretch that is left over has no state
    if EARLY:
        if p_before is None:
            early = tl.minimum(split.early_tokens(log_decay, stretch, ROWS), last - end)
            early = tl.where(start < end, early, 0)
        else:
            wanted = (start == first) | ~split.forgets(log_decay, stretch)
            if not FIRST:
                wanted = (start != first) & wanted
            end = tl.where(wanted, end, start)
            rows = tl.where(wanted, rows, 0)
    i_row = i_row.to(tl.int64) if p_bounds is None else 0
    p_q += (i_row * stride_q_b + i_h * stride_q_h) * UNIT
    p_g += (i_row * stride_g_b + i_h * stride_g_h) * UNIT
    if p_dv is not None:
        p_k += (i_row * stride_k_b + i_h * stride_k_h) * UNIT
        p_dv += (i_row * stride_dv_b + i_h * stride_dv_h) * UNIT
    if p_dk is not None:
        p_v += (i_row * stride_v_b + i_h * stride_v_h) * UNIT
        p_dk += (i_row * stride_dk_b + i_h * stride_dk_h) * UNIT

    strides = (1, DK) if TRANSPOSED else (DV, 1)
    if p_after is None:
        b_grad = tl.zeros((COLS_K, COLS_V), tl.float32)
    else:
        # A start at the end of the sequence is from the E after its last stretch, the next one.
        i_after = i_nh + tl.where((early > 0) & (end + early == last), H, 0)
        p_after += i_after.to(tl.int64) * (DK * DV)
        here = tl.where((early > 0) & (end + early < last), 0, rows)
        b_grad = tiles.load_state(p_after, strides, first_col, COLS_K, COLS_V, here, DV)
    b_within = tl.trans(tiles.decay_within(log_decay, scale, ROWS))
    b_from_start = tiles.decay_from_start(log_decay, scale, ROWS)
    if EARLY and p_before is None:
        b_grad = _pull_chunks(
            (p_q, None, None, p_g, None, None),
            (stride_q_t, 0, 0, stride_g_t, 0, 0),
            (end, end + early, first_col),
            b_grad,
            (log_decay, b_within, b_from_start),
            None,
            ROWS,
            COLUMNS,
            PRECISION,
            SCALE_V,
        )
    b_grad = _pull_chunks(
        (p_q, p_k, p_v, p_g, p_dk, p_dv),
        (stride_q_t, stride_k_t, stride_v_t, stride_g_t, stride_dk_t, stride_dv_t),
        (start, end, first_col),
        b_grad,
        (log_decay, b_within, b_from_start),
        None if p_reset is None else p_reset + i_row * T,
        ROWS,
        COLUMNS,
        PRECISION,
        SCALE_V,
    )
    if p_before is not None:
        p_before += i_nh.to(tl.int64) * (DK * DV)
        tiles.store_state(p_before, b_grad, strides, first_col, COLS_K, COLS_V, rows, DV)


def plan_retention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    *,
    reset: Tensor | None = None,
    states: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True, True),
    config: RetentionBwdConfig | None = None,
    target: Target | None = None,
) -> tuple[list[Launch], list[Tensor | None]]:
    """The launches of `retention_bwd`, and the tensors that they fill."""
    (B, T, H, Dk), Dv = q.shape, v.shape[-1]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, dk, dv, dstate = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else None
        for x, need in zip((q, k, v, state), needs, strict=True)
    )
    if sequences == 0 or T == 0 or (grad_out is None and grad_state is None):
        zero(dq, dk, dv, dstate)
        if dstate is not None and grad_state is not None:
            dstate.copy_(grad_state)
        return [], [dq, dk, dv, dstate]
    target = target or target_of(q.device)
    precision = dot_precision(q.dtype, target.architecture, (Dk, Dv))
    if config is None:
        sizes: dict[str, Any] = {"tokens": B * T, "sequences": sequences, "num_heads": H, "dtype": q.dtype}
        sizes |= {"precision": precision, **target._asdict()}
        config = retention_bwd_config(head_dims=(Dk, Dv), **sizes)
        if states is not None:
            queries = config.queries or retention_config(head_dims=(Dv, Dk), **sizes)
            stretch = retention_config(head_dims=(Dk, Dv), **sizes).stretch  # the forward's
            config = replace(config, queries=replace(queries, stretch=stretch))
    if reset is not None:
        config = replace(config, stretch=None)
    launches: list[Launch] = []
    if grad_out is None:
        zero(dq)
        grad_out = torch.zeros(Dv, dtype=v.dtype, device=v.device).expand(v.shape)
    elif dq is not None:
        transposed = (None if x is None else x.mT for x in (state, states))
        launches, (dq, *_) = plan_retention_fwd(
            *(grad_out, v, k, log_decay, next(transposed), scale, cu_seqlens, reset),
            states=next(transposed),
            with_final=False,
            config=config.queries,
            target=target,
        )
    tokens = {"q": q, "k": k, "v": v, "g": grad_out}
    tokens = {role: with_contiguous_rows(x) for role, x in tokens.items()}
    shared = {
        **{"p_log_decay": log_decay.contiguous(), "scale": scale, "PRECISION": precision},
        **{"p_bounds": None if cu_seqlens is None else cu_seqlens.contiguous()},
        **{"p_reset": None if reset is None else reset.contiguous()},
        **{"H": H, "T": T, "num_sequences": sequences},
    }
    after = None if grad_state is None else grad_state.contiguous()
    sweeps = _plan_sweeps({**tokens, "dk": dk, "dv": dv}, after, dstate, shared, config)
    return launches + sweeps, [dq, dk, dv, dstate]


def _plan_sweeps(
    tokens: Tensors,
    after: Tensor | None,
    before: Tensor | None,
    shared: dict[str, Any],
    config: RetentionBwdConfig,
) -> list[Launch]:
    """The sweeps that fill tokens' dk and dv, and `before`, the first state's gradient, from the last's."""
    sweeps = sweeps_for(tokens, config)
    only_states = Sweep(config.states, {**tokens, "dk": None, "dv": None}, swapped=False)
    packed = shared["p_bounds"] is not None
    stretches, stretch = split.cut(shared["T"], shared["num_sequences"], config.stretch, packed=packed)
    shared |= {**stretch, "FIRST": before is not None}
    if config.stretch is None:
        sweeps = sweeps or ([only_states] if before is not None else [])
        befores = [before, None]  # the first sweep finds it on its way
        return [
            _launch(sweep, stretches, after, found, shared)
            for sweep, found in zip(sweeps, befores, strict=False)
        ]
    if not sweeps and before is None:
        return []
    shape = (stretches, shared["H"], tokens["q"].shape[-1], tokens["v"].shape[-1])
    added = torch.empty(shape, dtype=torch.float32, device=tokens["q"].device)
    scan, ends = split.plan_scan(added, after, before, shared, reverse=True)
    return [
        _launch(only_states, stretches, None, added, shared),
        scan,
        *(_launch(sweep, stretches, ends, None, shared) for sweep in sweeps),
    ]


def _launch(
    sweep: Sweep, stretches: int, after: Tensor | None, before: Tensor | None, shared: dict[str, Any]
) -> Launch:
    """One reverse sweep; `after` and `before` are (stretches, H, Dk, Dv), of the roles before any swap."""
    config, tokens = sweep.config, sweep.tokens
    Dk, Dv = tokens["q"].shape[-1], tokens["g"].shape[-1]
    return Launch(
        kernel=retention_bwd_kernel,
        grid=(stretches * shared["H"] * triton.cdiv(Dv, config.cols_v),),
        arguments={
            **shared,
            **{f"p_{role}": x for role, x in tokens.items()},
            **token_strides(tokens),
            **{"p_after": after, "p_before": before},
            **{"DK": Dk, "DV": Dv, "ROWS": config.tile, "COLS_K": padded(Dk), "COLS_V": config.cols_v},
            **{"SCALE_V": config.scale_v, "TRANSPOSED": sweep.swapped},
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def retention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    *,
    reset: Tensor | None = None,
    states: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True, True),
    config: RetentionBwdConfig | None = None,
) -> list[Tensor | None]:
    """Gradients of `retention_fwd`.

    Args:
        q, k, v, log_decay, state, scale, cu_seqlens, reset: as in `retention_fwd`.
        grad_out, grad_state: of its results, in their shapes, any strides; None for zeros. The first in the
            tokens' dtype or in float32, the second in float32.
        states: before each stretch, as `retention_fwd` returns them; None: they are found again.
        needs: which gradients to find: of q, k, v, state.
        config: how to cut the reverse sweeps; None: `configs_bwd.retention_bwd_config` chooses.

    Returns:
        One gradient for each of `needs`, new, contiguous, in the dtype and shape of what it belongs to; None
        where it is not needed, and for a state of None.

    Raises:
        ValueError: a head dim is larger than the kernels hold.
    """
    arguments = (q, k, v, log_decay, state, scale, cu_seqlens, grad_out, grad_state)
    grads: list[Tensor | None] = launched(
        plan_retention_bwd,
        *arguments,
        reset=reset,
        states=states,
        needs=tuple(needs),
        target=target_of(q.device),
        config=config,
    )
    return grads

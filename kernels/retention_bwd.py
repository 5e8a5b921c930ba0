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

One sweep finds both where head dims are at most 64. Beyond, there is one for each, in slices: a program with
a slice of Dv would hold only part of dk's sum over Dv, and no float is added atomically.

Schedules are the forward's, backwards: one launch whose stretches are whole sequences; or, where those leave
much of the GPU idle, what each stretch adds to E (the same kernel, writing no dk and dv), a scan from the
last stretch to the first, and the sweep of every stretch from its own E. `configs_bwd.retention_bwd_config`
chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .configs import MOST_PACKED_IN_A_SPLIT, SCAN_COLUMNS, padded
from .configs_bwd import RetentionBwdConfig, SweepConfig, retention_bwd_config
from .gpus import architecture_of, dot_precision, multiprocessors_of
from .launch import Launch, named_strides, run, stride_unit, with_contiguous_rows
from .pop_bwd_sweep import load_state, pull_tile, store_state
from .pop_fwd_steps import token_stride
from .retention_fwd import count_stretches, find_stretch, inside, plan_retention_fwd

# Arguments that differ from call to call: none of their values compiles a kernel anew.
_RUN_TIME = ["H", "T", "num_sequences", "stretch", "per_sequence"]


@triton.jit(do_not_specialize=_RUN_TIME)
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
):
    """The reverse sweep of one stretch, with p_after E after each stretch (None: zeros):

        dv_j = γ^(n-1-j) k_j E  + Σ_{i>=j} c γ^(i-j) (k_j·q_i) g_i,    E <- γ^n E + Σ_i c γ^(i+1) q_iᵀ g_i
        dk_j = γ^(n-1-j) v_j Eᵀ + Σ_{i>=j} c γ^(i-j) (v_j·g_i) q_i

    chunk by chunk from the last; what has no pointer (dk, dv, E before the stretch) is not found. Strides of
    token tensors are counted in UNIT elements; token strides of None are q's. TRANSPOSED: so lie the states.
    """
    stride_q_t = token_stride(stride_q_t, 0, UNIT)
    stride_k_t = token_stride(stride_k_t, stride_q_t, UNIT)
    stride_v_t = token_stride(stride_v_t, stride_q_t, UNIT)
    stride_g_t = token_stride(stride_g_t, stride_q_t, UNIT)
    stride_dk_t = token_stride(stride_dk_t, stride_q_t, UNIT)
    stride_dv_t = token_stride(stride_dv_t, stride_q_t, UNIT)
    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    COLUMNS: tl.constexpr = (COLS_K, COLS_V, DK, DV)
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_nh = tl.program_id(0) // SLICES
    i_n = i_nh // H
    i_h = (i_nh % H).to(tl.int64)
    _, i_row, start, end, is_last = find_stretch(
        i_n, p_bounds, T, num_sequences, stretch, per_sequence, SEQUENCES
    )
    i_row = i_row.to(tl.int64) if p_bounds is None else 0
    p_q += (i_row * stride_q_b + i_h * stride_q_h) * UNIT
    p_g += (i_row * stride_g_b + i_h * stride_g_h) * UNIT
    if p_dv is not None:
        p_k += (i_row * stride_k_b + i_h * stride_k_h) * UNIT
        p_dv += (i_row * stride_dv_b + i_h * stride_dv_h) * UNIT
    if p_dk is not None:
        p_v += (i_row * stride_v_b + i_h * stride_v_h) * UNIT
        p_dk += (i_row * stride_dk_b + i_h * stride_dk_h) * UNIT

    rows = DK
    if SEQUENCES > 0:
        rows = tl.where((start < end) | is_last, DK, 0)  # a stretch that is left over has no state
    strides = (1, DK) if TRANSPOSED else (DV, 1)
    if p_after is None:
        b_grad = tl.zeros((COLS_K, COLS_V), tl.float32)
    else:
        p_after += i_nh.to(tl.int64) * (DK * DV)
        b_grad = load_state(p_after, strides, first_col, COLS_K, COLS_V, rows, DV)
    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    b_within = tl.trans(tiles.decay_within(log_decay, scale, ROWS))
    b_from_start = tiles.decay_from_start(log_decay, scale, ROWS)
    num_chunks = tl.cdiv(end - start, ROWS)
    for i in range(num_chunks):
        i_t = start + (num_chunks - 1 - i) * ROWS
        length = tl.minimum(end - i_t, ROWS)
        whole, rest = tiles.decay_across(log_decay, length)
        b_grad = pull_tile(
            (p_q, p_k, p_v, p_g, p_dk, p_dv),
            (stride_q_t, stride_k_t, stride_v_t, stride_g_t, stride_dk_t, stride_dv_t),
            (i_t, end, end, end, first_col),
            b_grad,
            b_grad,
            (tiles.decay_to_end(log_decay, length, ROWS), b_within, b_from_start, whole, rest),
            ROWS,
            COLUMNS,
            PRECISION,
            SCALE_V,
        )
    if p_before is not None:
        p_before += i_nh.to(tl.int64) * (DK * DV)
        store_state(p_before, b_grad, strides, first_col, COLS_K, COLS_V, rows, DV)


@triton.jit(do_not_specialize=_RUN_TIME)
def scan_back_kernel(
    p_added,
    p_log_decay,
    p_after,
    p_bounds,
    p_ends,
    p_before,
    H,
    T,
    num_sequences,
    stretch,
    per_sequence,
    DK: tl.constexpr,
    DV: tl.constexpr,
    COLS_K: tl.constexpr,
    COLS_V: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """E_m = γ^n E_(m+1) + A_m from a sequence's last stretch to its first; n tokens each, fewer in the last.

    A_m is what stretch m adds; every E_(m+1) goes to p_ends, the E before the first stretch to p_before.
    """
    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_sh = tl.program_id(0) // SLICES
    i_s = i_sh // H
    i_h = (i_sh % H).to(tl.int64)
    if p_bounds is None:
        first = i_s * per_sequence
        count = per_sequence
        tokens = T
    else:
        b_count = count_stretches(p_bounds, T, num_sequences, stretch, SEQUENCES)
        o_s = tl.arange(0, SEQUENCES)
        first = tl.sum(tl.where(o_s < i_s, b_count, 0), 0)
        count = tl.sum(tl.where(o_s == i_s, b_count, 0), 0)
        # Wrong bounds, which nobody checks on a GPU, could ask for more stretches than there is room for.
        count = tl.minimum(count, T // stretch + num_sequences - first)
        tokens = inside(tl.load(p_bounds + i_s + 1), T) - inside(tl.load(p_bounds + i_s), T)
    if p_after is None:
        b_grad = tl.zeros((COLS_K, COLS_V), tl.float32)
    else:
        p_after += i_sh.to(tl.int64) * (DK * DV)
        b_grad = tiles.load_tile(p_after, DV, DK, first_col, COLS_K, COLS_V, DV)
    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    p_added += i_h * (DK * DV)
    p_ends += i_h * (DK * DV)
    stride = H.to(tl.int64) * (DK * DV)
    for i in tl.range(count, num_stages=4):
        i_m = count - 1 - i
        place = (first + i_m) * stride
        b_added = tiles.load_tile(p_added + place, DV, DK, first_col, COLS_K, COLS_V, DV)
        tiles.store_tile(p_ends + place, b_grad, DV, DK, first_col, COLS_K, COLS_V, DV)
        length = tl.minimum(tokens - i_m * stretch, stretch)
        whole, rest = tiles.decay_across(log_decay, length)
        b_grad = tiles.advance(b_grad, whole, rest, b_added)
    if p_before is not None:
        p_before += i_sh.to(tl.int64) * (DK * DV)
        tiles.store_tile(p_before, b_grad, DV, DK, first_col, COLS_K, COLS_V, DV)


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
    needs: Sequence[bool] = (True, True, True, True),
    config: RetentionBwdConfig | None = None,
    architecture: str | None = None,
) -> tuple[list[Launch], list[Tensor | None]]:
    """The launches of `retention_bwd`, and the tensors that they fill."""
    (B, T, H, Dk), Dv = q.shape, v.shape[-1]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, dk, dv, dstate = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else None
        for x, need in zip((q, k, v, state), needs, strict=True)
    )
    if sequences == 0 or T == 0 or (grad_out is None and grad_state is None):
        _zero(dq, dk, dv, dstate)
        if dstate is not None and grad_state is not None:
            dstate.copy_(grad_state)
        return [], [dq, dk, dv, dstate]
    architecture = architecture or architecture_of(q.device)
    precision = dot_precision(q.dtype, architecture)
    if config is None:
        config = retention_bwd_config(
            tokens=B * T,
            sequences=sequences,
            num_heads=H,
            head_dims=(Dk, Dv),
            dtype=q.dtype,
            precision=precision,
            architecture=architecture,
            multiprocessors=multiprocessors_of(q.device),
        )
    launches: list[Launch] = []
    if grad_out is None:
        _zero(dq)
        grad_out = torch.zeros(Dv, dtype=v.dtype, device=v.device).expand(v.shape)
    elif dq is not None:
        before = None if state is None else state.mT
        launches, (dq, _) = plan_retention_fwd(
            grad_out, v, k, log_decay, before, scale, cu_seqlens, with_final=False, architecture=architecture
        )
    tokens = {"q": q, "k": k, "v": v, "g": grad_out}
    tokens = {role: with_contiguous_rows(x) for role, x in tokens.items()}
    common = {
        **{"p_log_decay": log_decay.contiguous(), "scale": scale, "PRECISION": precision},
        **{"p_bounds": None if cu_seqlens is None else cu_seqlens.contiguous()},
        **{"H": H, "T": T, "num_sequences": sequences},
    }
    after = None if grad_state is None else grad_state.contiguous()
    sweeps = _plan_sweeps({**tokens, "dk": dk, "dv": dv}, after, dstate, common, config)
    return launches + sweeps, [dq, dk, dv, dstate]


def _zero(*grads: Tensor | None) -> None:
    for grad in grads:
        if grad is not None:
            grad.zero_()


def _plan_sweeps(
    tokens: Mapping[str, Tensor | None],
    after: Tensor | None,
    before: Tensor | None,
    common: dict[str, Any],
    config: RetentionBwdConfig,
) -> list[Launch]:
    """The sweeps that fill tokens' dk and dv, and `before`, the first state's gradient, from the last's."""
    only_states = {**tokens, "dk": None, "dv": None}
    sweeps: list[tuple[SweepConfig, Mapping[str, Tensor | None], bool]] = []
    if config.both is not None and tokens["dk"] is not None and tokens["dv"] is not None:
        sweeps = [(config.both, tokens, False)]
    else:
        if tokens["dv"] is not None:
            sweeps.append((config.values, {**tokens, "dk": None}, False))
        if tokens["dk"] is not None:
            sweeps.append((config.keys, {**_swapped(tokens), "dk": None}, True))
    if config.stretch is None:
        if not sweeps and before is not None:
            sweeps = [(config.values, only_states, False)]
        befores = [before, None]  # the first sweep finds it on its way
        common |= {"stretch": common["T"], "per_sequence": 1, "SEQUENCES": 0}
        return [
            _sweep(*sweep, common["num_sequences"], after, found, common)
            for sweep, found in zip(sweeps, befores, strict=False)
        ]
    if not sweeps and before is None:
        return []
    sequences, packed = common["num_sequences"], common["p_bounds"] is not None
    per_sequence = triton.cdiv(common["T"], config.stretch)
    # Each packed sequence may end in a stretch that is not full.
    stretches = common["T"] // config.stretch + sequences if packed else sequences * per_sequence
    common |= {
        **{"stretch": config.stretch, "per_sequence": per_sequence},
        "SEQUENCES": MOST_PACKED_IN_A_SPLIT + 1 if packed else 0,
    }
    shape = (stretches, common["H"], tokens["q"].shape[-1], tokens["v"].shape[-1])
    added, ends = (torch.empty(shape, dtype=torch.float32, device=tokens["q"].device) for _ in range(2))
    return [
        _sweep(config.values, only_states, False, stretches, None, added, common),
        _scan(added, after, ends, before, common, config.values.num_warps),
        *(_sweep(*sweep, stretches, ends, None, common) for sweep in sweeps),
    ]


def _swapped(tokens: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The sweep for dv finds dk where these have changed places and the states are transposed."""
    places = {"q": "g", "k": "v", "v": "k", "g": "q", "dk": "dv", "dv": "dk"}
    return {role: tokens[place] for role, place in places.items()}


def _sweep(
    config: SweepConfig,
    tokens: Mapping[str, Tensor | None],
    transposed: bool,
    stretches: int,
    after: Tensor | None,
    before: Tensor | None,
    common: dict[str, Any],
) -> Launch:
    """One reverse sweep; `after` and `before` are (stretches, H, Dk, Dv), of the roles before any swap."""
    Dk, Dv = tokens["q"].shape[-1], tokens["g"].shape[-1]
    unit = stride_unit(x for x in tokens.values() if x is not None)
    arguments = {
        **common,
        **{f"p_{role}": x for role, x in tokens.items()},
        **_token_strides(tokens, unit),
        **{"p_after": after, "p_before": before},
        **{"DK": Dk, "DV": Dv, "ROWS": config.tile, "COLS_K": padded(Dk), "COLS_V": config.cols_v},
        **{"SCALE_V": config.scale_v, "UNIT": unit, "TRANSPOSED": transposed},
    }
    return Launch(
        kernel=retention_bwd_kernel,
        grid=(stretches * common["H"] * triton.cdiv(Dv, config.cols_v),),
        arguments={name: arguments[name] for name in retention_bwd_kernel.arg_names},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _token_strides(tokens: Mapping[str, Tensor | None], unit: int) -> dict[str, int | None]:
    """Strides in units; a token's is None where it is q's."""
    strides: dict[str, int | None] = {}
    for role, x in tokens.items():
        strides |= {name: stride // unit for name, stride in named_strides(role, x, "bth").items()}
    for role, x in tokens.items():
        if role != "q" and (x is None or strides[f"stride_{role}_t"] == strides["stride_q_t"]):
            strides[f"stride_{role}_t"] = None
    return strides


def _scan(
    added: Tensor,
    after: Tensor | None,
    ends: Tensor,
    before: Tensor | None,
    common: dict[str, Any],
    num_warps: int,
) -> Launch:
    Dk, Dv = added.shape[-2:]
    arguments = {
        **common,
        **{"p_added": added, "p_after": after, "p_ends": ends, "p_before": before},
        **{"DK": Dk, "DV": Dv, "COLS_K": padded(Dk), "COLS_V": SCAN_COLUMNS},
    }
    return Launch(
        kernel=scan_back_kernel,
        grid=(common["num_sequences"] * common["H"] * triton.cdiv(Dv, SCAN_COLUMNS),),
        arguments={name: arguments[name] for name in scan_back_kernel.arg_names},
        num_warps=num_warps,
        num_stages=2,
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
    needs: Sequence[bool] = (True, True, True, True),
    config: RetentionBwdConfig | None = None,
) -> list[Tensor | None]:
    """Gradients of `retention_fwd`.

    Args:
        q, k, v, log_decay, state, scale, cu_seqlens: as in `retention_fwd`.
        grad_out, grad_state: of its results, in their shapes, any strides; None for zeros. The first in the
            tokens' dtype or in float32, the second in float32.
        needs: which gradients to find: of q, k, v, state.
        config: how to cut the reverse sweeps; None: `configs_bwd.retention_bwd_config` chooses.

    Returns:
        One gradient for each of `needs`, new, contiguous, in the dtype and shape of what it belongs to; None
        where it is not needed, and for a state of None.

    Raises:
        ValueError: a head dim is larger than the kernels hold.
    """
    launches, grads = plan_retention_bwd(
        q, k, v, log_decay, state, scale, cu_seqlens, grad_out, grad_state, needs=needs, config=config
    )
    run(launches, q.device)
    return grads

"""POP, forward: N blocks of L tokens, and P predictions of M tokens that branch off at the block boundaries.

With B_n the state after n blocks, and prediction p starting from B_(p+offset) and leaving no trace:

    o_(n,i) = c q_i ( γ^(i+1) B_n + Σ_{j<=i} γ^(i-j) k_jᵀ v_j )
    B_(n+1) = γ^L B_n + Σ_j γ^(L-1-j) k_jᵀ v_j,   but 0 where block n+1 starts an episode
    o_(p,i) = c q_i ( γ^(i+1) B_(p+offset) + Σ_{j<=i} γ^(i-j) k_jᵀ v_j )

A program owns (batch, head, slice of Dv) and walks the blocks with the state in registers: it takes in block
n, and predicts from B_n, or with an offset from B_(n+1). So no block state goes through memory, and a program
reads each input once. There are two forms of the walk, and a schedule for small batches; `configs.pop_config`
chooses:

- line (this file): all tiles of a block and its prediction one after another in the loop's body. A block is
  full tiles and a masked tail of 16 rows or more (L = 65 is 64 + 16, not 128), each a chunk of its own; so is
  a prediction. Tile counts are constexprs, there is no `if` and no inner loop, and an absent tile is masked
  to no rows: Triton's pipeliner fetches the next block's tiles with async copies only in such a loop.
- steps (pop_fwd_steps.py): one tile at a time, whatever L, M and the head dims are.
- split (split.py): where batch x heads x slices leave half of the GPU idle, the block states come first, by
  two small kernels, and then each block is a program of its own, in either form.

In low precision the scores and the state are rounded to the tokens' dtype where they are operands of a dot
(about 0.1% each in bfloat16); the state itself stays float32.

Grid: (batch · blocks if split · H · slices of Dv,), slices next to each other, because they read the same q
and k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from . import split, tiles
from .configs import PopConfig, padded, pop_config, pred_tiles, tail_rows
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
from .pop_fwd_steps import RUN_TIME, pop_fwd_steps_kernel


@triton.jit(do_not_specialize=RUN_TIME)
def pop_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_q_pred,
    p_k_pred,
    p_v_pred,
    p_pred,
    p_log_decay,
    p_state,
    p_reset,
    p_final,
    scale,
    N,
    L,
    P,
    M,
    offset,
    num_blocks,
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
    stride_q_pred_b: tl.int64,
    stride_q_pred_p: tl.int64,
    stride_q_pred_t,
    stride_q_pred_h,
    stride_k_pred_b: tl.int64,
    stride_k_pred_p: tl.int64,
    stride_k_pred_t,
    stride_k_pred_h,
    stride_v_pred_b: tl.int64,
    stride_v_pred_p: tl.int64,
    stride_v_pred_t,
    stride_v_pred_h,
    stride_pred_b: tl.int64,
    stride_pred_p: tl.int64,
    stride_pred_t,
    stride_pred_h,
    stride_state_b: tl.int64,
    stride_state_n: tl.int64,
    stride_state_h,
    stride_state_k,
    stride_state_v,
    stride_reset_b: tl.int64,
    stride_reset_n: tl.int64,
    H: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
    COLS_K: tl.constexpr,
    COLS_V: tl.constexpr,
    FULL_L: tl.constexpr,
    TAIL_L: tl.constexpr,
    FULL_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    UNIT: tl.constexpr,
    AFTER: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """For each block n: o_(n,i) and B_(n+1), and the o_(p,i) that start from B_(n+AFTER) (formulas above).

    A block is FULL_L tiles and a tail of up to TAIL_L rows, a prediction FULL_M and TAIL_M. Strides of token
    tensors are counted in UNIT elements; a token stride of None equals another one (`launch.token_strides`).
    SPLIT: one block a program, from its own state. p_out or p_pred is None: those outputs are not computed.
    """
    stride_q_t = tiles.token_stride(stride_q_t, 0, UNIT)
    stride_k_t = tiles.token_stride(stride_k_t, stride_q_t, UNIT)
    stride_v_t = tiles.token_stride(stride_v_t, stride_k_t, UNIT)
    stride_out_t = tiles.token_stride(stride_out_t, stride_q_t, UNIT)
    stride_q_pred_t = tiles.token_stride(stride_q_pred_t, stride_q_t, UNIT)
    stride_k_pred_t = tiles.token_stride(stride_k_pred_t, stride_k_t, UNIT)
    stride_v_pred_t = tiles.token_stride(stride_v_pred_t, stride_v_t, UNIT)
    stride_pred_t = tiles.token_stride(stride_pred_t, stride_out_t, UNIT)
    strides = (stride_q_t, stride_k_t, stride_v_t, stride_out_t)
    strides_pred = (stride_q_pred_t, stride_k_pred_t, stride_v_pred_t, stride_pred_t)
    COLUMNS: tl.constexpr = (COLS_K, COLS_V, DK, DV)

    SLICES: tl.constexpr = (DV + COLS_V - 1) // COLS_V
    first_col = (tl.program_id(0) % SLICES) * COLS_V
    i_bh = tl.program_id(0) // SLICES
    i_b = i_bh // H
    i_h = (i_bh % H).to(tl.int64)
    first = 0
    last = num_blocks
    if SPLIT:
        first = i_b % num_blocks
        last = first + 1
        i_b = i_b // num_blocks
    i_b = i_b.to(tl.int64)
    p_q += (i_b * stride_q_b + i_h * stride_q_h) * UNIT
    p_k += (i_b * stride_k_b + i_h * stride_k_h) * UNIT
    p_v += (i_b * stride_v_b + i_h * stride_v_h) * UNIT
    if p_out is not None:
        p_out += (i_b * stride_out_b + i_h * stride_out_h) * UNIT
    p_q_pred += (i_b * stride_q_pred_b + i_h * stride_q_pred_h) * UNIT
    p_k_pred += (i_b * stride_k_pred_b + i_h * stride_k_pred_h) * UNIT
    p_v_pred += (i_b * stride_v_pred_b + i_h * stride_v_pred_h) * UNIT
    if p_pred is not None:
        p_pred += (i_b * stride_pred_b + i_h * stride_pred_h) * UNIT

    if p_state is None:
        b_state = tl.zeros((COLS_K, COLS_V), tl.float32)
    else:
        p_state += i_b * stride_state_b + first * stride_state_n + i_h * stride_state_h
        strides_state = (stride_state_k, stride_state_v)
        b_state = tiles.load_state(p_state, strides_state, first_col, COLS_K, COLS_V, DK, DV)
    if p_reset is not None:
        p_reset += i_b * stride_reset_b + first * stride_reset_n
        starts = tl.load(p_reset, mask=first < N, other=0)
        b_state = tl.where(starts != 0, 0.0, b_state)

    log_decay = tiles.load_log_decay(p_log_decay, i_h)
    tail_l = L - FULL_L * TILE
    if FULL_L + FULL_M > 0:
        powers = tiles.chunk_powers(log_decay, scale, TILE, TILE)
    if TAIL_L > 0:
        powers_tail_l = tiles.chunk_powers(log_decay, scale, tail_l, TAIL_L)
    if TAIL_M > 0:
        powers_tail_m = tiles.chunk_powers(log_decay, scale, TAIL_M, TAIL_M)

    for n in range(first, last):
        if p_reset is not None:
            # Loaded ahead of its use, to hide the latency.
            p_reset += stride_reset_n
            starts = tl.load(p_reset, mask=n + 1 < N, other=0)
        b_branch = b_state
        for t in tl.static_range(FULL_L):
            b_state = tiles.pass_tile(
                (p_q, p_k, p_v, p_out),
                strides,
                (n * L + t * TILE, N * L, N * L, first_col),
                b_state,
                powers,
                n < N,
                TILE,
                COLUMNS,
                PRECISION,
                SCALE_V,
                True,
            )
        if TAIL_L > 0:
            end_main = tl.minimum(n * L + L, N * L)
            b_state = tiles.pass_tile(
                (p_q, p_k, p_v, p_out),
                strides,
                (n * L + FULL_L * TILE, end_main, end_main, first_col),
                b_state,
                powers_tail_l,
                n < N,
                TAIL_L,
                COLUMNS,
                PRECISION,
                SCALE_V,
                True,
            )
        if p_reset is not None:
            b_state = tl.where(starts != 0, 0.0, b_state)
        if AFTER:
            b_branch = b_state
        i_p = n + AFTER - offset
        end_row = tl.where((i_p >= 0) & (i_p < P), M, 0)
        o_p = i_p.to(tl.int64)
        pointers = (
            p_q_pred + o_p * stride_q_pred_p * UNIT,
            p_k_pred + o_p * stride_k_pred_p * UNIT,
            p_v_pred + o_p * stride_v_pred_p * UNIT,
            None if p_pred is None else p_pred + o_p * stride_pred_p * UNIT,
        )
        for t in tl.static_range(FULL_M):
            b_branch = tiles.pass_tile(
                pointers,
                strides_pred,
                (t * TILE, end_row, end_row, first_col),
                b_branch,
                powers,
                True,
                TILE,
                COLUMNS,
                PRECISION,
                SCALE_V,
                t < FULL_M - 1 or TAIL_M > 0,
            )
        if TAIL_M > 0:
            tiles.pass_tile(
                pointers,
                strides_pred,
                (FULL_M * TILE, end_row, end_row, first_col),
                b_branch,
                powers_tail_m,
                True,
                TAIL_M,
                COLUMNS,
                PRECISION,
                SCALE_V,
                False,
            )
    if p_final is not None:
        p_final += i_bh.to(tl.int64) * (DK * DV)
        tiles.store_tile(p_final, b_state, DV, DK, first_col, COLS_K, COLS_V, DV)


def plan_pop_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    block_size: int,
    offset: int,
    scale: float,
    *,
    out: Tensor | None = None,
    pred: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    states: Tensor | None = None,
    with_states: bool = False,
    config: PopConfig | None = None,
    target: Target | None = None,
) -> tuple[list[Launch], tuple[Tensor | None, ...]]:
    """The launches of `pop_fwd`, and the tensors; of the first three only those that are `wanted` are filled.

    Queries may be wider than keys and values: those of the backward are gradients of outputs. It may also
    give the ``states`` before all blocks, as `pop_fwd` returns them: then they are not found again.
    """
    B, T, H, Dk = q.shape
    P, M = q_pred.shape[1:3]
    Dv = v.shape[-1]
    out_dtype = out_dtype or v.dtype
    out = torch.empty((B, T, H, Dv), dtype=out_dtype, device=v.device) if out is None else out
    pred = torch.empty((B, P, M, H, Dv), dtype=out_dtype, device=v.device) if pred is None else pred
    final = torch.empty((B, H, Dk, Dv), dtype=torch.float32, device=v.device)
    N = T // block_size
    L = block_size if N > 0 else 1
    P, M = (P, M) if P * M > 0 else (0, 0)
    after = int(P > 0 and offset > 0)  # then no prediction starts at boundary 0
    num_blocks = max(N, P + offset - after if P > 0 else 0)  # N, or one more that is absent
    if B == 0 or num_blocks == 0:
        final = final.zero_() if state is None else final.copy_(state)
        return [], (out, pred, final, None)[: 3 + with_states]
    target = target or target_of(q.device)
    precision = dot_precision(v.dtype, target.architecture, (Dk, Dv))
    if config is None:
        config = pop_config(
            pairs=B * H,
            num_blocks=N,
            lengths=(L, M),
            head_dims=(Dk, Dv),
            dtype=v.dtype,
            precision=precision,
            **target._asdict(),
        )
    if states is not None:
        config = replace(config, split=True)
    tokens = dict(zip(_TOKENS, (q, k, v, q_pred, k_pred, v_pred), strict=True))
    tokens = {name: with_contiguous_rows(x) for name, x in tokens.items()}
    log_decay = log_decay.contiguous()
    programs = B * H * cdiv(Dv, config.cols_v)
    launches: list[Launch] = []
    last = final if wanted[2] else None
    if config.split and states is None:
        shared = {"p_log_decay": log_decay, "p_bounds": None, "H": H, "T": T, "num_sequences": B}
        shared |= {"stretch": L, "per_sequence": num_blocks, "SEQUENCES": 0, "EARLY": False}
        launches, states = split.plan_states(
            *(tokens["k"], tokens["v"], state, last, shared, config),
            stretches=B * num_blocks,
            rows=config.tile,
            precision=precision,
            reset=reset,
        )
        states = states.unflatten(0, (B, num_blocks))
    if config.split:
        programs, last = programs * num_blocks, None
    before = states if config.split else state
    tokens |= {"out": out, "pred": pred}
    found = {
        name: x if want else None for name, x, want in zip(("out", "pred"), (out, pred), wanted, strict=False)
    }
    walk = Launch(
        kernel=pop_fwd_steps_kernel if config.steps else pop_fwd_kernel,
        grid=(programs,),
        arguments={
            **{f"p_{name}": x for name, x in (tokens | found).items()},
            **{
                "p_log_decay": log_decay,
                "p_state": before,
                "p_reset": reset,
                "p_final": last,
                "scale": scale,
            },
            **{"N": N, "L": L, "P": P, "M": M, "offset": offset, "num_blocks": num_blocks, "AFTER": after},
            **{"H": H, "DK": Dk, "DV": Dv, "PRECISION": precision},
            **_tiling(config, Dk, L, M),
            **token_strides(tokens),
            **named_strides("reset", reset, "bn"),
            **named_strides("state", before, "bnhkv" if config.split else "bhkv"),
            **({} if config.split else {"stride_state_n": 0}),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return [*launches, walk], (out, pred, final, states)[: 3 + with_states]


_TOKENS = ("q", "k", "v", "q_pred", "k_pred", "v_pred")


def _tiling(config: PopConfig, Dk: int, L: int, M: int) -> dict[str, int]:
    tile = config.tile
    common = {
        **{"TILE": tile, "COLS_K": padded(Dk), "COLS_V": config.cols_v},
        **{"SCALE_V": config.scale_v, "SPLIT": config.split},
    }
    if config.steps:
        return {**common, "PRED_TILES": pred_tiles(M, tile)}
    tails = {"TAIL_L": tail_rows(L, tile), "TAIL_M": tail_rows(M, tile)}
    return {**common, "FULL_L": L // tile, "FULL_M": M // tile, **tails}


def pop_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    block_size: int,
    offset: int,
    scale: float,
    *,
    out: Tensor | None = None,
    pred: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    with_states: bool = False,
    config: PopConfig | None = None,
) -> tuple[Any, ...]:
    """POP of inputs that have been checked.

    Args:
        q, k: queries and keys of the blocks, (B, T, H, Dk) with T = N · block_size.
        v: their values, (B, T, H, Dv).
        q_pred, k_pred: queries and keys of the predictions, (B, P, M, H, Dk).
        v_pred: their values, (B, P, M, H, Dv).
        log_decay: ln γ per head, (H,), float32; -inf is γ = 0.
        state: B_0, (B, H, Dk, Dv), float32, or None for zeros.
        reset: (B, N), bool, or None: blocks that start an episode.
        block_size: L.
        offset: the boundary at which prediction 0 starts.
        scale: c.
        out, pred: where to write, (B, T, H, Dv) and (B, P, M, H, Dv) with a contiguous last dim and of one
            dtype, or None for new tensors. Inputs and outputs may be views of one tensor.
        out_dtype: of new tensors, None for v's; float32 holds what float16 cannot, the sums of a slow decay.
        with_states: whether to return the states before all blocks.
        config: how to cut the work, or None for `configs.pop_config`.

    Returns:
        out, pred, and B_N (B, H, Dk, Dv), float32. ``with_states``: also the states before all blocks of a
        split, (B, blocks, H, Dk, Dv), which `pop_bwd` takes, or None without a split.

    Raises:
        ValueError: the head dims are too large for this GPU.

    Source: POP, arXiv 2402.05643, section 3.2.
    """
    arguments = (q, k, v, q_pred, k_pred, v_pred, log_decay, state, reset, block_size, offset, scale)
    outputs: tuple[Any, ...] = launched(
        plan_pop_fwd,
        *arguments,
        out=out,
        pred=pred,
        target=target_of(q.device),
        out_dtype=out_dtype,
        with_states=with_states,
        config=config,
    )
    return outputs

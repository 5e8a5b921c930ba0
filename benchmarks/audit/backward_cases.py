"""Backward calls of every kernel, as cases: all gradients that training takes, of outputs that all have one.

Their floor: each input and each gradient of an output read once, each gradient of an input written once. The
yardstick of their products is `BACKWARD_FLOPS` of the forward's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.audit.case import (
    BACKWARD_FLOPS,
    FP32,
    Case,
    Made,
    chunk_flops,
    launcher,
    log_decays,
    tokens,
)
from retpop.ops.rows import split_row


def pop_bwd(
    dtype: torch.dtype,
    shape: str,
    *,
    B: int,
    N: int,
    L: int,
    M: int,
    H: int,
    D: int,
    Dv: int | None = None,
    P: int | None = None,
    offset: int = 0,
    state: bool = False,
    reset: bool = False,
    packed: bool = False,
    core: bool = False,
) -> Case:
    """POP; ``state``: the first and the last state have gradients too. ``packed``: as the layers call it,
    with views of a projection's q, k and v, and gradients in rows of main and prediction tokens.
    """
    P = N if P is None else P
    Dv = D if Dv is None else Dv

    def call(device: torch.device, rows: int) -> Made:
        main = [tokens(device, dtype, rows, N * L, H, d) for d in (D, D, Dv, Dv)]
        pred = [tokens(device, dtype, rows, P, M, H, d) for d in (D, D, Dv, Dv)]
        into: list[Tensor | None] | None = None
        if packed:
            length = N * L + P * M
            joined = [*tokens(device, dtype, rows, length, 3, H, D).unbind(2)]
            joined.append(tokens(device, dtype, rows, length, H, D))
            main, pred = (list(x) for x in zip(*(split_row(x, (P, M)) for x in joined), strict=True))
            found = [torch.empty(rows, length, H, D, dtype=dtype, device=device) for _ in range(3)]
            parts = zip(*(split_row(x, (P, M)) for x in found), strict=True)
            into = [x for part in parts for x in part]
        before = torch.zeros(rows, H, D, Dv, device=device) if state else None
        after = None if before is None else torch.zeros_like(before)
        starts = torch.zeros(rows, N, dtype=torch.bool, device=device) if reset else None
        inputs = [*main[:3], *pred[:3], log_decays(device, H), before, starts, main[3], pred[3], after]
        grads = launcher("pop_bwd")(*inputs, L, offset, D**-0.5, [True] * 7, out=into)
        return inputs, [x for x in grads if x is not None]

    flops = N * chunk_flops(L, D, Dv) + P * chunk_flops(M, D, Dv, takes_in=False)
    return Case(
        op="pop_bwd",
        shape=shape,
        dtype=dtype,
        head_dim=max(D, Dv),
        batch=B,
        call=call,
        flops=int(BACKWARD_FLOPS * H * flops),
        core=core,
    )


def retention_bwd(
    dtype: torch.dtype,
    shape: str,
    *,
    B: int,
    T: int,
    H: int,
    D: int,
    Dv: int | None = None,
    state: bool = False,
    lengths: Sequence[int] = (),
    core: bool = False,
) -> Case:
    """Retention of B sequences, or of packed ones of ``lengths`` (B is 1); ``state`` as in `pop_bwd`."""
    Dv = D if Dv is None else Dv

    def call(device: torch.device, rows: int) -> Made:
        q, k, v, grad = (tokens(device, dtype, rows, T, H, d) for d in (D, D, Dv, Dv))
        before = torch.zeros(len(lengths) or rows, H, D, Dv, device=device) if state else None
        after = None if before is None else torch.zeros_like(before)
        ends = list(itertools.accumulate(lengths, initial=0))
        bounds = torch.tensor(ends, device=device) if lengths else None
        inputs = [q, k, v, log_decays(device, H), before]
        grads = launcher("retention_bwd")(*inputs, D**-0.5, bounds, grad, after)
        return [*inputs, bounds, grad, after], [x for x in grads if x is not None]

    flops = H * sum(chunk_flops(length, D, Dv) for length in lengths or [T])
    return Case(
        op="retention_bwd",
        shape=shape,
        dtype=dtype,
        head_dim=max(D, Dv),
        batch=B,
        call=call,
        flops=int(BACKWARD_FLOPS * flops),
        core=core,
    )


def norm_gate_bwd(
    dtype: torch.dtype, shape: str, *, B: int, T: int, H: int, D: int, kind: str, core: bool = False
) -> Case:
    """With weight and bias for "rmsnorm", without for "groupnorm"."""

    def call(device: torch.device, rows: int) -> Made:
        x, gate = tokens(device, dtype, rows, T, H, D), tokens(device, dtype, rows, T, H * D)
        affine = [tokens(device, dtype, H, D) if kind == "rmsnorm" else None for _ in range(2)]
        inputs = [x, gate, *affine, tokens(device, dtype, rows, T, H, D)]
        grads = launcher("norm_gate_bwd")(*inputs, kind, 1e-6)
        return inputs, [x for x in grads if x is not None]

    return Case(op="norm_gate_bwd", shape=shape, dtype=dtype, head_dim=D, batch=B, call=call, core=core)


def rotary_bwd(
    dtype: torch.dtype, shape: str, *, B: int, T: int, H: int, D: int, kind: str, core: bool = False
) -> Case:
    """The inverse rotation, of the gradients of queries and keys."""

    def call(device: torch.device, rows: int) -> Made:
        dq, dk = (tokens(device, dtype, rows, T, H, D) for _ in range(2))
        cos, sin = (tokens(device, FP32, 1, T, 1, D) for _ in range(2))
        grads = launcher("rotary_bwd")(dq, dk, cos, sin, kind, inverse=True)
        return [dq, dk, cos[..., : D // 2], sin[..., : D // 2]], grads

    return Case(op="rotary_bwd", shape=shape, dtype=dtype, head_dim=D, batch=B, call=call, core=core)

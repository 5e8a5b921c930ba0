"""Forward calls of every kernel, as cases: the inputs as the layers make them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.audit.case import FP32, Case, Made, chunk_flops, launcher, log_decays, tokens
from retpop.ops.rows import split_row


def pop_fwd(
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
    """POP; ``packed``: main and prediction tokens of q, k and v are views of one tensor, as are outputs."""
    P = N if P is None else P
    Dv = D if Dv is None else Dv

    def call(device: torch.device, rows: int) -> Made:
        outputs: dict[str, Tensor] = {}
        if packed:
            projected = tokens(device, dtype, rows, N * L + P * M, 3, H, D)
            (*main, out), (*pred, pred_out) = zip(
                *(split_row(x, (P, M)) for x in (*projected.unbind(2), torch.empty_like(projected[:, :, 0]))),
                strict=True,
            )
            outputs = {"out": out, "pred": pred_out}
        else:
            main = [tokens(device, dtype, rows, N * L, H, d) for d in (D, D, Dv)]
            pred = [tokens(device, dtype, rows, P, M, H, d) for d in (D, D, Dv)]
        before = torch.zeros(rows, H, D, Dv, device=device) if state else None
        starts = torch.zeros(rows, N, dtype=torch.bool, device=device) if reset else None
        inputs = [*main, *pred, log_decays(device, H), before, starts]
        return inputs, launcher("pop_fwd")(*inputs, L, offset, D**-0.5, **outputs)

    flops = N * chunk_flops(L, D, Dv) + P * chunk_flops(M, D, Dv, takes_in=False)
    return Case(
        op="pop_fwd",
        shape=shape,
        dtype=dtype,
        head_dim=max(D, Dv),
        batch=B,
        call=call,
        flops=H * flops,
        core=core,
    )


def retention_fwd(
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
    """Retention of B sequences, or of packed sequences of ``lengths`` in one row (B is 1)."""
    Dv = D if Dv is None else Dv

    def call(device: torch.device, rows: int) -> Made:
        q, k, v = (tokens(device, dtype, rows, T, H, d) for d in (D, D, Dv))
        sequences = len(lengths) or rows
        before = torch.zeros(sequences, H, D, Dv, device=device) if state else None
        ends = list(itertools.accumulate(lengths, initial=0))
        bounds = torch.tensor(ends, device=device) if lengths else None
        inputs = [q, k, v, log_decays(device, H), before]
        return [*inputs, bounds], launcher("retention_fwd")(*inputs, D**-0.5, bounds)

    flops = H * sum(chunk_flops(length, D, Dv) for length in lengths or [T])
    return Case(
        op="retention_fwd",
        shape=shape,
        dtype=dtype,
        head_dim=max(D, Dv),
        batch=B,
        call=call,
        flops=flops,
        core=core,
    )


def retention_step(dtype: torch.dtype, shape: str, *, B: int, H: int, D: int, core: bool = False) -> Case:
    def call(device: torch.device, rows: int) -> Made:
        inputs = [*(tokens(device, dtype, rows, H, D) for _ in range(3)), log_decays(device, H)]
        inputs.append(torch.zeros(rows, H, D, D, device=device))
        return inputs, launcher("retention_step")(*inputs, D**-0.5)

    return Case(op="retention_step", shape=shape, dtype=dtype, head_dim=D, batch=B, call=call, core=core)


def norm_gate_fwd(
    dtype: torch.dtype, shape: str, *, B: int, T: int, H: int, D: int, kind: str, core: bool = False
) -> Case:
    """With weight and bias for "rmsnorm", without for "groupnorm"."""

    def call(device: torch.device, rows: int) -> Made:
        x, gate = tokens(device, dtype, rows, T, H, D), tokens(device, dtype, rows, T, H * D)
        affine = [tokens(device, dtype, H, D) if kind == "rmsnorm" else None for _ in range(2)]
        return [x, gate, *affine], [launcher("norm_gate_fwd")(x, gate, *affine, kind, 1e-6)]

    return Case(op="norm_gate_fwd", shape=shape, dtype=dtype, head_dim=D, batch=B, call=call, core=core)


def rotary_fwd(
    dtype: torch.dtype, shape: str, *, B: int, T: int, H: int, D: int, kind: str, core: bool = False
) -> Case:
    def call(device: torch.device, rows: int) -> Made:
        q, k = (tokens(device, dtype, rows, T, H, D) for _ in range(2))
        cos, sin = (tokens(device, FP32, 1, T, 1, D) for _ in range(2))
        # The floor is half of each angle table: every cosine and sine stands there twice.
        return [q, k, cos[..., : D // 2], sin[..., : D // 2]], launcher("rotary_fwd")(q, k, cos, sin, kind)

    return Case(op="rotary_fwd", shape=shape, dtype=dtype, head_dim=D, batch=B, call=call, core=core)

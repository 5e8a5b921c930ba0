"""What is audited: each kernel's launcher at REM's shapes, long sequences and odd sizes, with its floors.

A case is made for any device: "meta" tensors to see what would be compiled, "cpu" to run in the interpreter
with ``rows`` of the batch only (bytes and flops grow with the batch, their ratios do not).

Floors: `floor_bytes` is every input read once and every output written once; `yardstick_flops` are the
products of the tokens as they are, in chunks of 64 (PERFORMANCE: 9.4 GFLOP for POP at REM's training shape).
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
"""Of an A100, A40, H100, B200, RTX 5090 and MI300X."""

CHUNK = 64

OPS = ("pop_fwd", "retention_fwd", "retention_step", "norm_gate_fwd", "rotary_fwd")


Made = tuple[Sequence[Tensor | None], Sequence[Tensor]]
"""The inputs of a call and its outputs."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one launcher.

    Attributes:
        op: the launcher's name, which is its module's.
        shape: what kind of shape it is, for example "rem training".
        dtype: of the token tensors.
        head_dim: the larger of Dk and Dv.
        batch: rows of the whole case; it is counted on one row and as small a part of the GPU.
        call: makes the inputs for (device, batch rows) and calls the launcher; returns (inputs, outputs).
        flops: the yardstick for one row of the batch; 0 where there are no dot products.
        core: whether `make test` audits it.
    """

    op: str
    shape: str
    dtype: torch.dtype
    head_dim: int
    batch: int
    call: Callable[[torch.device, int], Made]
    flops: int = 0
    core: bool = False

    @property
    def name(self) -> str:
        """For example "pop_fwd, rem training, bfloat16"."""
        return f"{self.op}, {self.shape}, {str(self.dtype).removeprefix('torch.')}"


def floor_bytes(tensors: Sequence[Tensor | None]) -> int:
    """The bytes of tensors that are read or written once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def chunk_flops(tokens: int, key_dim: int, value_dim: int, *, takes_in: bool = True) -> int:
    """Products of a head's tokens: scores, values, reading the state and, if so, taking tokens into it."""
    flops = 0
    for first in range(0, tokens, CHUNK):
        n = min(CHUNK, tokens - first)
        last = first + n >= tokens
        flops += 2 * n * n * (key_dim + value_dim)
        flops += 2 * n * key_dim * value_dim * (2 if takes_in or not last else 1)
    return flops


@contextmanager
def on_architecture(architecture: str, op: str, *, fraction: float = 1.0) -> Iterator[None]:
    """Let a launcher see a GPU of ``architecture``, or a ``fraction`` of it (for a fraction of a batch)."""
    launcher(op)
    seen = {
        "architecture_of": lambda device: architecture,
        "multiprocessors_of": lambda device: max(1, math.ceil(fraction * MULTIPROCESSORS[architecture])),
    }
    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("retpop.kernels.")]:
            for name, value in seen.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


def launcher(op: str) -> Callable[..., Any]:
    """A launcher by its name; imported late, because the environment decides what Triton makes of it."""
    module = {"norm_gate_fwd": "norm_gate", "rotary_fwd": "rotary"}.get(op, op)
    return getattr(importlib.import_module(f"retpop.kernels.{module}"), op)


def _tokens(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _log_decay(device: torch.device, heads: int) -> Tensor:
    return torch.full((heads,), -0.01, device=device)


def _pop(
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
            projected = _tokens(device, dtype, rows, N * L + P * M, 3, H, D)
            (*main, out), (*pred, pred_out) = zip(
                *(_split(x, P, M) for x in (*projected.unbind(2), torch.empty_like(projected[:, :, 0]))),
                strict=True,
            )
            outputs = {"out": out, "pred": pred_out}
        else:
            main = [_tokens(device, dtype, rows, N * L, H, d) for d in (D, D, Dv)]
            pred = [_tokens(device, dtype, rows, P, M, H, d) for d in (D, D, Dv)]
        before = torch.zeros(rows, H, D, Dv, device=device) if state else None
        starts = torch.zeros(rows, N, dtype=torch.bool, device=device) if reset else None
        inputs = [*main, *pred, _log_decay(device, H), before, starts]
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


def _split(row: Tensor, P: int, M: int) -> tuple[Tensor, Tensor]:
    """The main and the prediction tokens of a row: (B, N·L, H, D) and (B, P, M, H, D)."""
    length = row.shape[1] - P * M
    return row[:, :length], row[:, length:].unflatten(1, (P, M))


def _retention(
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
        q, k, v = (_tokens(device, dtype, rows, T, H, d) for d in (D, D, Dv))
        sequences = len(lengths) or rows
        before = torch.zeros(sequences, H, D, Dv, device=device) if state else None
        ends = list(itertools.accumulate(lengths, initial=0))
        bounds = torch.tensor(ends, device=device) if lengths else None
        inputs = [q, k, v, _log_decay(device, H), before]
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


def _step(dtype: torch.dtype, shape: str, *, B: int, H: int, D: int, core: bool = False) -> Case:
    def call(device: torch.device, rows: int) -> Made:
        inputs = [*(_tokens(device, dtype, rows, H, D) for _ in range(3)), _log_decay(device, H)]
        inputs.append(torch.zeros(rows, H, D, D, device=device))
        return inputs, launcher("retention_step")(*inputs, D**-0.5)

    return Case(op="retention_step", shape=shape, dtype=dtype, head_dim=D, batch=B, call=call, core=core)


def _norm_gate(
    dtype: torch.dtype, shape: str, *, B: int, T: int, H: int, D: int, kind: str, core: bool = False
) -> Case:
    """With weight and bias for "rmsnorm", without for "groupnorm"."""

    def call(device: torch.device, rows: int) -> Made:
        x, gate = _tokens(device, dtype, rows, T, H, D), _tokens(device, dtype, rows, T, H * D)
        affine = [_tokens(device, dtype, H, D) if kind == "rmsnorm" else None for _ in range(2)]
        return [x, gate, *affine], [launcher("norm_gate_fwd")(x, gate, *affine, kind, 1e-6)]

    return Case(op="norm_gate_fwd", shape=shape, dtype=dtype, head_dim=D, batch=B, call=call, core=core)


def _rotary(
    dtype: torch.dtype, shape: str, *, B: int, T: int, H: int, D: int, kind: str, core: bool = False
) -> Case:
    def call(device: torch.device, rows: int) -> Made:
        q, k = (_tokens(device, dtype, rows, T, H, D) for _ in range(2))
        cos, sin = (_tokens(device, FP32, 1, T, 1, D) for _ in range(2))
        # The floor is half of each angle table: every cosine and sine stands there twice.
        return [q, k, cos[..., : D // 2], sin[..., : D // 2]], launcher("rotary_fwd")(q, k, cos, sin, kind)

    return Case(op="rotary_fwd", shape=shape, dtype=dtype, head_dim=D, batch=B, call=call, core=core)


_REM = {"B": 64, "N": 10, "L": 65, "M": 64, "H": 4, "D": 64}
_IMAGINED = {**_REM, "N": 1, "P": 1, "offset": 1, "state": True}
_LONG = {"B": 8, "T": 4096, "H": 16}

CASES = [
    _pop(BF16, "rem training", **_REM, core=True),
    _pop(FP16, "rem training", **_REM),
    _pop(FP32, "rem training", **_REM, core=True),
    _pop(
        BF16, "rem training, packed, state and reset", **_REM, packed=True, state=True, reset=True, core=True
    ),
    _pop(BF16, "rem imagination", **_IMAGINED, core=True),
    _pop(FP32, "rem imagination", **_IMAGINED),
    _pop(BF16, "catch", B=32, N=5, L=10, M=9, H=4, D=16),
    _pop(BF16, "D 24", **{**_REM, "D": 24}),
    _pop(BF16, "D 60", **{**_REM, "D": 60}),
    _pop(BF16, "D 100", **{**_REM, "D": 100}),
    _pop(BF16, "Dk 64, Dv 128", **_REM, Dv=128),
    _pop(BF16, "D 128", **{**_REM, "D": 128}),
    _pop(BF16, "D 256", **{**_REM, "D": 256}),
    _pop(FP32, "D 128", **{**_REM, "D": 128}),
    _pop(FP32, "D 256", **{**_REM, "D": 256}),
    _retention(BF16, "D 64", **_LONG, D=64, core=True),
    _retention(FP16, "D 64", **_LONG, D=64),
    _retention(FP32, "D 64", **_LONG, D=64, core=True),
    _retention(BF16, "D 128", **_LONG, D=128, core=True),
    _retention(FP32, "D 128", **_LONG, D=128),
    _retention(BF16, "D 256", **_LONG, D=256),
    _retention(FP32, "D 256", **_LONG, D=256),
    _retention(BF16, "D 24", **_LONG, D=24),
    _retention(BF16, "D 60", **_LONG, D=60),
    _retention(BF16, "D 100", **_LONG, D=100),
    _retention(BF16, "Dk 64, Dv 128", **_LONG, D=64, Dv=128, state=True),
    _retention(BF16, "rem block", B=64, T=65, H=4, D=64, state=True),
    _retention(BF16, "one long row, D 64", B=1, T=4096, H=4, D=64, state=True),
    _retention(BF16, "packed, D 64", B=1, T=1000, H=64, D=64, state=True, lengths=[130, 0, 65, 1, 804]),
    _retention(
        BF16, "packed, few heads, D 64", B=1, T=1000, H=4, D=64, state=True, lengths=[130, 0, 65, 1, 804]
    ),
    _step(BF16, "D 64", B=64, H=4, D=64, core=True),
    _step(FP32, "D 64", B=64, H=4, D=64),
    _step(BF16, "D 100", B=64, H=4, D=100),
    _step(BF16, "D 256", B=64, H=16, D=256),
    _norm_gate(BF16, "rem training", B=64, T=1290, H=4, D=64, kind="groupnorm", core=True),
    _norm_gate(FP32, "rem training", B=64, T=1290, H=4, D=64, kind="groupnorm"),
    _norm_gate(BF16, "rmsnorm, affine, D 100", B=64, T=130, H=4, D=100, kind="rmsnorm"),
    _norm_gate(BF16, "rmsnorm, affine, D 256", B=64, T=130, H=16, D=256, kind="rmsnorm"),
    _rotary(BF16, "rem training, retnet", B=64, T=1290, H=4, D=64, kind="retnet", core=True),
    _rotary(BF16, "rem training, rope", B=64, T=1290, H=4, D=64, kind="rope"),
    _rotary(FP32, "retnet, D 60", B=64, T=130, H=4, D=60, kind="retnet"),
    _rotary(BF16, "rope, D 256", B=64, T=130, H=16, D=256, kind="rope"),
]

_SHORT = {"B": 64, "T": 520, "H": 2}

COUNTED = [
    *(case for case in CASES if case.op not in ("pop_fwd", "retention_fwd")),
    *(case for case in CASES if case.op == "pop_fwd" and case.head_dim <= 64),
    _pop(BF16, "D 100", **{**_REM, "N": 2, "D": 100}),
    _pop(BF16, "Dk 64, Dv 128", **{**_REM, "N": 2}, Dv=128),
    _pop(BF16, "D 128", **{**_REM, "N": 2, "D": 128}),
    _pop(BF16, "D 256", **{**_REM, "N": 2, "H": 1, "D": 256}),
    _retention(BF16, "D 64", **_SHORT, D=64, core=True),
    _retention(FP32, "D 64", **_SHORT, D=64),
    _retention(BF16, "D 128", **_SHORT, D=128),
    _retention(BF16, "D 256", **_SHORT, D=256, state=True),
    _retention(BF16, "D 100", **_SHORT, D=100),
    _retention(BF16, "rem block", B=64, T=65, H=4, D=64, state=True),
    _retention(BF16, "one long row, D 64", B=1, T=4096, H=1, D=64, state=True),
    _retention(BF16, "packed, D 64", B=1, T=1000, H=1, D=64, state=True, lengths=[130, 0, 65, 1, 804]),
]
"""Cases for the interpreter, which needs about 30 ms for 64 tokens of a head."""

HUGE = [
    _pop(BF16, "large batch", **{**_REM, "B": 2**17}, state=True, reset=True),
    _pop(BF16, "long", **{**_REM, "B": 1, "N": 2**19}, packed=True),
    _pop(BF16, "large heads", **{**_REM, "H": 2**20}),
    _retention(BF16, "large batch", B=2**20, T=65, H=4, D=64, state=True),
    _retention(BF16, "long", B=1, T=2**24, H=4, D=64, state=True),
    _retention(BF16, "large heads", B=1, T=65, H=2**20, D=64),
    _retention(BF16, "long, packed", B=1, T=2**24, H=4, D=64, state=True, lengths=[2**23] * 2),
    _step(BF16, "large batch", B=2**22, H=4, D=64),
    _norm_gate(BF16, "large batch", B=2**20, T=1290, H=4, D=64, kind="rmsnorm"),
    _norm_gate(BF16, "long", B=1, T=2**24, H=4, D=64, kind="groupnorm"),
    _rotary(BF16, "large batch", B=2**20, T=1290, H=4, D=64, kind="retnet"),
    _rotary(BF16, "long", B=1, T=2**24, H=4, D=64, kind="rope"),
]
"""More than 2^31 elements along each dimension in turn: do offsets and grids hold? For meta tensors only."""

"""The audited cases: each kernel's launcher at REM's shapes, long sequences and odd sizes."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.kernel_audit.calls import (
    BF16,
    FP16,
    FP32,
    Call,
    NormGate,
    Pooled,
    Pop,
    Retention,
    Rotary,
    Step,
    backward,
    forward,
)

OPS = (
    "pop_fwd",
    "retention_fwd",
    "retention_step",
    "pooled_retention",
    "norm_gate_fwd",
    "rotary_fwd",
    "pop_bwd",
    "retention_bwd",
    "norm_gate_bwd",
    "rotary_bwd",
)

_REM = Pop(B=64, N=10, L=65, M=64, H=4, D=64)
_TRAINED = replace(_REM, packed=True, state=True, reset=True)
_IMAGINED = replace(_REM, N=1, P=1, offset=1, state=True)
_LONG = Retention(B=8, T=4096, H=16, D=64)
_PACKED = Retention(B=1, T=1000, H=64, D=64, state=True, lengths=(130, 0, 65, 1, 804))
_RESETS = replace(_LONG, state=True, reset=True)
_BLOCK = Retention(B=64, T=65, H=4, D=64, state=True)
_ROW = Retention(B=1, T=4096, H=4, D=64, state=True)
_TOKENS = {"B": 64, "T": 1290, "H": 4, "D": 64}

_BOTH: list[tuple[torch.dtype, str, Call]] = [
    (BF16, "rem training", _REM),
    (FP16, "rem training", _REM),
    (FP32, "rem training", _REM),
    (BF16, "rem training, packed, state and reset", _TRAINED),
    (BF16, "rem imagination", _IMAGINED),
    (BF16, "catch", Pop(B=32, N=5, L=10, M=9, H=4, D=16)),
    (BF16, "long predictions", replace(_REM, L=40, M=130)),
    (BF16, "D 24", replace(_REM, D=24)),
    (BF16, "D 60", replace(_REM, D=60)),
    (BF16, "D 100", replace(_REM, D=100)),
    (BF16, "Dk 64, Dv 128", replace(_REM, Dv=128)),
    (BF16, "D 128", replace(_REM, D=128)),
    (BF16, "D 256", replace(_REM, D=256)),
    (FP32, "D 128", replace(_REM, D=128)),
    (FP32, "D 256", replace(_REM, D=256)),
    (BF16, "D 64", _LONG),
    (FP16, "D 64", _LONG),
    (FP32, "D 64", _LONG),
    (BF16, "D 128", replace(_LONG, D=128)),
    (FP32, "D 128", replace(_LONG, D=128)),
    (BF16, "D 256", replace(_LONG, D=256)),
    (FP32, "D 256", replace(_LONG, D=256)),
    (BF16, "D 24", replace(_LONG, D=24)),
    (BF16, "D 60", replace(_LONG, D=60)),
    (BF16, "D 100", replace(_LONG, D=100)),
    (BF16, "Dk 64, Dv 128", replace(_LONG, Dv=128, state=True)),
    (BF16, "resets, D 64", _RESETS),
    (BF16, "resets, D 128", replace(_RESETS, D=128)),
    (FP32, "resets, D 64", _RESETS),
    (BF16, "rem block", _BLOCK),
    (BF16, "one long row, D 64", _ROW),
    (BF16, "one long row, D 128", replace(_ROW, D=128)),
    (BF16, "one long row, D 256", replace(_ROW, D=256)),
    (BF16, "packed, D 64", _PACKED),
    (BF16, "rem training", NormGate(**_TOKENS, kind="groupnorm")),
    (FP32, "rem training", NormGate(**_TOKENS, kind="groupnorm")),
    (BF16, "rmsnorm, affine, D 100", NormGate(B=64, T=130, H=4, D=100, kind="rmsnorm")),
    (BF16, "rmsnorm, affine, D 256", NormGate(B=64, T=130, H=16, D=256, kind="rmsnorm")),
    (BF16, "rem training, retnet", Rotary(**_TOKENS, kind="retnet")),
]

FORWARD = [
    *(forward(*call) for call in _BOTH),
    forward(FP32, "rem imagination", _IMAGINED),
    forward(BF16, "packed, few heads, D 64", replace(_PACKED, H=4)),
    forward(BF16, "D 64", Step(B=64, H=4, D=64)),
    forward(FP32, "D 64", Step(B=64, H=4, D=64)),
    forward(BF16, "D 100", Step(B=64, H=4, D=100)),
    forward(BF16, "D 256", Step(B=64, H=16, D=256)),
    forward(BF16, "4 tokens, D 64", Pooled(B=64, T=4, H=4, D=64)),
    forward(BF16, "4 tokens, D 256", Pooled(B=64, T=4, H=16, D=256)),
    forward(BF16, "rem training, rope", Rotary(**_TOKENS, kind="rope")),
    forward(FP32, "retnet, D 60", Rotary(B=64, T=130, H=4, D=60, kind="retnet")),
    forward(BF16, "rope, D 256", Rotary(B=64, T=130, H=16, D=256, kind="rope")),
]

BACKWARD = [
    *(backward(*call) for call in _BOTH),
    backward(BF16, "few rows, split", replace(_REM, B=8, state=True, reset=True)),
    backward(BF16, "packed, few heads, D 64", replace(_PACKED, T=8000, H=4, lengths=(130, 0, 65, 1, 7804))),
    backward(FP32, "rope, D 60", Rotary(B=64, T=130, H=4, D=60, kind="rope")),
]

CASES = [*FORWARD, *BACKWARD]

_SHORT = Retention(B=64, T=520, H=2, D=64)
_ONE_HEAD = replace(_TRAINED, B=256, H=1)  # as many programs
_FEW = {"B": 64, "T": 130, "H": 1, "D": 64}

_COUNTED_BOTH: list[tuple[torch.dtype, str, Call]] = [
    (BF16, "rem training, one head", _ONE_HEAD),
    (BF16, "D 100", replace(_REM, N=2, D=100)),
    (BF16, "Dk 64, Dv 128", replace(_REM, N=2, Dv=128)),
    (BF16, "D 128", replace(_REM, N=2, D=128)),
    (BF16, "D 256", replace(_REM, N=2, H=1, D=256)),
    (BF16, "D 64", _SHORT),
    (FP32, "D 64", _SHORT),
    (BF16, "D 128", replace(_SHORT, D=128)),
    (BF16, "D 256", replace(_SHORT, D=256, state=True)),
    (BF16, "D 100", replace(_SHORT, D=100)),
    (BF16, "resets, D 64", replace(_SHORT, state=True, reset=True)),
    (BF16, "rem block", _BLOCK),
    (BF16, "one long row, D 64", replace(_ROW, H=1)),
    (BF16, "packed, D 64", replace(_PACKED, H=1)),
]

COUNTED = [
    *(way(*call) for way in (forward, backward) for call in _COUNTED_BOTH),
    forward(BF16, "rem imagination, one head", replace(_IMAGINED, B=256, H=1)),
    forward(BF16, "one head", NormGate(**_FEW, kind="groupnorm")),
    backward(BF16, "one head", NormGate(**_FEW, kind="rmsnorm")),
    forward(BF16, "one head", Rotary(**_FEW, kind="retnet")),
    forward(BF16, "one head", Step(B=64, H=1, D=64)),
    *(case for case in CASES if not case.op.startswith(("pop", "retention_fwd", "retention_bwd"))),
    *(case for case in CASES if case.op.startswith("pop") and case.head_dim <= 64),
]
"""For the interpreter, which needs about 30 ms for 64 tokens of a head."""

_HUGE_BOTH: list[tuple[torch.dtype, str, Call]] = [
    (BF16, "large batch", replace(_REM, B=2**17, state=True, reset=True)),
    (BF16, "long", replace(_REM, B=1, N=2**19, packed=True)),
    (BF16, "large heads", replace(_REM, H=2**20)),
    (BF16, "large batch", Retention(B=2**20, T=65, H=4, D=64, state=True)),
    (BF16, "long", Retention(B=1, T=2**24, H=4, D=64, state=True)),
    (BF16, "large heads", Retention(B=1, T=65, H=2**20, D=64)),
    (BF16, "large batch, resets", Retention(B=2**20, T=2**12, H=4, D=64, reset=True)),
    (BF16, "long, resets", Retention(B=2, T=2**24, H=4, D=64, reset=True)),
    (BF16, "long, packed", Retention(B=1, T=2**24, H=4, D=64, state=True, lengths=(2**23, 2**23))),
    (BF16, "large batch", NormGate(B=2**20, T=1290, H=4, D=64, kind="rmsnorm")),
    (BF16, "long", NormGate(B=1, T=2**24, H=4, D=64, kind="groupnorm")),
    (BF16, "large batch", Rotary(B=2**20, T=1290, H=4, D=64, kind="retnet")),
]

HUGE = [
    *(way(*call) for way in (forward, backward) for call in _HUGE_BOTH),
    forward(BF16, "large batch", Step(B=2**22, H=4, D=64)),
    forward(BF16, "large batch", Pooled(B=2**22, T=4, H=4, D=64)),
    forward(BF16, "long", Rotary(B=1, T=2**24, H=4, D=64, kind="rope")),
    backward(BF16, "large batch, D 128", replace(_REM, B=2**16, D=128, state=True)),
    backward(BF16, "long, D 128", Retention(B=1, T=2**24, H=2, D=128)),
]
"""More than 2^31 elements along each dimension in turn, to check offsets and grids; for meta tensors only."""

PARTS = {"compile": CASES, "huge": HUGE, "traffic": COUNTED}
"""The cases of each part of the audit; within a part, op, shape and dtype identify a case."""

CORE = {
    "compile": {
        "pop_fwd, rem training, packed, state and reset, bfloat16",
        "pop_bwd, rem training, packed, state and reset, bfloat16",
        "retention_fwd, D 64, bfloat16",
        "retention_fwd, D 64, float32",
        "retention_bwd, D 64, bfloat16",
        "retention_step, D 64, bfloat16",
        "pooled_retention, 4 tokens, D 64, bfloat16",
        "norm_gate_fwd, rem training, bfloat16",
        "norm_gate_bwd, rem training, bfloat16",
        "rotary_fwd, rem training, retnet, bfloat16",
    },
    "huge": {
        "pop_fwd, long, bfloat16",
        "pop_bwd, large batch, bfloat16",
        "retention_fwd, long, packed, bfloat16",
        "retention_bwd, long, packed, bfloat16",
        "retention_step, large batch, bfloat16",
        "pooled_retention, large batch, bfloat16",
        "norm_gate_fwd, large batch, bfloat16",
        "norm_gate_bwd, long, bfloat16",
        "rotary_fwd, large batch, bfloat16",
    },
    "traffic": {
        "pop_fwd, rem training, one head, bfloat16",
        "pop_fwd, rem imagination, one head, bfloat16",
        "pop_bwd, rem training, one head, bfloat16",
        "retention_fwd, D 64, bfloat16",
        "retention_bwd, D 64, bfloat16",
        "retention_step, one head, bfloat16",
        "pooled_retention, 4 tokens, D 64, bfloat16",
        "norm_gate_fwd, one head, bfloat16",
        "norm_gate_bwd, one head, bfloat16",
        "rotary_fwd, one head, bfloat16",
    },
}
"""The names of the cases that `make test` audits: each kernel once in each part."""

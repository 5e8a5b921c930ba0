"""What is audited: each kernel's launcher at REM's shapes, long sequences and odd sizes."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.audit.backward_cases import norm_gate_bwd, pop_bwd, retention_bwd, rotary_bwd
from benchmarks.audit.case import BF16, FP16, FP32
from benchmarks.audit.forward_cases import norm_gate_fwd, pop_fwd, retention_fwd, retention_step, rotary_fwd

OPS = (
    "pop_fwd",
    "retention_fwd",
    "retention_step",
    "norm_gate_fwd",
    "rotary_fwd",
    "pop_bwd",
    "retention_bwd",
    "norm_gate_bwd",
    "rotary_bwd",
)

_REM = {"B": 64, "N": 10, "L": 65, "M": 64, "H": 4, "D": 64}
_IMAGINED = {**_REM, "N": 1, "P": 1, "offset": 1, "state": True}
_LENGTHS = [130, 0, 65, 1, 804]
_LONG = {"B": 8, "T": 4096, "H": 16}

FORWARD = [
    pop_fwd(BF16, "rem training", **_REM),
    pop_fwd(FP16, "rem training", **_REM),
    pop_fwd(FP32, "rem training", **_REM),
    pop_fwd(
        BF16, "rem training, packed, state and reset", **_REM, packed=True, state=True, reset=True, core=True
    ),
    pop_fwd(BF16, "rem imagination", **_IMAGINED, core=True),
    pop_fwd(FP32, "rem imagination", **_IMAGINED),
    pop_fwd(BF16, "catch", B=32, N=5, L=10, M=9, H=4, D=16),
    pop_fwd(BF16, "long predictions", **{**_REM, "L": 40, "M": 130}),
    pop_fwd(BF16, "D 24", **{**_REM, "D": 24}),
    pop_fwd(BF16, "D 60", **{**_REM, "D": 60}),
    pop_fwd(BF16, "D 100", **{**_REM, "D": 100}),
    pop_fwd(BF16, "Dk 64, Dv 128", **_REM, Dv=128),
    pop_fwd(BF16, "D 128", **{**_REM, "D": 128}),
    pop_fwd(BF16, "D 256", **{**_REM, "D": 256}),
    pop_fwd(FP32, "D 128", **{**_REM, "D": 128}),
    pop_fwd(FP32, "D 256", **{**_REM, "D": 256}),
    retention_fwd(BF16, "D 64", **_LONG, D=64, core=True),
    retention_fwd(FP16, "D 64", **_LONG, D=64),
    retention_fwd(FP32, "D 64", **_LONG, D=64, core=True),
    retention_fwd(BF16, "D 128", **_LONG, D=128),
    retention_fwd(FP32, "D 128", **_LONG, D=128),
    retention_fwd(BF16, "D 256", **_LONG, D=256),
    retention_fwd(FP32, "D 256", **_LONG, D=256),
    retention_fwd(BF16, "D 24", **_LONG, D=24),
    retention_fwd(BF16, "D 60", **_LONG, D=60),
    retention_fwd(BF16, "D 100", **_LONG, D=100),
    retention_fwd(BF16, "Dk 64, Dv 128", **_LONG, D=64, Dv=128, state=True),
    retention_fwd(BF16, "rem block", B=64, T=65, H=4, D=64, state=True),
    retention_fwd(BF16, "one long row, D 64", B=1, T=4096, H=4, D=64, state=True),
    retention_fwd(BF16, "packed, D 64", B=1, T=1000, H=64, D=64, state=True, lengths=_LENGTHS),
    retention_fwd(BF16, "packed, few heads, D 64", B=1, T=1000, H=4, D=64, state=True, lengths=_LENGTHS),
    retention_step(BF16, "D 64", B=64, H=4, D=64, core=True),
    retention_step(FP32, "D 64", B=64, H=4, D=64),
    retention_step(BF16, "D 100", B=64, H=4, D=100),
    retention_step(BF16, "D 256", B=64, H=16, D=256),
    norm_gate_fwd(BF16, "rem training", B=64, T=1290, H=4, D=64, kind="groupnorm", core=True),
    norm_gate_fwd(FP32, "rem training", B=64, T=1290, H=4, D=64, kind="groupnorm"),
    norm_gate_fwd(BF16, "rmsnorm, affine, D 100", B=64, T=130, H=4, D=100, kind="rmsnorm"),
    norm_gate_fwd(BF16, "rmsnorm, affine, D 256", B=64, T=130, H=16, D=256, kind="rmsnorm"),
    rotary_fwd(BF16, "rem training, retnet", B=64, T=1290, H=4, D=64, kind="retnet", core=True),
    rotary_fwd(BF16, "rem training, rope", B=64, T=1290, H=4, D=64, kind="rope"),
    rotary_fwd(FP32, "retnet, D 60", B=64, T=130, H=4, D=60, kind="retnet"),
    rotary_fwd(BF16, "rope, D 256", B=64, T=130, H=16, D=256, kind="rope"),
]

BACKWARD = [
    pop_bwd(BF16, "rem training", **_REM),
    pop_bwd(FP16, "rem training", **_REM),
    pop_bwd(FP32, "rem training", **_REM),
    pop_bwd(
        BF16, "rem training, packed, state and reset", **_REM, packed=True, state=True, reset=True, core=True
    ),
    pop_bwd(BF16, "rem imagination", **_IMAGINED),
    pop_bwd(BF16, "few rows, split", **{**_REM, "B": 8}, state=True, reset=True),
    pop_bwd(BF16, "catch", B=32, N=5, L=10, M=9, H=4, D=16),
    pop_bwd(BF16, "long predictions", **{**_REM, "L": 40, "M": 130}),
    pop_bwd(BF16, "D 24", **{**_REM, "D": 24}),
    pop_bwd(BF16, "D 60", **{**_REM, "D": 60}),
    pop_bwd(BF16, "D 100", **{**_REM, "D": 100}),
    pop_bwd(BF16, "Dk 64, Dv 128", **_REM, Dv=128),
    pop_bwd(BF16, "D 128", **{**_REM, "D": 128}),
    pop_bwd(BF16, "D 256", **{**_REM, "D": 256}),
    pop_bwd(FP32, "D 128", **{**_REM, "D": 128}),
    pop_bwd(FP32, "D 256", **{**_REM, "D": 256}),
    retention_bwd(BF16, "D 64", **_LONG, D=64, core=True),
    retention_bwd(FP16, "D 64", **_LONG, D=64),
    retention_bwd(FP32, "D 64", **_LONG, D=64),
    retention_bwd(BF16, "D 128", **_LONG, D=128),
    retention_bwd(FP32, "D 128", **_LONG, D=128),
    retention_bwd(BF16, "D 256", **_LONG, D=256),
    retention_bwd(FP32, "D 256", **_LONG, D=256),
    retention_bwd(BF16, "D 24", **_LONG, D=24),
    retention_bwd(BF16, "D 60", **_LONG, D=60),
    retention_bwd(BF16, "D 100", **_LONG, D=100),
    retention_bwd(BF16, "Dk 64, Dv 128", **_LONG, D=64, Dv=128, state=True),
    retention_bwd(BF16, "rem block", B=64, T=65, H=4, D=64, state=True),
    retention_bwd(BF16, "one long row, D 64", B=1, T=4096, H=4, D=64, state=True),
    retention_bwd(BF16, "packed, D 64", B=1, T=1000, H=64, D=64, state=True, lengths=_LENGTHS),
    retention_bwd(
        BF16, "packed, few heads, D 64", B=1, T=8000, H=4, D=64, state=True, lengths=[130, 0, 65, 1, 7804]
    ),
    norm_gate_bwd(BF16, "rem training", B=64, T=1290, H=4, D=64, kind="groupnorm", core=True),
    norm_gate_bwd(FP32, "rem training", B=64, T=1290, H=4, D=64, kind="groupnorm"),
    norm_gate_bwd(BF16, "rmsnorm, affine, D 100", B=64, T=130, H=4, D=100, kind="rmsnorm"),
    norm_gate_bwd(BF16, "rmsnorm, affine, D 256", B=64, T=130, H=16, D=256, kind="rmsnorm"),
    rotary_bwd(BF16, "rem training, retnet", B=64, T=1290, H=4, D=64, kind="retnet"),
    rotary_bwd(FP32, "rope, D 60", B=64, T=130, H=4, D=60, kind="rope"),
]

CASES = [*FORWARD, *BACKWARD]

_SHORT = {"B": 64, "T": 520, "H": 2}

_ONE_HEAD = {**_REM, "B": 256, "H": 1, "packed": True, "state": True, "reset": True}  # as many programs
_FEW = {"B": 64, "T": 130, "H": 1, "D": 64}

COUNTED = [
    pop_fwd(BF16, "rem training, one head", **_ONE_HEAD, core=True),
    pop_fwd(BF16, "rem imagination, one head", **{**_IMAGINED, "B": 256, "H": 1}, core=True),
    pop_bwd(BF16, "rem training, one head", **_ONE_HEAD, core=True),
    norm_gate_fwd(BF16, "one head", **_FEW, kind="groupnorm", core=True),
    norm_gate_bwd(BF16, "one head", **_FEW, kind="rmsnorm", core=True),
    rotary_fwd(BF16, "one head", **_FEW, kind="retnet", core=True),
    retention_step(BF16, "one head", B=64, H=1, D=64, core=True),
    *(
        replace(x, core=False)
        for x in CASES
        if not x.op.startswith(("pop", "retention_fwd", "retention_bwd"))
    ),
    *(replace(x, core=False) for x in CASES if x.op.startswith("pop") and x.head_dim <= 64),
    pop_fwd(BF16, "D 100", **{**_REM, "N": 2, "D": 100}),
    pop_fwd(BF16, "Dk 64, Dv 128", **{**_REM, "N": 2}, Dv=128),
    pop_fwd(BF16, "D 128", **{**_REM, "N": 2, "D": 128}),
    pop_fwd(BF16, "D 256", **{**_REM, "N": 2, "H": 1, "D": 256}),
    retention_fwd(BF16, "D 64", **_SHORT, D=64, core=True),
    retention_fwd(FP32, "D 64", **_SHORT, D=64),
    retention_fwd(BF16, "D 128", **_SHORT, D=128),
    retention_fwd(BF16, "D 256", **_SHORT, D=256, state=True),
    retention_fwd(BF16, "D 100", **_SHORT, D=100),
    retention_fwd(BF16, "rem block", B=64, T=65, H=4, D=64, state=True),
    retention_fwd(BF16, "one long row, D 64", B=1, T=4096, H=1, D=64, state=True),
    retention_fwd(BF16, "packed, D 64", B=1, T=1000, H=1, D=64, state=True, lengths=_LENGTHS),
    pop_bwd(BF16, "D 100", **{**_REM, "N": 2, "D": 100}),
    pop_bwd(BF16, "Dk 64, Dv 128", **{**_REM, "N": 2}, Dv=128),
    pop_bwd(BF16, "D 128", **{**_REM, "N": 2, "D": 128}),
    pop_bwd(BF16, "D 256", **{**_REM, "N": 2, "H": 1, "D": 256}),
    retention_bwd(BF16, "D 64", **_SHORT, D=64, core=True),
    retention_bwd(FP32, "D 64", **_SHORT, D=64),
    retention_bwd(BF16, "D 128", **_SHORT, D=128),
    retention_bwd(BF16, "D 256", **_SHORT, D=256, state=True),
    retention_bwd(BF16, "D 100", **_SHORT, D=100),
    retention_bwd(BF16, "rem block", B=64, T=65, H=4, D=64, state=True),
    retention_bwd(BF16, "one long row, D 64", B=1, T=4096, H=1, D=64, state=True),
    retention_bwd(BF16, "packed, D 64", B=1, T=1000, H=1, D=64, state=True, lengths=_LENGTHS),
]
"""For the interpreter, which needs about 30 ms for 64 tokens of a head; `make test` has small ones."""

HUGE = [
    pop_fwd(BF16, "large batch", **{**_REM, "B": 2**17}, state=True, reset=True),
    pop_fwd(BF16, "long", **{**_REM, "B": 1, "N": 2**19}, packed=True, core=True),
    pop_fwd(BF16, "large heads", **{**_REM, "H": 2**20}),
    retention_fwd(BF16, "large batch", B=2**20, T=65, H=4, D=64, state=True),
    retention_fwd(BF16, "long", B=1, T=2**24, H=4, D=64, state=True),
    retention_fwd(BF16, "large heads", B=1, T=65, H=2**20, D=64),
    retention_fwd(BF16, "long, packed", B=1, T=2**24, H=4, D=64, state=True, lengths=[2**23] * 2, core=True),
    retention_step(BF16, "large batch", B=2**22, H=4, D=64, core=True),
    norm_gate_fwd(BF16, "large batch", B=2**20, T=1290, H=4, D=64, kind="rmsnorm", core=True),
    norm_gate_fwd(BF16, "long", B=1, T=2**24, H=4, D=64, kind="groupnorm"),
    rotary_fwd(BF16, "large batch", B=2**20, T=1290, H=4, D=64, kind="retnet", core=True),
    rotary_fwd(BF16, "long", B=1, T=2**24, H=4, D=64, kind="rope"),
    pop_bwd(BF16, "large batch", **{**_REM, "B": 2**17}, state=True, reset=True, core=True),
    pop_bwd(BF16, "long", **{**_REM, "B": 1, "N": 2**19}, packed=True),
    pop_bwd(BF16, "large heads", **{**_REM, "H": 2**20}),
    pop_bwd(BF16, "large batch, D 128", **{**_REM, "B": 2**16, "D": 128}, state=True),
    retention_bwd(BF16, "large batch", B=2**20, T=65, H=4, D=64, state=True),
    retention_bwd(BF16, "long", B=1, T=2**24, H=4, D=64, state=True),
    retention_bwd(BF16, "large heads", B=1, T=65, H=2**20, D=64),
    retention_bwd(BF16, "long, packed", B=1, T=2**24, H=4, D=64, state=True, lengths=[2**23] * 2, core=True),
    retention_bwd(BF16, "long, D 128", B=1, T=2**24, H=2, D=128),
    norm_gate_bwd(BF16, "large batch", B=2**20, T=1290, H=4, D=64, kind="rmsnorm"),
    norm_gate_bwd(BF16, "long", B=1, T=2**24, H=4, D=64, kind="groupnorm", core=True),
    rotary_bwd(BF16, "large batch", B=2**20, T=1290, H=4, D=64, kind="retnet"),
]
"""More than 2^31 elements along each dimension in turn: do offsets and grids hold? For meta tensors only."""

PARTS = {"compile": CASES, "huge": HUGE, "traffic": COUNTED}
"""What each part of the audit is made of; in a part, op, shape and dtype name a case."""

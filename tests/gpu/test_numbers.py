"""Every operation on the GPU in float32, bfloat16 and float16: results and gradients against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DTYPES, REHEARSAL, Errors, Record, check_case, gradients_of, on, weights_like
from retention_cases import PopCase, RetentionCase, log_decays, normal
from torch import Tensor
from torch.nn import functional as F

import retpop
from retpop.ops import reference, triton_backend
from retpop.ops.rows import join_row, split_row
from retpop.position import Rotation, rotary_frequencies, rotate, rotation_at

pytestmark = pytest.mark.gpu

RETENTION = {
    "one block": (4, 65, 4, 64, 64),
    "partial chunk": (2, 130, 3, 64, 64),
    "short": (2, 7, 2, 8, 8),
    "odd head dims": (2, 63, 2, 24, 100),
    "Dk 64, Dv 128": (2, 130, 2, 64, 128),
    "D 128": (2, 190, 2, 128, 128),
    "D 256": (1, 130, 1, 256, 256),
    "one sweep": (40, 2100, 4, 64, 64),
    "split": (1, 4200, 2, 64, 64),
    "split, D 128": (1, 4200, 1, 128, 128),
    "one token": (3, 1, 4, 64, 64),
    "one token, odd": (2, 1, 3, 60, 100),
}
"""B, T, H, Dk, Dv."""

POP = {
    "rem training": {"sizes": (2, 10, 65, 10, 64, 4, 64, 64)},
    "rem training, reset": {"sizes": (3, 10, 65, 10, 64, 4, 64, 64), "with_reset": True},
    "rem imagination": {"sizes": (4, 1, 65, 1, 64, 4, 64, 64), "offset": 1},
    "many rows": {"sizes": (36, 3, 65, 3, 64, 4, 64, 64), "with_reset": True},
    "M above L, offset 1": {"sizes": (2, 3, 40, 3, 70, 2, 24, 100), "offset": 1, "with_reset": True},
    "blocks of one token": {"sizes": (2, 5, 1, 5, 1, 2, 16, 16)},
    "no predictions": {"sizes": (2, 3, 65, 0, 0, 2, 64, 64), "with_reset": True},
    "no state": {"sizes": (2, 3, 65, 3, 64, 2, 64, 64), "with_state": False},
    "D 128": {"sizes": (2, 3, 65, 3, 64, 2, 128, 128), "with_reset": True},
    "D 256": {"sizes": (1, 2, 65, 2, 64, 1, 256, 256)},
    "split, N + 1 predictions": {"sizes": (1, 12, 65, 13, 64, 2, 64, 64), "with_reset": True},
}
"""B, N, L, P, M, H, Dk, Dv, and what differs from PopCase.make's defaults."""

if REHEARSAL:
    RETENTION = {"partial chunk": (1, 37, 2, 16, 24), "one token": (2, 1, 2, 16, 16)}
    POP = {
        "reset": {"sizes": (1, 2, 17, 2, 5, 2, 16, 24), "with_reset": True},
        "offset 1": {"sizes": (2, 1, 5, 1, 4, 1, 16, 16), "offset": 1},
    }

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("shape", RETENTION)
def test_retention(shape: str, dtype: torch.dtype, device: torch.device, record_property: Record) -> None:
    case = on(RetentionCase.make(*RETENTION[shape], dtype=dtype), device)
    schedule = retpop.explain_backend(case.q, case.v, backend="triton")
    if "split" in shape or "sweep" in shape:
        assert ("split" in shape) == ("split into stretches" in schedule), schedule
    check_case(case, dtype, record_property)


BOUNDARIES = [0, 9, 9, 23] if REHEARSAL else [0, 65, 65, 66, 130, 400, 463]


@dtypes
@pytest.mark.parametrize("with_reset", [False, True])
def test_packed_retention(
    with_reset: bool, dtype: torch.dtype, device: torch.device, record_property: Record
) -> None:
    dim = 16 if REHEARSAL else 64
    sequences, tokens = len(BOUNDARIES) - 1, BOUNDARIES[-1]
    case = RetentionCase.make(1, tokens, 2, dim, dim, dtype=dtype, sequences=sequences)
    bounds = torch.tensor(BOUNDARIES, dtype=torch.int32, device=device)
    reset = (torch.arange(tokens, device=device) % 11 == 3).unsqueeze(0) if with_reset else None
    check_case(on(case, device), dtype, record_property, cu_seqlens=bounds, reset=reset)


@pytest.mark.skipif(REHEARSAL, reason="long")
@dtypes
def test_packed_retention_in_stretches(
    dtype: torch.dtype, device: torch.device, record_property: Record
) -> None:
    case = RetentionCase.make(1, 9000, 2, 64, 64, dtype=dtype, sequences=3)
    bounds = torch.tensor([0, 300, 8000, 9000], dtype=torch.int64, device=device)
    check_case(on(case, device), dtype, record_property, cu_seqlens=bounds)


@dtypes
@pytest.mark.parametrize("shape", POP)
def test_pop(shape: str, dtype: torch.dtype, device: torch.device, record_property: Record) -> None:
    options = dict(POP[shape])
    case = PopCase.make(*options.pop("sizes"), dtype=dtype, **options)
    check_case(on(case, device), dtype, record_property)


ROWS = {"offset 0": (2, 3, 17, 3, 9, 2, 16, 0), "offset 1": (2, 3, 17, 3, 20, 2, 16, 1)}
if not REHEARSAL:
    ROWS = {
        "rem training": (2, 10, 65, 10, 64, 4, 64, 0),
        "rem imagination": (4, 1, 65, 1, 64, 4, 64, 1),
        "odd": (2, 3, 40, 3, 70, 2, 24, 1),
        "D 128": (2, 3, 65, 3, 64, 2, 128, 0),
        "few pairs": (1, 6, 65, 6, 64, 1, 64, 1),
    }
"""B, N, L, P, M, H, D, offset."""


@dtypes
@pytest.mark.parametrize("shape", ROWS)
def test_pop_rows(shape: str, dtype: torch.dtype, device: torch.device, record_property: Record) -> None:
    """Queries, keys and values side by side in one projection, main and prediction tokens in one row."""
    B, N, L, P, M, H, D, offset = ROWS[shape]
    projected = normal(B, N * L + P * M, 3 * H, D, seed=1, dtype=dtype).to(device)
    state = normal(B, H, D, D, seed=2, dtype=torch.float32).to(device)
    log_decay = log_decays(H, torch.float32).to(device)
    reset = (torch.arange(B * N).view(B, N) % 3 == 1).to(device)
    leaves = [x.detach().clone().requires_grad_() for x in (projected, state)]
    row = leaves[0].split(H, dim=2)
    results = torch.ops.retpop.pop_fwd(list(row), log_decay, leaves[1], reset, [P, M], L, offset, 0.5, None)
    doubles = [x.detach().double().requires_grad_() for x in (projected, state)]
    parts = [split_row(x, (P, M)) for x in doubles[0].split(H, dim=2)]
    out, pred, final = reference.pop_retention(
        *(main for main, _ in parts),
        *(pred for _, pred in parts),
        log_decay.double(),
        block_size=L,
        offset=offset,
        state=doubles[1],
        scale=0.5,
        reset=reset,
    )
    wanted = (join_row(out, pred), final)
    errors = Errors(dtype, record_property)
    errors.compare("row", "out", results[0], wanted[0], 1)
    errors.compare("state", "state", results[1], wanted[1], None)
    weights = weights_like(results)
    found, right = gradients_of(results, leaves, weights), gradients_of(wanted, doubles, weights)
    errors.compare("grad row", "grad", found[0], right[0], 1)
    errors.compare("grad state", "grad", found[1], right[1], None)
    errors.finish()


@dtypes
def test_pooled_retention(dtype: torch.dtype, device: torch.device, record_property: Record) -> None:
    """One row is padding; the other two take in some of their tokens."""
    dim = 16 if REHEARSAL else 64
    case = on(RetentionCase.make(3, 4, 2, dim, dim, dtype=dtype, with_state=False), device)
    pool = normal(6, 2, dim, dim, seed=9, dtype=torch.float32).to(device)
    double, expected = case.double(), pool.double()
    index, count = (torch.tensor(x, device=device) for x in ([4, -1, 0], [2, 1, 4]))
    found, wanted = (
        retpop.pooled_retention(x.q, x.k, x.v, x.log_decay, states, index, count=count, backend=backend)
        for x, states, backend in ((case, pool, "triton"), (double, expected, "reference"))
    )
    errors = Errors(dtype, record_property)
    errors.compare("out", "out", found, wanted, 1)
    errors.compare("states", "state", pool, expected, None)
    errors.finish()


NORMS = (
    [(2, 9, 2, 24)] if REHEARSAL else [(2, 1290, 4, 64), (3, 65, 2, 100), (2, 130, 2, 256), (2, 65, 3, 24)]
)


@dtypes
@pytest.mark.parametrize("kind", ["groupnorm", "rmsnorm"])
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_norm_gate(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: torch.device, record_property: Record
) -> None:
    """With a weight, and with a bias where the norm has one; eps is that of the layers."""
    numbers = [normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=dtype)]
    affine = 2 if kind == "groupnorm" else 1
    numbers += [normal(*shape[-2:], seed=3 + i, dtype=dtype) for i in range(affine)]
    leaves = [x.to(device).requires_grad_() for x in numbers]
    doubles = [x.to(device).double().requires_grad_() for x in numbers]

    def parameters(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return tensors[2], tensors[3] if affine == 2 else None

    y = triton_backend.gated_norm(*leaves[:2], *parameters(leaves), kind=kind, eps=1e-6, activation="silu")
    normalize = F.layer_norm if kind == "groupnorm" else F.rms_norm
    weight, bias = parameters(doubles)
    wanted = normalize(doubles[0], shape[-1:], eps=1e-6) * weight
    wanted = F.silu(doubles[1]) * (wanted if bias is None else wanted + bias)
    errors = Errors(dtype, record_property)
    errors.compare("y", "out", y, wanted, 1)
    weights = weights_like([y])
    found, right = gradients_of([y], leaves, weights), gradients_of([wanted], doubles, weights)
    for name, a, e in zip(("x", "gate"), found, right, strict=False):
        errors.compare(f"grad {name}", "grad", a, e, 1)
    for name, a, e in zip(("weight", "bias"), found[2:], right[2:], strict=False):
        errors.compare(f"grad {name}", "grad", a[None, None], e[None, None], None)
    errors.finish()


@dtypes
@pytest.mark.parametrize("kind", ["retnet", "rope"])
@pytest.mark.parametrize("dim", [16] if REHEARSAL else [64, 60, 256])
def test_rotary(
    dim: int, kind: str, dtype: torch.dtype, device: torch.device, record_property: Record
) -> None:
    """Positions differ from row to row and are far out."""
    B, T, H = (2, 5, 2) if REHEARSAL else (3, 1290, 4)
    projected = normal(B, T, 2 * H, dim, seed=1, dtype=dtype).to(device)
    leaf, double = projected.clone().requires_grad_(), projected.double().requires_grad_()
    positions = torch.arange(T, device=device) + torch.tensor([[0], [2**20], [2**24 + 1]], device=device)[:B]
    rotation = rotation_at(positions, rotary_frequencies(kind, dim).to(device), kind)
    results = triton_backend.rotate(*leaf.chunk(2, dim=2), rotation, kind)
    exact = Rotation(rotation.cos.double(), rotation.sin.double())
    wanted = [rotate(x, exact, kind) for x in double.chunk(2, dim=2)]
    errors = Errors(dtype, record_property)
    for name, a, e in zip("qk", results, wanted, strict=True):
        errors.compare(name, "out", a, e, 1)
    weights = weights_like(results)
    found, right = gradients_of(results, [leaf], weights), gradients_of(wanted, [double], weights)
    errors.compare("grad", "grad", found[0], right[0], 1)
    errors.finish()

"""`pooled_retention`: decoding from states in a pool, by PyTorch and by the kernel in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from retention_cases import GAMMAS, RetentionCase, assert_same_results, normal
from torch import Tensor

import retpop
from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import StepConfig
from retpop.kernels.launch import run as run_launches
from retpop.kernels.pooled_retention import plan_pooled_retention
from retpop.ops.triton_backend import custom

backends = pytest.mark.parametrize("backend", ["torch", "triton", "reference"])

PLACES = 5


def pool_of(case: RetentionCase) -> Tensor:
    """States at random."""
    _, _, H, Dk = case.q.shape
    return normal(PLACES, H, Dk, case.v.shape[-1], seed=9, dtype=torch.float32)


def check(
    case: RetentionCase, places: list[int], counts: list[int] | None, backend: str, limit: float = 5e-6
) -> None:
    """Outputs, and all states of the pool, against the reference on copies of the states."""
    pool = pool_of(case)
    expected_pool = pool.double()
    expected = torch.zeros_like(case.v, dtype=torch.float64)
    double = case.double()
    for row, place in enumerate(places):
        if place < 0:
            continue
        one = replace(double, **{name: getattr(double, name)[row : row + 1] for name in "qkv"})
        T = case.q.shape[1] if counts is None else counts[row]
        state = expected_pool[place : place + 1].clone()
        expected[row : row + 1], _ = replace(one, state=state).run(backend="reference")
        _, expected_pool[place : place + 1] = one.part(0, T, state).run(backend="reference")
    index = torch.tensor(places, dtype=torch.int32)
    count = None if counts is None else torch.tensor(counts)
    out = retpop.pooled_retention(
        case.q, case.k, case.v, case.log_decay, pool, index, count=count, backend=backend
    )
    assert out.dtype == case.v.dtype
    assert_same_results((out, pool), (expected, expected_pool), limit, limit)
    untouched = [n for n in range(PLACES) if n not in places]
    untouched += [place for place, n in zip(places, counts or [1] * len(places), strict=True) if not n]
    assert torch.equal(pool[untouched], pool_of(case)[untouched])


@backends
@pytest.mark.parametrize(
    ("T", "places", "counts"),
    [
        (1, [4, 0], None),
        (1, [-1, 2, -1], None),
        (4, [3, -1, 1], None),
        (4, [3, 0, 1, 2], [0, 4, 1, 3]),
        (3, [-1, -1], [2, 0]),
    ],
)
def test_places_and_counts(T: int, places: list[int], counts: list[int] | None, backend: str) -> None:
    case = RetentionCase.make(len(places), T, 2, 8, 12, dtype=torch.float32, with_state=False)
    check(case, places, counts, backend)


@pytest.mark.parametrize(("H", "Dk", "Dv"), [(2, 1, 1), (len(GAMMAS), 24, 60), (2, 100, 128)])
def test_head_dims_and_decays(H: int, Dk: int, Dv: int) -> None:
    case = RetentionCase.make(1, 2, H, Dk, Dv, dtype=torch.float32, with_state=False)
    check(case, [2], None, "triton")


def test_float16() -> None:
    case = RetentionCase.make(2, 3, 2, 16, 24, dtype=torch.float16, with_state=False)
    check(case, [3, 1], [3, 1], "triton", limit=5e-4)


def test_any_strides_and_places_that_are_none() -> None:
    """On a GPU nobody checks a place: one beyond the pool is padding. Slices do not meet."""
    case = RetentionCase.make(2, 3, 2, 8, 12, dtype=torch.float32, with_state=False)
    wide = torch.full((PLACES, 2, 12, 20), torch.nan)
    pool = wide[..., 4:12].mT
    pool.copy_(pool_of(case))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v))
    index = torch.tensor([4, PLACES + 7])
    launches, out = plan_pooled_retention(
        *(q, k, v, case.log_decay, pool, index, torch.tensor([2, 3]), 0.5),
        config=StepConfig(rows=8, cols=8, num_warps=1),
    )
    with audit():
        run_launches(launches, q.device)
    first = replace(case, **{name: getattr(case, name)[:1] for name in "qkv"}, state=pool_of(case)[4:])
    expected, _ = first.double().run(backend="reference", scale=0.5)
    _, state = first.double().part(0, 2, first.state.double()).run(backend="reference", scale=0.5)
    assert_same_results((out[:1], pool[4:]), (expected, state), 5e-6, 5e-6)
    assert not out[1].any()
    assert torch.equal(pool[:4], pool_of(case)[:4])
    assert wide[..., :4].isnan().all()


@backends
@pytest.mark.parametrize(("B", "T"), [(0, 2), (2, 0)])
def test_nothing_to_do(B: int, T: int, backend: str) -> None:
    case = RetentionCase.make(B, T, 2, 8, 12, dtype=torch.float32, with_state=False)
    pool, index = pool_of(case), torch.arange(B)
    out = retpop.pooled_retention(case.q, case.k, case.v, case.log_decay, pool, index, backend=backend)
    assert out.shape == (B, T, 2, 12)
    assert torch.equal(pool, pool_of(case))


def test_the_op_is_what_torch_asks_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = RetentionCase.make(2, 3, 2, 8, 12, dtype=torch.float32, with_state=False)
    arguments = (case.q, case.k, case.v, case.log_decay, pool_of(case), torch.tensor([1, -1]), None, 0.5)
    monkeypatch.setattr(custom, "interpreting", lambda: False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.retpop.pooled_retention, arguments, test_utils=tests)


def test_a_gradient_is_refused() -> None:
    case = RetentionCase.make(2, 1, 2, 8, 12, dtype=torch.float32, with_state=False)
    arguments = (case.k, case.v, case.log_decay, pool_of(case), torch.tensor([1, 0]))
    q = case.q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"pooled_retention\(\) has no gradient.*torch\.no_grad\(\)"):
        retpop.pooled_retention(q, *arguments)
    with torch.no_grad():
        assert retpop.pooled_retention(q, *arguments).isfinite().all()


@backends
def test_autograd_sees_that_saved_states_have_changed(backend: str) -> None:
    case = RetentionCase.make(2, 1, 2, 8, 12, dtype=torch.float32, with_state=False)
    pool = pool_of(case)
    weight = torch.ones_like(pool, requires_grad=True)
    loss = (weight * pool).sum()
    retpop.pooled_retention(
        case.q, case.k, case.v, case.log_decay, pool, torch.tensor([1, 0]), backend=backend
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"states": torch.zeros(5, 2, 8, 8)}, ValueError, r"states has shape .*\(2, 8, 12\)"),
        ({"states": torch.zeros(5, 2, 8, 12).half()}, TypeError, r"states is torch.float16.*torch.float32"),
        (
            {"states": torch.zeros(1, 2, 8, 12).expand(5, -1, -1, -1)},
            ValueError,
            r"states has strides \(0, 96, 12, 1\); no two elements",
        ),
        (
            {"index": torch.tensor([1.0, 2.0])},
            TypeError,
            r"index is torch.float32; it must be int32",
        ),
        ({"index": torch.tensor([1])}, ValueError, r"index has shape \(1,\); it must be \(B,\) = \(2,\)"),
        ({"index": torch.tensor([1, 5])}, ValueError, r"index holds 5; it must be -1 to 4"),
        ({"index": torch.tensor([3, 3])}, ValueError, r"index names a place twice in \[3, 3\]"),
        ({"count": torch.tensor([1, 4])}, ValueError, r"count holds 4; it must be 0 to 3"),
        ({"count": 2}, TypeError, r"count is int; it must be a torch.Tensor"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    case = RetentionCase.make(2, 3, 2, 8, 12, dtype=torch.float32, with_state=False)
    named = {"states": pool_of(case), "index": torch.tensor([1, 0]), **change}
    with pytest.raises(error, match=r"pooled_retention\(\): " + message):
        retpop.pooled_retention(case.q, case.k, case.v, case.log_decay, **named)

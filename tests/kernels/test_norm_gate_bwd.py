"""The gradients of head norm and gate, in Triton's interpreter: against float64 autograd of PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from retention_cases import normal
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import RowConfig, row_runs
from retpop.kernels.launch import Target
from retpop.kernels.norm_gate import norm_gate_bwd, plan_norm_gate_bwd

NORMS = {"groupnorm": F.layer_norm, "rmsnorm": F.rms_norm}
LIMIT = 2e-5
ALL = (True, True, True, True)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=seed, dtype=dtype)


def expected(
    inputs: Sequence[Tensor | None], grad: Tensor, kind: str, eps: float = 1e-6
) -> list[Tensor | None]:
    """Gradients of x, gate, weight, bias in float64."""
    x, gate, weight, bias = (None if t is None else t.detach().double().requires_grad_() for t in inputs)
    y = NORMS[kind](x, x.shape[-1:], eps=eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = F.silu(gate).reshape(x.shape) * y
    leaves = [t for t in (x, gate, weight, bias) if t is not None]
    found = iter(torch.autograd.grad(y, leaves, grad.double()))
    return [None if t is None else next(found) for t in inputs]


def check(
    inputs: Sequence[Tensor | None],
    grad: Tensor,
    kind: str,
    *,
    eps: float = 1e-6,
    needs: Sequence[bool] = ALL,
    limit: float = LIMIT,
) -> None:
    """Compare with autograd, relative to each gradient's RMS; inputs stay as they are."""
    before = [None if t is None else t.clone() for t in (*inputs, grad)]
    with audit():
        found = norm_gate_bwd(*inputs, grad, kind, eps, needs)
    for t, copy in zip((*inputs, grad), before, strict=True):
        assert t is None or torch.equal(t, copy)
    for name, t, need, actual, wanted in zip(
        ("x", "gate", "weight", "bias"), inputs, needs, found, expected(inputs, grad, kind, eps), strict=True
    ):
        if t is None or not need:
            assert actual is None, name
            continue
        assert (actual.shape, actual.dtype, actual.is_contiguous()) == (t.shape, t.dtype, True), name
        error = (actual.double() - wanted).abs().max() / wanted.square().mean().sqrt()
        assert error <= limit, f"{name}: {error:.3g}"


def inputs_of(
    *shape: int, weight: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor | None], Tensor]:
    """x, gate, weight, bias, and the gradient of y."""
    affine = [
        values(*shape[-2:], seed=seed, dtype=dtype) if given else None
        for given, seed in ((weight, 2), (bias, 3))
    ]
    x, gate, grad = (values(*shape, seed=seed, dtype=dtype) for seed in (0, 1, 4))
    return [3 * x + 1, 2 * gate, *affine], grad


@pytest.mark.parametrize("dim", [8, 24, 60, 64, 100, 128, 256])
@pytest.mark.parametrize("kind", NORMS)
def test_every_head_dim(kind: str, dim: int) -> None:
    check(*inputs_of(2, 5, 3, dim), kind)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True)])
def test_without_weight_or_bias(kind: str, weight: bool, bias: bool) -> None:
    check(*inputs_of(4, 3, 10, weight=weight, bias=bias), kind)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_every_subset_of_gradients(needs: tuple[bool, ...], kind: str) -> None:
    check(*inputs_of(5, 2, 12), kind, needs=needs)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("weight", [True, False])
def test_many_tokens_fill_several_runs_and_a_part_of_one(
    kind: str, weight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs of three tiles, of which the last has one and a part; without sums, runs of one tile."""
    monkeypatch.setattr("retpop.kernels.norm_gate.target_of", lambda device: Target("sm_90", 2))
    inputs, grad = inputs_of(1290, 2, 8, weight=weight, bias=False)
    launches, _ = plan_norm_gate_bwd(*inputs, grad, kind, 1e-6)
    main = launches[0]
    tile, length = main.arguments["TOKENS"], main.arguments["run_length"]
    assert (length, main.grid) == ((3 * tile, (4 * 2,)) if weight else (tile, (11 * 2,)))
    assert 1290 % tile
    check(inputs, grad, kind)


def test_runs() -> None:
    config = RowConfig(rows=32, cols=64, num_warps=4)
    assert row_runs(1000, 4, config, 132, long=False) == (32, 32)
    assert row_runs(82_560, 4, config, 132, long=False) == (2580, 32)
    assert row_runs(82_560, 4, config, 132, long=True) == (129, 640)  # of at most 4 · 132 / 4
    assert row_runs(82_560, 10_000, config, 132, long=True) == (1, 82_560)
    assert row_runs(1, 4, config, 132, long=True) == (1, 32)
    for tokens in (31, 33, 5000):
        runs, length = row_runs(tokens, 3, config, 4, long=True)
        assert (runs - 1) * length < tokens <= runs * length


def test_the_gate_is_a_slice_of_a_projection_and_its_gradient_has_its_shape() -> None:
    """Read where it lies: the launch gets the projection's own memory."""
    (x, _, weight, bias), grad = inputs_of(2, 7, 3, 10)
    gate = values(2, 7, 40)[..., 10:40]
    launches, grads = plan_norm_gate_bwd(x, gate, weight, bias, grad, "rmsnorm", 1e-6)
    assert launches[0].arguments["p_gate"].data_ptr() == gate.data_ptr()
    assert grads[1].shape == (2, 7, 30)
    check((x, gate, weight, bias), grad, "rmsnorm")


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: t[:1].expand(2, -1, -1, -1),
        lambda t: t[..., :1].expand_as(t),
        lambda t: torch.cat((t, torch.full_like(t, torch.nan)), dim=-1)[..., : t.shape[-1]],
    ],
    ids=["batch inside time", "features outside", "expanded", "one value a row", "between NaN"],
)
def test_any_strides(arrange) -> None:
    (x, gate, weight, bias), grad = inputs_of(2, 5, 3, 12)
    x = x if arrange(x).stride(-1) == 0 else arrange(x)  # rows of one value have no variance
    weight, bias = (t.t().contiguous().t() for t in (weight, bias))
    check((x, arrange(gate), weight, bias), arrange(grad), "groupnorm")


@pytest.mark.parametrize("kind", NORMS)
def test_a_nan_stays_in_its_row_and_in_the_sums_of_its_head(kind: str) -> None:
    inputs, grad = inputs_of(4, 3, 10)
    inputs[0][2, 1, 3] = torch.nan
    d_x, d_gate, d_weight, d_bias = norm_gate_bwd(*inputs, grad, kind, 1e-6)
    for t in (d_x, d_gate):
        assert t[2, 1].isnan().all()
        t[2, 1] = 0
        assert t.isfinite().all()
    assert d_weight[1].isnan().all()
    assert d_weight[[0, 2]].isfinite().all()
    assert d_bias.isfinite().all()


@pytest.mark.parametrize("kind", NORMS)
def test_eps_counts_and_without_it_masked_rows_leave_no_nan(kind: str) -> None:
    inputs, grad = inputs_of(5, 3, 12)
    check(inputs, grad, kind, eps=0.5)
    check(inputs, grad, kind, eps=0.0)


def test_a_row_of_zeros_stays_finite() -> None:
    inputs, grad = inputs_of(4, 3, 10)
    inputs[0][1, 0] = 0
    for kind in NORMS:
        assert all(t.isfinite().all() for t in norm_gate_bwd(*inputs, grad, kind, 1e-6))


def test_gates_far_from_zero() -> None:
    gate = torch.tensor([-3e38, -1000, -20, 0, 20, 100, 1000, 3e38]).view(1, 1, 1, 8)
    (x, *_), grad = inputs_of(1, 1, 1, 8)
    x = x / 1e20
    grad = grad / 1e20
    _, d_gate, *_ = norm_gate_bwd(x, gate, None, None, grad, "groupnorm", 1e-6)
    wanted = expected((x, gate, None, None), grad, "groupnorm")[1]
    torch.testing.assert_close(d_gate.double(), wanted, rtol=1e-5, atol=1e-30)


def test_float16_is_rounded_once() -> None:
    inputs, grad = inputs_of(9, 3, 24, dtype=torch.float16)
    found = norm_gate_bwd(*inputs, grad, "groupnorm", 1e-6)
    for actual, exact in zip(found, expected(inputs, grad, "groupnorm"), strict=True):
        assert actual.dtype is torch.float16
        # Half of what one step of float16's last place is worth, and float32's own error.
        assert ((actual.double() - exact).abs() <= 2**-11 * exact.abs() * 1.001 + 2e-5).all()


def test_float32_beside_a_float16_gate() -> None:
    """Each gradient comes in its input's dtype; that of a large x is too small for float16."""
    (x, gate, _, _), grad = inputs_of(5, 3, 24, weight=False, bias=False)
    inputs, grad = (1e6 * x, gate.half(), None, None), grad.half()
    check(inputs, grad, "groupnorm", needs=(True, False, False, False))
    found = norm_gate_bwd(*inputs, grad, "groupnorm", 1e-6)[1]
    exact = expected(inputs, grad, "groupnorm")[1]
    assert ((found.double() - exact).abs() <= 2**-11 * exact.abs() * 1.001 + 2e-5).all()


def test_a_weight_of_another_dtype_than_the_tokens() -> None:
    (x, gate, weight, bias), grad = inputs_of(5, 3, 24)
    found = norm_gate_bwd(x.half(), gate.half(), weight, bias, grad.half(), "rmsnorm", 1e-6)
    assert [t.dtype for t in found] == [torch.float16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape), torch.ones(shape[-2:])
    launches, _ = plan_norm_gate_bwd(x, x, weight, weight, x, "groupnorm", 1e-6)
    assert launches == []
    *_, d_weight, d_bias = norm_gate_bwd(x, x, weight, weight, x, "groupnorm", 1e-6)
    assert torch.equal(d_weight, torch.zeros_like(weight))
    assert torch.equal(d_bias, torch.zeros_like(weight))

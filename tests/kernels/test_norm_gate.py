"""The kernel of head norm and gate, in Triton's interpreter: against PyTorch's own norms in float64."""

from __future__ import annotations

import pytest
import torch
from retention_cases import normal
from torch import Tensor
from torch.nn import functional as F

from retpop.kernels.norm_gate import norm_gate_fwd, plan_norm_gate_fwd

NORMS = {"groupnorm": F.layer_norm, "rmsnorm": F.rms_norm}


def expected(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float = 1e-6
) -> Tensor:
    x, gate = x.double(), gate.double()
    y = NORMS[kind](x, x.shape[-1:], eps=eps)
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    return F.silu(gate) * y


def assert_equal(actual: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=seed, dtype=dtype)


@pytest.mark.parametrize("dim", [8, 24, 60, 64, 100, 128, 256])
@pytest.mark.parametrize("kind", NORMS)
def test_every_head_dim(kind: str, dim: int) -> None:
    x, gate = 3 * values(2, 5, 3, dim) + 1, 2 * values(2, 5, 3, dim, seed=1)
    y = norm_gate_fwd(x, gate, None, None, kind, 1e-6)
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    assert_equal(y, expected(x, gate, None, None, kind))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("with_weight", "with_bias"), [(True, False), (True, True), (False, True)])
def test_learned_weights(kind: str, with_weight: bool, with_bias: bool) -> None:
    x, gate = values(4, 3, 10), values(4, 3, 10, seed=1)
    weight = values(3, 10, seed=2) if with_weight else None
    bias = values(10, 3, seed=3).t() if with_bias else None
    assert_equal(norm_gate_fwd(x, gate, weight, bias, kind, 1e-6), expected(x, gate, weight, bias, kind))


def test_many_rows_fill_several_programs_and_a_part_of_one() -> None:
    x, gate = values(3, 83, 3, 8), values(3, 83, 3, 8, seed=1)
    launches, _ = plan_norm_gate_fwd(x, gate, None, None, "groupnorm", 1e-6)
    assert launches[0].grid[0] > 1
    assert x.numel() // 8 % launches[0].arguments["PAIRS"]
    y = norm_gate_fwd(x, gate, None, None, "groupnorm", 1e-6)
    assert_equal(y, expected(x, gate, None, None, "groupnorm"))


def test_the_gate_is_a_slice_of_a_projection() -> None:
    """Read where it lies: the launch gets the projection's own memory."""
    projection = values(2, 7, 40)
    gate = projection[..., 10:40]
    x = values(2, 7, 3, 10, seed=1)
    launches, _ = plan_norm_gate_fwd(x, gate, None, None, "rmsnorm", 1e-6)
    assert launches[0].arguments["p_gate"].data_ptr() == gate.data_ptr()
    assert launches[0].arguments["stride_gate_t"] == 40
    y = norm_gate_fwd(x, gate, None, None, "rmsnorm", 1e-6)
    assert_equal(y, expected(x, gate.unflatten(-1, (3, 10)), None, None, "rmsnorm"))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: t[:1].expand(2, -1, -1, -1),
        lambda t: torch.cat((t, t), dim=-1)[..., ::2],
    ],
    ids=["batch inside time", "features outside", "expanded", "every other feature"],
)
def test_any_strides(arrange) -> None:
    x, gate = arrange(values(2, 5, 3, 12)), arrange(values(2, 5, 3, 12, seed=1))
    kept = x.clone()
    y = norm_gate_fwd(x, gate, None, None, "groupnorm", 1e-6)
    assert_equal(y, expected(x, gate, None, None, "groupnorm"))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kind", NORMS)
def test_a_row_of_zeros_stays_finite_and_a_nan_stays_in_its_row(kind: str) -> None:
    x, gate = values(4, 3, 10), values(4, 3, 10, seed=1)
    x[1, 0] = 0
    x[2, 1, 3] = torch.nan
    y = norm_gate_fwd(x, gate, None, None, kind, 1e-6)
    assert not y[1, 0].any()
    assert y[2, 1].isnan().all()
    y[2, 1] = 0
    assert y.isfinite().all()


def test_gates_far_from_zero() -> None:
    x = values(1, 1, 1, 8)
    gate = torch.tensor([-1000.0, -100, -20, 0, 20, 100, 1000, 3e38]).view(1, 1, 1, 8)
    y = norm_gate_fwd(x, gate, None, None, "groupnorm", 1e-6)
    assert_equal(y, expected(x, gate, None, None, "groupnorm"))


def test_eps_counts() -> None:
    x, gate = 0.1 * values(2, 3, 8), values(2, 3, 8, seed=1)
    for kind in NORMS:
        y = norm_gate_fwd(x, gate, None, None, kind, 0.5)
        assert_equal(y, expected(x, gate, None, None, kind, eps=0.5))


def test_float16_is_rounded_once() -> None:
    x, gate = values(9, 3, 24, dtype=torch.float16), values(9, 3, 24, seed=1, dtype=torch.float16)
    y = norm_gate_fwd(x, gate, None, None, "groupnorm", 1e-6)
    exact = expected(x, gate, None, None, "groupnorm")
    assert y.dtype is torch.float16
    # Half of what one step of float16's last place is worth.
    assert ((y.double() - exact).abs() <= 2**-11 * exact.abs() * 1.001 + 2**-25).all()


def test_float32_beside_a_float16_gate() -> None:
    """What outgrows float16 is normed in float32, and the product rounded to the gate's dtype."""
    x, gate = 1e6 * values(9, 3, 24), values(9, 3, 24, seed=1, dtype=torch.float16)
    y = norm_gate_fwd(x, gate, None, None, "groupnorm", 1e-6)
    assert y.dtype is torch.float16
    assert_equal(y, expected(x, gate, None, None, "groupnorm"), 5e-4)


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    launches, _ = plan_norm_gate_fwd(x, x, None, None, "groupnorm", 1e-6)
    assert launches == []
    assert norm_gate_fwd(x, x, None, None, "groupnorm", 1e-6).shape == shape

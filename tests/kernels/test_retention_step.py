"""`retention_step` in Triton's interpreter against the reference: numbers, layouts and slices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from retention_cases import GAMMAS, RetentionCase, assert_same_results, normal
from torch import Tensor

from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import StepConfig, step_config
from retpop.kernels.launch import run as run_launches
from retpop.kernels.retention_step import plan_retention_step, retention_step

LIMIT = 5e-6


def tokens(case: RetentionCase) -> tuple[Tensor, Tensor, Tensor]:
    """The only token of a case: q, k and v without the dimension of time."""
    return case.q[:, 0], case.k[:, 0], case.v[:, 0]


def check(case: RetentionCase, limits: tuple[float, float] = (LIMIT, LIMIT)) -> None:
    """Compare with the reference in float64; inputs must stay as they are, and accesses are audited."""
    tensors = [case.q, case.k, case.v, case.log_decay, case.state]
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    with audit():
        out, state = retention_step(*tokens(case), case.log_decay, case.state, case.q.shape[-1] ** -0.5)
    assert all(b is None or torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert (out.dtype, state.dtype) == (case.v.dtype, torch.float32)
    expected = case.double().run(backend="reference")
    assert_same_results((out.unsqueeze(1), state), expected, *limits)


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(
    ("Dk", "Dv"), [(1, 1), (8, 8), (24, 60), (60, 24), (100, 128), (64, 64), (256, 16), (16, 256)]
)
def test_head_dims(Dk: int, Dv: int, with_state: bool) -> None:
    check(RetentionCase.make(2, 1, 3, Dk, Dv, dtype=torch.float32, seed=Dk + 1, with_state=with_state))


def test_every_decay() -> None:
    check(RetentionCase.make(1, 1, len(GAMMAS), 8, 8, dtype=torch.float32))


def test_float16() -> None:
    check(RetentionCase.make(2, 1, 2, 16, 24, dtype=torch.float16), (5e-4, 3.5e-4))


@pytest.mark.parametrize("with_state", [True, False])
def test_an_empty_batch(with_state: bool) -> None:
    case = RetentionCase.make(0, 1, 2, 8, 24, dtype=torch.float32, with_state=with_state)
    out, state = retention_step(*tokens(case), case.log_decay, case.state, 1.0)
    assert (out.shape, state.shape) == ((0, 2, 24), (0, 2, 8, 24))


def layouts(case: RetentionCase) -> dict[str, RetentionCase]:
    """The same numbers, where not said otherwise, in other strides."""
    one_row = torch.cat((case.q, case.k, case.v), dim=-1)
    q, k, v = one_row.split([case.q.shape[-1], case.k.shape[-1], case.v.shape[-1]], dim=-1)
    by_head = {name: getattr(case, name).transpose(0, 2).contiguous().transpose(0, 2) for name in "qkv"}
    return {
        "one projection": replace(case, q=q, k=k, v=v),
        "heads first": replace(case, **by_head),
        "last dim strided": replace(case, v=case.v.repeat_interleave(2, -1)[..., ::2]),
        "last dim expanded": replace(case, k=case.k[..., :1].expand_as(case.k)),
        "heads expanded": replace(case, q=case.q[:, :, :1].expand_as(case.q)),
        "state transposed": replace(case, state=case.state.mT.contiguous().mT),
        "state by head": replace(case, state=case.state.transpose(0, 1).contiguous().transpose(0, 1)),
        "state expanded": replace(case, state=case.state[:1].expand_as(case.state)),
        "decay expanded": replace(case, log_decay=case.log_decay[:1].expand_as(case.log_decay)),
        "state sliced": replace(case, state=case.state.repeat(1, 1, 2, 2)[:, :, ::2, : case.v.shape[-1]]),
    }


@pytest.mark.parametrize("layout", list(layouts(RetentionCase.make(2, 1, 2, 8, 8))))
def test_layouts(layout: str) -> None:
    check(layouts(RetentionCase.make(3, 1, 2, 8, 24, dtype=torch.float32))[layout])


@pytest.mark.parametrize("cols", [8, 16, 64])
def test_every_width_of_a_slice(cols: int) -> None:
    case = RetentionCase.make(2, 1, 2, 24, 60, dtype=torch.float32)
    config = StepConfig(rows=32, cols=cols, num_warps=1)
    launches, (out, state) = plan_retention_step(
        *tokens(case), case.log_decay, case.state, 24**-0.5, config=config
    )
    assert launches[0].grid == (4 * math.ceil(60 / cols),)
    run_launches(launches, out.device)
    assert_same_results((out.unsqueeze(1), state), case.double().run(backend="reference"), LIMIT)


def test_a_step_follows_a_step() -> None:
    case = RetentionCase.make(2, 5, 2, 8, 24, dtype=torch.float32)
    outs, state = [], case.state
    for t in range(5):
        out, state = retention_step(case.q[:, t], case.k[:, t], case.v[:, t], case.log_decay, state, 8**-0.5)
        outs.append(out)
    assert_same_results((torch.stack(outs, 1), state), case.double().run(backend="reference"), LIMIT)


def test_nan_stays_in_its_head_and_column() -> None:
    case = RetentionCase.make(2, 1, 2, 8, 24, dtype=torch.float32)
    case.state[1, 0, 2, 5] = math.nan
    out, state = retention_step(*tokens(case), torch.zeros(2), case.state, 1.0)
    assert out.isnan().nonzero().tolist() == [[1, 0, 5]]
    assert state.isnan().nonzero().tolist() == [[1, 0, 2, 5]]


def test_a_step_gathers_no_bias() -> None:
    """200 steps of γ alone: with a γ rounded to float32 every one would err by 2.9e-8 in one direction."""
    log_decay = torch.log1p(torch.tensor([-1 / 30_000], dtype=torch.float64)).float()
    start = normal(1, 1, 8, 8, seed=0, dtype=torch.float32)
    zero, state = torch.zeros(1, 1, 8), start
    for _ in range(200):
        _, state = retention_step(zero, zero, zero, log_decay, state, 1.0)
    expected = (200 * log_decay.double()).exp() * start
    assert_same_results((zero, state), (zero, expected), 0.0, 1e-6)


def test_slices_fill_the_gpu() -> None:
    """16 KiB of state a program where there are enough of them; else narrower slices, down to 32 bytes."""
    assert step_config(264, (64, 64), 132) == StepConfig(rows=64, cols=64, num_warps=4)
    assert step_config(263, (64, 64), 132) == StepConfig(rows=64, cols=32, num_warps=2)
    assert step_config(4, (64, 64), 132) == StepConfig(rows=64, cols=8, num_warps=1)
    assert step_config(10_000, (256, 256), 132) == StepConfig(rows=256, cols=16, num_warps=4)
    assert step_config(10_000, (100, 60), 132) == StepConfig(rows=128, cols=32, num_warps=4)
    assert step_config(1, (17, 1), 132) == StepConfig(rows=32, cols=8, num_warps=1)
    assert step_config(1, (1, 5), 132) == StepConfig(rows=8, cols=8, num_warps=1)

"""The kernel of rotary positions, in Triton's interpreter: against `retpop.position.rotate`."""

from __future__ import annotations

import pytest
import torch
from retention_cases import normal
from torch import Tensor

from retpop.kernels.rotary import plan_rotary_fwd, rotary_fwd
from retpop.position import KINDS, Rotation, rotary_frequencies, rotate, rotation_at


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=seed, dtype=dtype)


def rotation(kind: str, dim: int, positions: Tensor) -> Rotation:
    return rotation_at(positions, rotary_frequencies(kind, dim), kind)


def assert_turned(actual: Tensor, x: Tensor, turn: Rotation, kind: str) -> None:
    expected = rotate(x.double(), Rotation(turn.cos.double(), turn.sin.double()), kind)
    assert (actual.shape, actual.dtype, actual.is_contiguous()) == (x.shape, x.dtype, True)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [2, 8, 24, 60, 64, 100, 256])
def test_every_head_dim(kind: str, dim: int) -> None:
    q, k = values(2, 5, 3, dim), values(2, 5, 3, dim, seed=1)
    turn = rotation(kind, dim, torch.arange(5).unsqueeze(0))
    for actual, x in zip(rotary_fwd(q, k, *turn, kind), (q, k), strict=True):
        assert_turned(actual, x, turn, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_at_positions_of_its_own(kind: str) -> None:
    q, k = values(3, 7, 2, 8), values(3, 7, 2, 8, seed=1)
    turn = rotation(kind, 8, torch.tensor([[5], [2**20], [2**24 + 1]]) + torch.arange(7))
    assert turn.cos.shape[0] == 3
    for actual, x in zip(rotary_fwd(q, k, *turn, kind), (q, k), strict=True):
        assert_turned(actual, x, turn, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_turns_back(kind: str) -> None:
    q, k = values(2, 5, 3, 12), values(2, 5, 3, 12, seed=1)
    turn = rotation(kind, 12, 1000 * torch.arange(5).unsqueeze(0))
    there = rotary_fwd(q, k, *turn, kind)
    for actual, x in zip(rotary_fwd(*there, *turn, kind, inverse=True), (q, k), strict=True):
        torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(there[0], q, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_fill_several_programs_and_a_part_of_one(kind: str) -> None:
    q, k = values(2, 150, 1, 32), values(2, 150, 1, 32, seed=1)
    turn = rotation(kind, 32, torch.arange(150).unsqueeze(0))
    launches, _ = plan_rotary_fwd(q, k, *turn, kind)
    assert launches[0].grid[0] > 1
    assert 150 % launches[0].arguments["TOKENS"]
    for actual, x in zip(rotary_fwd(q, k, *turn, kind), (q, k), strict=True):
        assert_turned(actual, x, turn, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_are_slices_of_a_projection(kind: str) -> None:
    projection = values(2, 5, 2 * 3 * 8 + 11)
    q, k = projection[..., : 2 * 3 * 8].unflatten(-1, (6, 8)).chunk(2, dim=2)
    turn = rotation(kind, 8, torch.arange(5).unsqueeze(0))
    launches, _ = plan_rotary_fwd(q, k, *turn, kind)
    assert launches[0].arguments["p_k"].data_ptr() == k.data_ptr()
    kept = projection.clone()
    for actual, x in zip(rotary_fwd(q, k, *turn, kind), (q, k), strict=True):
        assert_turned(actual, x, turn, kind)
    assert torch.equal(projection, kept)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: t[:1].expand(2, -1, -1, -1),
    ],
    ids=["heads outside time", "features outside", "expanded"],
)
def test_any_strides(arrange) -> None:
    q, k = arrange(values(2, 5, 3, 12)), values(2, 5, 3, 12, seed=1)
    turn = rotation("retnet", 12, torch.arange(10).view(2, 5))
    turn = Rotation(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in turn))
    for actual, x in zip(rotary_fwd(q, k, *turn, "retnet"), (q, k), strict=True):
        assert_turned(actual, x, turn, "retnet")


@pytest.mark.parametrize("kind", KINDS)
def test_float16_is_rounded_once(kind: str) -> None:
    q, k = (values(2, 9, 3, 24, seed=s, dtype=torch.float16) for s in (0, 1))
    turn = rotation(kind, 24, torch.arange(9).unsqueeze(0))
    for actual, x in zip(rotary_fwd(q, k, *turn, kind), (q, k), strict=True):
        exact = rotate(x.double(), Rotation(turn.cos.double(), turn.sin.double()), kind)
        assert actual.dtype is torch.float16
        assert ((actual.double() - exact).abs() <= 2**-11 * exact.abs() * 1.001 + 2**-22).all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape)
    turn = rotation("rope", 8, torch.arange(shape[1]).unsqueeze(0))
    launches, _ = plan_rotary_fwd(q, q, *turn, "rope")
    assert launches == []
    assert [x.shape for x in rotary_fwd(q, q, *turn, "rope")] == [shape, shape]

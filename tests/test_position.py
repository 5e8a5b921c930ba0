"""Rotary positions: the angles by their formulas, exact at large positions, relative in their effect."""

from __future__ import annotations

import math

import pytest
import torch
from retention_cases import normal

from retpop.position import KINDS, phases_at, rotary_frequencies, rotary_turns, rotate, rotation_at

FAR = [0, 1, 257, 2**20, 2**24 + 1, 2**31 + 3]


def pairs_of(kind: str, head_dim: int) -> list[tuple[int, int]]:
    half = head_dim // 2
    return [(2 * i, 2 * i + 1) if kind == "retnet" else (i, i + half) for i in range(half)]


def angle(kind: str, head_dim: int, pair: int, position: int) -> float:
    half = head_dim // 2
    exponent = pair / (half - 1) if kind == "retnet" else 2 * pair / head_dim
    return position * 10000.0**-exponent


def rotated_by_hand(x: torch.Tensor, kind: str, positions: list[int]) -> torch.Tensor:
    """(T, Dk) turned pair by pair with Python's own floats."""
    turned = torch.zeros_like(x)
    for t, position in enumerate(positions):
        for i, (first, second) in enumerate(pairs_of(kind, x.shape[-1])):
            a, b = x[t, first].item(), x[t, second].item()
            theta = angle(kind, x.shape[-1], i, position)
            turned[t, first] = a * math.cos(theta) - b * math.sin(theta)
            turned[t, second] = b * math.cos(theta) + a * math.sin(theta)
    return turned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [4, 6, 8, 60])
def test_rotation_pair_by_pair_at_near_and_far_positions(kind: str, head_dim: int) -> None:
    x = normal(1, len(FAR), 1, head_dim, seed=3)
    rotation = rotation_at(torch.tensor([FAR]), rotary_frequencies(kind, head_dim), kind)
    expected = rotated_by_hand(x[0, :, 0], kind, FAR)
    # 1e-6 is float32's cosine; angles in float32 would be off by more than 1 at 2^24.
    torch.testing.assert_close(rotate(x, rotation, kind)[0, :, 0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str) -> None:
    frequencies = rotary_frequencies(kind, 8)
    assert frequencies.dtype is torch.float64
    rotation = rotation_at(torch.tensor([[5, 6]]), frequencies, kind)
    assert [part.dtype for part in rotation] == [torch.float32, torch.float32]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = normal(1, 2, 3, 8, seed=0, dtype=dtype)
        turned = rotate(x, rotation, kind)
        assert turned.dtype is dtype
        exact = rotate(x.double(), rotation, kind)
        torch.testing.assert_close(turned.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [2**20, 2**24 + 1])
def test_only_the_distance_of_two_tokens_matters(kind: str, start: int) -> None:
    q, k = normal(2, 1, 30, 1, 8, seed=1, dtype=torch.float32)
    frequencies = rotary_frequencies(kind, 8)
    scores = []
    for first in (0, start):
        rotation = rotation_at(torch.arange(first, first + 30)[None], frequencies, kind)
        turned_q, turned_k = (rotate(x, rotation, kind)[0, :, 0] for x in (q, k))
        scores.append(turned_q @ turned_k.T)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_position_zero_turns_nothing_and_rotation_keeps_the_length(kind: str) -> None:
    x = normal(2, 4, 3, 8, seed=0)
    frequencies = rotary_frequencies(kind, 8)
    zero = rotation_at(torch.zeros(2, 4, dtype=torch.int64), frequencies, kind)
    assert torch.equal(rotate(x, zero, kind), x)
    somewhere = rotation_at(torch.arange(8).view(2, 4) * 1000, frequencies, kind)
    torch.testing.assert_close(rotate(x, somewhere, kind).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_shaped_positions(kind: str) -> None:
    """Positions (B, P, M) turn tensors (B, P, M, H, D)."""
    x = normal(2, 3, 4, 5, 8, seed=0)
    positions = torch.arange(24).view(2, 3, 4)
    frequencies = rotary_frequencies(kind, 8)
    turned = rotate(x, rotation_at(positions, frequencies, kind), kind)
    flat = rotate(x.view(1, 24, 5, 8), rotation_at(positions.view(1, 24), frequencies, kind), kind)
    assert torch.equal(turned, flat.view_as(x))


def test_one_pair_of_features() -> None:
    for kind in KINDS:
        assert rotary_frequencies(kind, 2).tolist() == [1.0]


@pytest.mark.parametrize("kind", ["xpos", "", None])
def test_unknown_kind(kind: object) -> None:
    with pytest.raises(ValueError, match=r"kind is .*retnet"):
        rotary_frequencies(kind, 8)


@pytest.mark.parametrize("head_dim", [0, 1, 7, -2])
def test_odd_head_dims(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}"):
        rotary_frequencies("rope", head_dim)


def test_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        assert rotary_frequencies("retnet", 8).device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 2**20, 2**24 + 1, 2**31])
def test_angles_without_float64_are_as_good(kind: str, first: int) -> None:
    """Turns as integers, for devices that have no float64."""
    positions = torch.arange(first, first + 50)[None]
    turns = torch.tensor(rotary_turns(kind, 16))
    expected = rotation_at(positions, rotary_frequencies(kind, 16), kind)
    for actual, exact in zip(rotation_at(positions, turns, kind), expected, strict=True):
        assert actual.dtype is torch.float32
        torch.testing.assert_close(actual, exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("of", ["queries", "a projection", "an odd place in memory"])
def test_phases_rotate_as_cosines_and_sines_do(num_heads: int, rows: int, of: str) -> None:
    """Forward and backward, whether or not pairs can be read as complex numbers where they lie."""
    frequencies, positions = rotary_frequencies("retnet", 8), torch.arange(rows * 5).view(rows, 5) * 1000
    width = {"queries": 8, "a projection": 32, "an odd place in memory": 9}[of]
    x = normal(2, 5, num_heads, width, seed=0, dtype=torch.float32)[..., width - 8 :].requires_grad_()
    ways = phases_at(positions, frequencies, num_heads), rotation_at(positions, frequencies, "retnet")
    rotated = [rotate(x, way, "retnet") for way in ways]
    torch.testing.assert_close(*rotated, rtol=0, atol=1e-6)
    grad = normal(*x.shape, seed=1, dtype=torch.float32)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in rotated]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_phases_rotate_what_lies_at_odd_places_in_memory() -> None:
    """After an odd number of features, and under vmap with an odd step from one sample to the next."""
    frequencies, positions = rotary_frequencies("retnet", 8), torch.arange(5)[None]
    phases, plain = phases_at(positions, frequencies, 2), rotation_at(positions, frequencies, "retnet")
    many = normal(4, 81, seed=0, dtype=torch.float32)[:, 1:].unflatten(1, (1, 5, 2, 8))
    expected = rotate(many, plain, "retnet")
    torch.testing.assert_close(rotate(many[0], phases, "retnet"), expected[0], rtol=0, atol=1e-6)
    by_vmap = torch.func.vmap(lambda x: rotate(x, phases, "retnet"))(many)
    torch.testing.assert_close(by_vmap, expected, rtol=0, atol=1e-6)


def test_phases_in_a_compiled_layer() -> None:
    """A decoder that runs eagerly hands them to a layer that was compiled by itself."""
    phases = phases_at(torch.arange(5)[None], rotary_frequencies("retnet", 8), 3)
    x = normal(2, 5, 3, 8, seed=0, dtype=torch.float32)
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, phases, "retnet"), rotate(x, phases, "retnet"))

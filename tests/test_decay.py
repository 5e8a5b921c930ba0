"""Decay schedules: their formulas, their ends, their precision, and their checks."""

from __future__ import annotations

import math

import pytest
import torch

import retpop


def test_retnet_decay_is_one_minus_powers_of_two() -> None:
    expected = torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(8)])
    decay = retpop.retnet_decay(8)
    assert decay.shape == (8,)
    assert decay.dtype is torch.float32
    assert torch.equal(decay, expected)


def test_log_spaced_decay_runs_from_the_shortest_to_the_longest_time_scale() -> None:
    decay = retpop.log_spaced_decay(4)
    assert decay.dtype is torch.float32
    exact = [math.log1p(-(32.0 ** -(1 - i / 3)) * 512.0 ** -(i / 3)) for i in range(4)]
    torch.testing.assert_close(decay, torch.tensor(exact), rtol=1e-6, atol=0)
    gamma = decay.double().exp()
    torch.testing.assert_close(
        gamma[[0, -1]], torch.tensor([1 - 1 / 32, 1 - 1 / 512]).double(), rtol=1e-7, atol=0
    )
    ratios = (1 - gamma[1:]) / (1 - gamma[:-1])
    torch.testing.assert_close(ratios, torch.full((3,), 16 ** (-1 / 3)).double(), rtol=1e-5, atol=0)


def test_other_time_scales() -> None:
    decay = retpop.log_spaced_decay(2, longest=1000, shortest=4)
    expected = torch.tensor([math.log1p(-1 / 4), math.log1p(-1 / 1000)])
    torch.testing.assert_close(decay, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [retpop.retnet_decay, retpop.log_spaced_decay])
def test_one_head(schedule) -> None:
    torch.testing.assert_close(schedule(1).exp(), torch.tensor([1 - 1 / 32]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [retpop.retnet_decay, retpop.log_spaced_decay])
def test_thirty_two_heads_all_differ_and_all_decay(schedule) -> None:
    """log(1 - 2^-36) computed as written would be 0 in float32; log1p keeps it apart from no decay."""
    decay = schedule(32)
    assert (decay < 0).all()
    assert (decay.diff() > 0).all()


@pytest.mark.parametrize("schedule", [retpop.retnet_decay, retpop.log_spaced_decay])
def test_default_dtype_and_device_do_not_matter(schedule) -> None:
    expected = schedule(4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            decay = schedule(4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(decay, expected)


@pytest.mark.parametrize("schedule", [retpop.retnet_decay, retpop.log_spaced_decay])
@pytest.mark.parametrize("num_heads", [0, -1, 2.0, True, "4", None])
def test_bad_numbers_of_heads(schedule, num_heads: object) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=rf"{schedule.__name__}\(\): num_heads is {num_heads!r}"
    ):
        schedule(num_heads)


@pytest.mark.parametrize("name", ["longest", "shortest"])
@pytest.mark.parametrize("value", [0, -32, 0.5, math.nan, math.inf])
def test_bad_time_scales(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"log_spaced_decay\(\): {name} is {value}"):
        retpop.log_spaced_decay(4, **{name: value})


def test_a_time_scale_of_one_token_is_no_memory() -> None:
    assert retpop.log_spaced_decay(2, shortest=1)[0] == -math.inf


def test_float64_decays_are_those_of_a_float64_layer() -> None:
    cfg = retpop.RetNetConfig(embed_dim=16, num_heads=4, num_layers=1, ffn_dim=16)
    layer = retpop.MultiScaleRetention(cfg, dtype=torch.float64)
    assert torch.equal(layer.log_decay, retpop.retnet_decay(4, dtype=torch.float64))
    assert not torch.equal(layer.log_decay, retpop.retnet_decay(4).double())


@pytest.mark.parametrize("name", ["longest", "shortest"])
def test_time_scales_are_numbers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is 'a'"):
        retpop.log_spaced_decay(4, **{name: "a"})

"""The shared jit helpers alone, where a whole kernel would hide a small error."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from retpop.kernels import tiles


@triton.jit
def across_kernel(p_log_decay, p_lengths, p_whole, p_rest):
    i = tl.program_id(0)
    whole, rest = tiles.decay_across(tiles.load_log_decay(p_log_decay, 0), tl.load(p_lengths + i))
    tl.store(p_whole + i, whole)
    tl.store(p_rest + i, rest)


@pytest.mark.parametrize("gamma", [0.0, 1e-30, 0.01, 0.499, 0.501, 1 - 2**-5, 1 - 2**-9, 1 - 1e-6, 1.0])
def test_what_is_left_of_a_state(gamma: float) -> None:
    """γ^n = whole + rest: rest is γ^n - 1 to float32's accuracy where γ^n is near 1, and else γ^n."""
    lengths = torch.tensor([0, 1, 2, 16, 64, 130, 5000])
    log_decay = torch.tensor([math.log(gamma) if gamma else -math.inf])
    whole, rest = torch.empty(len(lengths)), torch.empty(len(lengths))
    across_kernel[(len(lengths),)](log_decay, lengths, whole, rest)
    exponents = log_decay.double().clamp(min=-1e5) * lengths
    near_one = exponents.exp() >= 0.5
    assert torch.equal(whole, near_one.float())
    torch.testing.assert_close(rest[near_one].double(), exponents[near_one].expm1(), rtol=3e-7, atol=0)
    # The exponent is rounded to float32, and γ^n errs by as much of itself: at most 100 · 2^-24 above 1e-37.
    torch.testing.assert_close(rest[~near_one].double(), exponents[~near_one].exp(), rtol=1e-5, atol=1e-37)


@triton.jit
def decayed_kernel(p_log_decay, p_tokens, p_state, chunks, ROWS: tl.constexpr):
    log_decay = tiles.load_log_decay(p_log_decay, 0)
    b_state = tiles.load_tile(p_state, 16, 16, 0, 16, 16, 16)
    b_tokens = tiles.load_tile(p_tokens, 16, 16, 0, ROWS, 16, 16)
    b_to_end = tiles.decay_to_end(log_decay, ROWS, ROWS)
    whole, rest = tiles.decay_across(log_decay, ROWS)
    for _ in range(chunks):
        b_state = tiles.chunk_state(b_state, b_tokens, b_tokens, b_to_end, whole, rest, "ieee")
    tiles.store_tile(p_state, b_state, 16, 16, 0, 16, 16, 16)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.float16, 9e-5)], ids=str)
def test_a_state_after_many_chunks(dtype: torch.dtype, limit: float) -> None:
    """As many tokens as γ remembers, all zeros.

    In float32 1,562 roundings add up like a random walk, to about 40 · 2^-24. With 16-bit tokens, which err
    more themselves, γ^n is one number, and its rounding adds up straight.
    """
    rows, chunks = 64, 1562
    across = 1 - 10737.5 * 2**-24  # half way between two numbers: the largest rounding; γ is 1 - 1e-5
    log_decay = torch.tensor([math.log(across) / rows])
    start = torch.linspace(0.5, 2, 256).reshape(16, 16)
    state = start.clone()
    decayed_kernel[(1,)](log_decay, torch.zeros(16, 16, dtype=dtype), state, chunks, ROWS=rows)
    wanted = start.double() * math.exp(log_decay.double().item() * rows * chunks)
    torch.testing.assert_close(state.double(), wanted, rtol=limit, atol=0)


@triton.jit
def operand_kernel(p_state, p_operand, p_grow, HALF: tl.constexpr):
    b_state = tiles.load_tile(p_state, 16, 16, 0, 16, 16, 16)
    b_operand, grow = tiles.as_operand(b_state, tl.float16 if HALF else tl.float32)
    tiles.store_tile(p_operand, b_operand.to(tl.float32), 16, 16, 0, 16, 16, 16)
    tl.store(p_grow, grow)


@pytest.mark.parametrize("largest", [0.0, 1e-12, 1.0, 3e5, 1e20])
@pytest.mark.parametrize("half", [False, True])
def test_a_state_as_an_operand(half: bool, largest: float) -> None:
    """Only a float16 operand is scaled: it then neither overflows nor underflows."""
    state = torch.linspace(-1, 1, 256).reshape(16, 16) * largest
    operand, grow = torch.empty(16, 16), torch.empty(1)
    operand_kernel[(1,)](state, operand, grow, HALF=half)
    assert torch.isfinite(operand).all()
    assert (grow.item() == 1) is not half
    torch.testing.assert_close(operand * grow, state, rtol=6e-4 if half else 0, atol=0)

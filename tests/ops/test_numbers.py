"""The hazards of the numbers: overflow, low precision, γ = 0 and γ near 1, broken data, long sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from retention_cases import (
    CHUNK,
    MODES,
    PopCase,
    RetentionCase,
    assert_same_gradients,
    assert_same_results,
    gradients,
    log_decays,
    mode_options,
    normal,
)

import retpop

# Outputs, states, gradients; see docs on precision. Errors are per (row, head, 64-token block).
TOLERANCES = {
    torch.float64: (1e-12, 1e-12, 1e-11),
    torch.float32: (5e-6, 5e-6, 2e-5),
    torch.float16: (5e-4, 3.5e-4, 6e-4),
    torch.bfloat16: (4e-3, 2.5e-3, 5e-3),
}
LOW = [torch.float32, torch.float16, torch.bfloat16]


def with_decay(case: RetentionCase, log_decay: torch.Tensor) -> RetentionCase:
    return replace(case, log_decay=log_decay.to(case.log_decay.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("T", [1, 7, 63, 65, 130])
@pytest.mark.parametrize("schedule", ["mixed", "log_spaced", "retnet"])
def test_precision(dtype: torch.dtype, mode: str, T: int, schedule: str) -> None:
    case = RetentionCase.make(2, T, 4, 16, 24, dtype=dtype, seed=T)
    if schedule != "mixed":
        case = with_decay(case, getattr(retpop, f"{schedule}_decay")(4))
    out_tolerance, state_tolerance, _ = TOLERANCES[dtype]
    actual = case.run(mode=mode)
    assert [tensor.dtype for tensor in actual] == [dtype, torch.float32]
    expected = case.double().run(backend="reference")
    assert_same_results(actual, expected, out_tolerance, state_tolerance)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("offset", [0, 1])
def test_precision_of_pop(dtype: torch.dtype, offset: int) -> None:
    case = PopCase.make(2, 3, 65, 3, 64, 4, 16, 24, offset=offset, dtype=dtype, with_reset=True)
    out_tolerance, state_tolerance, _ = TOLERANCES[dtype]
    actual = case.run()
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32]
    assert_same_results(actual, case.double().run(backend="reference"), out_tolerance, state_tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LOW)
def test_precision_of_gradients(dtype: torch.dtype, mode: str) -> None:
    case = RetentionCase.make(2, 80, 4, 16, 24, dtype=dtype).for_gradients()
    exact = case.double().for_gradients()
    expected = gradients(exact.run(mode="parallel"), exact.leaves())
    actual = gradients(case.run(mode=mode), case.leaves())
    assert [g.dtype for g in actual] == [dtype, dtype, dtype, torch.float32]
    # The weights of the results are rounded to the results' dtype, which alone is worth half a rounding.
    assert_same_gradients([g.double() for g in actual], expected, 2 * TOLERANCES[dtype][2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_state_is_float32_at_low_precision(dtype: torch.dtype, backend: str) -> None:
    for T in (0, 1, 5):
        case = RetentionCase.make(2, T, 2, 4, 5, dtype=dtype, with_state=False)
        out, state = case.run(backend=backend)
        assert (out.dtype, state.dtype) == (dtype, torch.float32)


GAMMAS = [1.0, 1 - 2**-20, 1 - 2**-5, 0.9, 0.5, 0.2, 0.1, 0.01, 1e-30, 0.0]
ALL_GAMMAS = torch.tensor([math.log(g) if g else -math.inf for g in GAMMAS], dtype=torch.float64)


def final_state_in_closed_form(case: RetentionCase) -> torch.Tensor:
    """Σ γ^(T-1-n) k_nᵀ v_n + γ^T S in float64, without a loop."""
    exact = case.double()
    T = case.q.shape[1]
    log_decay = ALL_GAMMAS.clamp(min=-1e6)
    weights = (log_decay * torch.arange(T - 1, -1, -1)[:, None]).exp()
    state = torch.einsum("bthk,bthv,th->bhkv", exact.k, exact.v, weights)
    return state + (log_decay * T).exp()[:, None, None] * exact.state


def test_sixty_five_thousand_tokens_at_every_gamma() -> None:
    """γ^-n would be infinite from n = 2794 on; and states of many thousand tokens stay right."""
    T = 65_536
    case = with_decay(RetentionCase.make(1, T, len(GAMMAS), 2, 3, dtype=torch.float32), ALL_GAMMAS)
    out, state = case.run()
    assert torch.isfinite(out).all()
    assert_same_results((out[:, :0], state), (out[:, :0], final_state_in_closed_form(case)), 5e-6)
    _, before = case.part(0, T - 64, case.state).double().run(mode="chunkwise")
    tail = case.part(T - 64, T, before)
    expected = replace(tail.double(), state=before).run(backend="reference")
    assert_same_results((out[:, -64:], state), expected, 2e-5)


@pytest.mark.parametrize("mode", ["parallel", "recurrent"])
def test_three_thousand_tokens_in_the_other_modes(mode: str) -> None:
    T = 3_000
    case = with_decay(RetentionCase.make(1, T, len(GAMMAS), 4, 8, dtype=torch.float32), ALL_GAMMAS)
    if mode == "parallel":  # Quadratic: two heads at a time are enough to see an overflow.
        heads = slice(1, 3)
        data = {name: getattr(case, name)[:, :, heads] for name in ("q", "k", "v")}
        case = replace(case, **data, state=case.state[:, heads], log_decay=case.log_decay[heads])
    expected = case.double().run(mode="chunkwise")
    assert_same_results(case.run(mode=mode), expected, 5e-6)


def test_a_thousand_blocks_of_pop_at_every_gamma() -> None:
    case = PopCase.make(1, 1024, 64, 1, 4, len(GAMMAS), 2, 3, offset=1024, dtype=torch.float32)
    case = replace(case, log_decay=ALL_GAMMAS.float())
    out, pred, state = case.run()
    main = RetentionCase(q=case.q, k=case.k, v=case.v, log_decay=case.log_decay, state=case.state)
    assert torch.isfinite(out).all()
    exact_state = final_state_in_closed_form(main)
    assert_same_results((out[:, :0], state), (out[:, :0], exact_state), 5e-6)
    tokens = [t[:, 0].double() for t in (case.q_pred, case.k_pred, case.v_pred)]
    exact, _ = retpop.retention(*tokens, ALL_GAMMAS, state=exact_state, backend="reference")
    assert_same_results((pred[:, 0], state), (exact, exact_state), 5e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("T", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7, 100])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_small_gamma_and_partial_chunks(gamma: float, T: int, chunk_size: int) -> None:
    """Rows beyond the end of a chunk have positive exponents: they must not reach the state."""
    case = RetentionCase.make(2, T, 2, 4, 5, dtype=torch.float32).for_gradients()
    log_decay = torch.full((2,), math.log(gamma) if gamma else -math.inf, dtype=torch.float64)
    case = with_decay(case, log_decay)
    actual = case.run(mode="chunkwise", chunk_size=chunk_size)
    exact = with_decay(case.double(), log_decay)
    assert_same_results(actual, exact.run(backend="reference"), 5e-6)
    assert all(torch.isfinite(g).all() for g in gradients(actual, case.leaves()))


@pytest.mark.parametrize("mode", MODES)
def test_gamma_zero_remembers_one_token(mode: str) -> None:
    """γ = 0 and γ^0 = 1: the output is (q·k) v of the token itself, the state its kᵀ v."""
    case = with_decay(RetentionCase.make(2, 20, 3, 4, 5), torch.full((3,), -math.inf))
    out, state = case.run(**mode_options(mode), scale=1.0)
    alone = (case.q * case.k).sum(-1, keepdim=True) * case.v
    last = case.k[:, -1].unsqueeze(-1) * case.v[:, -1].unsqueeze(-2)
    assert_same_results((out, state), (alone, last), 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gamma_one_forgets_nothing(mode: str) -> None:
    case = with_decay(RetentionCase.make(2, 40, 3, 4, 5), torch.zeros(3))
    _, state = case.run(**mode_options(mode))
    everything = case.state + torch.einsum("bthk,bthv->bhkv", case.k, case.v)
    assert_same_results((case.v, state), (case.v, everything), 1e-12)


@pytest.mark.parametrize("dtype", LOW)
def test_thirty_two_heads_of_retnet_decay(dtype: torch.dtype) -> None:
    """The last head's γ is 1 - 2^-36: not below 1 in float32, let alone in bfloat16, and yet ln γ < 0."""
    log_decay = retpop.retnet_decay(32)
    assert (log_decay < 0).all()
    case = with_decay(RetentionCase.make(1, 300, 32, 4, 4, dtype=dtype), log_decay)
    out_tolerance, state_tolerance, _ = TOLERANCES[dtype]
    expected = case.double().run(backend="reference")
    assert_same_results(case.run(), expected, out_tolerance, state_tolerance)


def test_states_beyond_float16_s_range() -> None:
    """With γ = 1 and all ones the state passes 65,504 long before the end."""
    T = 70_000
    ones = torch.ones(1, T, 1, 1, dtype=torch.float16)
    out, state = retpop.retention(ones * 1e-4, ones, ones, torch.zeros(1), scale=1.0)
    assert state.item() == T
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[0, -1].item(), 7.0, rtol=1e-2, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_intermediate_products_beyond_float16_s_range(mode: str) -> None:
    """q·k overflows float16 although scale and v bring the output back: products are taken in float32."""
    big = torch.full((1, 20, 1, 16), 200.0, dtype=torch.float16)
    v = torch.full((1, 20, 1, 4), 1e-3, dtype=torch.float16)
    out, _ = retpop.retention(big, big, v, torch.full((1,), -math.inf), mode=mode, scale=1e-3)
    torch.testing.assert_close(out.float(), torch.full((1, 20, 1, 4), 0.64), rtol=2e-3, atol=0)


@pytest.mark.parametrize("form", ["reference", *MODES])
@pytest.mark.parametrize("broken", ["q", "k", "v"])
def test_broken_data_shows_from_its_chunk_on(form: str, broken: str) -> None:
    """A NaN reaches everything that reads it, and no earlier chunk, other row or other head.

    Inside a chunk it may reach back: the products of a whole chunk multiply it by 0, which is NaN again.
    """
    case = with_decay(RetentionCase.make(2, 40, 2, 4, 5), torch.tensor([-0.1, 0.0]))
    data = getattr(case, broken).clone()
    data[1, 20, 1] = math.nan
    options = {"backend": "reference"} if form == "reference" else mode_options(form)
    first = {"parallel": 0, "chunkwise": CHUNK}.get(form, 20)
    clean_out, clean_state = case.run(**options)
    out, state = replace(case, **{broken: data}).run(**options)
    reached = out.isnan().any(-1)
    assert reached[1, 20, 1]
    assert reached[1, 20:, 1].all() == (broken != "q")
    assert state[1, 1].isnan().any() == (broken != "q")
    assert not reached[1, : 20 if broken == "q" else first, 1].any()
    assert torch.equal(out[~reached], clean_out[~reached])
    assert not reached[0].any()
    assert not reached[:, :, 0].any()
    assert torch.equal(state[0], clean_state[0])


@pytest.mark.parametrize("broken", ["k", "v", "k_pred", "v_pred"])
def test_broken_data_in_pop_shows_from_its_block_on(broken: str) -> None:
    case = PopCase.make(1, 3, 2, 4, 2, 1, 4, 5)
    case = replace(case, log_decay=log_decays(1, start=3))  # γ = 1
    data = getattr(case, broken).clone()
    data[:, 1 if "_pred" in broken else slice(2, 4)] = math.nan
    out, pred, state = replace(case, **{broken: data}).run()
    if "_pred" in broken:
        assert torch.isfinite(out).all()
        assert torch.isfinite(state).all()
        assert pred.isnan().any(-1).any(-1).any(-1).tolist() == [[False, True, False, False]]
    else:
        assert torch.isfinite(out[:, :2]).all()
        assert out[:, 2:].isnan().all()
        assert state.isnan().all()
        assert pred.isnan().any(-1).any(-1).any(-1).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("mode", MODES)
def test_head_dims_large_and_odd(mode: str) -> None:
    for Dk, Dv in [(8, 24), (60, 100), (128, 8), (1, 256)]:
        case = RetentionCase.make(1, 20, 2, Dk, Dv, dtype=torch.float32)
        expected = case.double().run(backend="reference")
        assert_same_results(case.run(mode=mode), expected, 5e-6)


def test_a_subnormal_log_decay_is_no_decay() -> None:
    case = with_decay(RetentionCase.make(1, 30, 1, 4, 4), torch.tensor([-1e-300], dtype=torch.float64))
    expected = with_decay(case, torch.zeros(1)).run()
    assert_same_results(case.run(), expected, 1e-12)


def test_zero_queries_and_keys() -> None:
    case = RetentionCase.make(1, 20, 2, 4, 4, with_state=False)
    out, state = replace(case, k=torch.zeros_like(case.k)).run()
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(state, torch.zeros_like(state))
    assert normal(1, seed=0).isfinite().all()


@pytest.mark.parametrize("mode", ["chunkwise", "recurrent"])
def test_a_state_that_lives_long_gathers_no_bias(mode: str) -> None:
    """A rounded γ would err in one direction at every step: by 6e-5 in a state after 8,192 tokens."""
    time_scales = torch.tensor([2.0, 37.0, 1000.0, 3000.0, 7000.0, 30000.0], dtype=torch.float64)
    log_decay = torch.log1p(-1 / time_scales).float()
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 8192, 6, 8)
    k, v = torch.randn(2, 1, 8192, 6, 8, generator=generator).unbind(0)
    _, exact = retpop.retention(q.double(), k.double(), v.double(), log_decay.double())
    _, state = retpop.retention(q, k, v, log_decay, mode=mode)
    error = (state - exact).square().mean(dim=(0, 2, 3)) / exact.square().mean(dim=(0, 2, 3))
    assert error.sqrt().max() <= 5e-6

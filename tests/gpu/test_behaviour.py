"""What only a GPU shows: the same bits every time, CUDA graphs, the real compiler, tensors beyond 2^31."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gpu_cases import BOUNDS, DTYPES, REHEARSAL, Errors, Record, gradients_of, on, replay_of, weights_like
from module_cases import make_decoder, random_state
from retention_cases import PopCase, RetentionCase, largest_error, normal
from torch import Tensor

import retpop
from retpop.ops import triton_backend

pytestmark = pytest.mark.gpu

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Results = tuple[Tensor, ...]


def retention_case(dtype: torch.dtype) -> RetentionCase:
    return RetentionCase.make(*((1, 37, 2, 16, 16) if REHEARSAL else (2, 1030, 4, 64, 64)), dtype=dtype)


def split_case(dtype: torch.dtype) -> RetentionCase:
    return RetentionCase.make(*((1, 40, 1, 16, 16) if REHEARSAL else (1, 8300, 2, 64, 64)), dtype=dtype)


def pop_case(dtype: torch.dtype) -> PopCase:
    sizes = (1, 2, 17, 2, 5, 2, 16, 16) if REHEARSAL else (64, 10, 65, 10, 64, 4, 64, 64)
    return PopCase.make(*sizes, dtype=dtype, with_reset=True)


def split_pop_case(dtype: torch.dtype) -> PopCase:
    sizes = (1, 4, 5, 4, 5, 1, 16, 16) if REHEARSAL else (1, 12, 65, 12, 64, 2, 64, 64)
    return PopCase.make(*sizes, dtype=dtype, with_reset=True)


CASES = {make.__name__: make for make in (retention_case, split_case, pop_case, split_pop_case)}


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_five_runs_give_the_same_bits(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = on(CASES[name](dtype), device).for_gradients()
    weights = None
    first: list[Tensor] | None = None
    for _ in range(2 if REHEARSAL else 5):
        results = case.run(backend="triton")
        weights = weights_like(results) if weights is None else weights
        found = [*results, *gradients_of(results, case.leaves(), weights)]
        first = found if first is None else first
        for a, b in zip(found, first, strict=True):
            assert torch.equal(a, b)


@dtypes
def test_five_norms_have_gradients_of_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    """Their weights' gradients are sums over all tokens."""
    shape = (2, 9, 2, 16) if REHEARSAL else (64, 1290, 4, 64)
    x, gate = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    affine = [torch.randn(shape[-2:], device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    weight = torch.randn(shape, device=device, dtype=dtype)
    leaves = [x, gate, *affine]
    runs = []
    for _ in range(2 if REHEARSAL else 5):
        y = triton_backend.gated_norm(*leaves, kind="groupnorm", eps=1e-6, activation="silu")
        runs.append([y, *gradients_of([y], leaves, [weight])])
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def step_run(dtype: torch.dtype, device: torch.device) -> Callable[[], Results]:
    case = RetentionCase.make(*((2, 1, 2, 16, 16) if REHEARSAL else (64, 1, 4, 64, 64)), dtype=dtype)
    return partial(on(case, device).run, backend="triton")


def pop_run(dtype: torch.dtype, device: torch.device) -> Callable[[], Results]:
    return partial(on(pop_case(dtype), device).run, backend="triton")


def pop_gradient_run(dtype: torch.dtype, device: torch.device) -> Callable[[], Results]:
    case = on(pop_case(dtype), device).for_gradients()
    weights = weights_like(case.run(backend="triton"))

    def run() -> Results:
        return tuple(gradients_of(case.run(backend="triton"), case.leaves(), weights))

    return run


def imagination_run(dtype: torch.dtype, device: torch.device) -> Callable[[], Results]:
    """A decoder takes in a block and predicts the next one."""
    decoder = make_decoder(dtype)
    state = random_state(decoder, 2).to(device)
    decoder = decoder.to(device)
    x, x_pred = (normal(2, *shape, 12, seed=1, dtype=dtype).to(device) for shape in ((5,), (1, 4)))

    @torch.no_grad()
    def run() -> Results:
        out, pred, after = decoder.pop(x, x_pred, state, block_size=5, offset=1, backend="triton")
        return out, pred, after.kv, after.position

    return run


RUNS = {make.__name__: make for make in (step_run, pop_run, pop_gradient_run, imagination_run)}


def steps_of(decoder: torch.nn.Module, device: torch.device) -> tuple[Callable[..., Any], ...]:
    """A step of training the decoder, and one of decoding with it."""
    rate = torch.tensor(1e-2, device=device)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=rate, momentum=0.9)

    def train(x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = decoder(x)[0].square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return train, torch.no_grad()(decoder)


def test_captured_steps_are_the_steps(device: torch.device) -> None:
    """The first calls run the function, the next captures it, the others are replays."""
    decoders = [make_decoder(torch.float32).to(device) for _ in range(2)]
    eager, captured = (steps_of(decoder, device) for decoder in decoders)
    captured = [retpop.capture(step, warm_up=1) for step in captured]
    for seed in range(3):
        x = normal(2, 2, 12, seed=seed, dtype=torch.float32).to(device)
        torch.testing.assert_close(captured[0](x), eager[0](x))
    states = [decoder.init_state(2) for decoder in decoders]
    for seed in range(3):
        x = normal(2, 1, 12, seed=seed, dtype=torch.float32).to(device)
        (out, *others), states = zip(captured[1](x, states[0]), eager[1](x, states[1]), strict=True)
        torch.testing.assert_close(out, *others)
    torch.testing.assert_close(*(state.kv for state in states))


@dtypes
@pytest.mark.parametrize("name", RUNS)
def test_a_hundred_replays_of_a_graph_give_the_same_bits(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    run = RUNS[name](dtype, device)
    expected = [x.clone() for x in run()]
    replay = replay_of(run, device)
    same = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(2 if REHEARSAL else 100):
        for a, e in zip(replay(), expected, strict=True):
            same &= (a == e).all()
    assert same.item()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_decoder_trains_as_an_eager_one(device: torch.device) -> None:
    """Forward and backward without a graph break; on a GPU by inductor."""
    decoder = make_decoder(torch.float32, dropout=0.0).to(device).train()
    x, x_pred = (normal(2, *shape, 12, seed=1, dtype=torch.float32).to(device) for shape in ((15,), (3, 4)))
    pop = partial(decoder.pop, block_size=5, backend="triton")
    compiled = torch.compile(pop, fullgraph=True, backend="aot_eager" if REHEARSAL else "inductor")
    leaves = list(decoder.parameters())
    found = []
    for run in (compiled, pop):
        out, pred, state = run(x, x_pred)
        results = (out, pred, state.kv)
        found.append([*results, *gradients_of(results, leaves, weights_like(results))])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_nothing_beside_the_inputs_is_read(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Each input is a window in a larger tensor of NaN: around its tokens, and beside its features."""
    case = on(CASES[name](dtype), device)
    expected = case.for_gradients()
    weights = weights_like(results := expected.run(backend="triton"))
    wanted = [*results, *gradients_of(results, expected.leaves(), weights)]
    tokens = [name for name in vars(case) if name in ("q", "k", "v", "q_pred", "k_pred", "v_pred")]
    windows = {name: _window(getattr(case, name)).requires_grad_() for name in tokens}
    inside = replace(case.for_gradients(), **windows)
    results = inside.run(backend="triton")
    found = [*results, *gradients_of(results, inside.leaves(), weights)]
    for a, e in zip(found, wanted, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-2 * e.abs().max().item())


def _window(x: Tensor) -> Tensor:
    """The same numbers, surrounded by NaN along every dimension but the first and the heads."""
    pads = [3 if d not in (0, x.dim() - 2) else 0 for d in range(x.dim())]
    around = x.new_full([n + 2 * p for n, p in zip(x.shape, pads, strict=True)], float("nan"))
    window = around[tuple(slice(p, p + n) for n, p in zip(x.shape, pads, strict=True))]
    return window.copy_(x).detach()


BEYOND = 2**12 if REHEARSAL else 2**31
"""Elements of a tensor after which its last tokens are looked at."""

needs_memory = pytest.mark.skipif(
    not REHEARSAL
    and torch.cuda.is_available()
    and torch.cuda.get_device_properties(0).total_memory < 70 * 2**30,
    reason="needs 70 GiB of memory",
)


@needs_memory
@pytest.mark.xdist_group("memory")  # two of them at a time could be too much
def test_the_tail_of_a_sequence_beyond_32_bits(device: torch.device, record_property: Record) -> None:
    """The last tokens, whose state remembers only tokens near them, against float64 on those alone."""
    dtype, (H, D) = (torch.float32, (2, 16)) if REHEARSAL else (torch.bfloat16, (2, 128))
    tail, compared = (48, 24) if REHEARSAL else (1024, 512)
    tokens = BEYOND // (H * D) + 77
    log_decay = torch.full((H,), 0.5, device=device).log()
    q, k, v = (torch.randn(1, tokens, H, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    weight = torch.zeros(1, tokens, H, D, device=device, dtype=dtype)
    weight[:, -compared:] = torch.randn(1, compared, H, D, device=device)
    out, state = retpop.retention(q, k, v, log_decay, backend="triton")
    found = torch.autograd.grad(out, (q, k, v), weight)
    ends = [x[:, -tail:].detach().double().requires_grad_() for x in (q, k, v)]
    wanted, last = retpop.retention(*ends, log_decay.double(), backend="torch")
    errors = Errors(dtype, record_property)
    errors.compare("out", "out", out[:, -compared:], wanted[:, -compared:], 1)
    errors.compare("state", "state", state, last, None)
    right = torch.autograd.grad(wanted, ends, weight[:, -tail:].double())
    for name, a, e in zip("qkv", found, right, strict=True):
        errors.compare(f"grad {name}", "grad", a[:, -compared:], e[:, -compared:], 1)
    errors.finish()


@needs_memory
@pytest.mark.xdist_group("memory")  # two of them at a time could be too much
def test_the_last_row_of_a_batch_beyond_32_bits(device: torch.device) -> None:
    """POP, the norm and the rotation of many rows: the last row is what it is alone."""
    dtype, (N, L, M, H, D) = (
        (torch.float32, (2, 5, 4, 2, 16)) if REHEARSAL else (torch.bfloat16, (10, 65, 64, 4, 64))
    )
    tokens = N * (L + M)
    rows = BEYOND // (tokens * H * D) + 3
    q, k, v = (torch.randn(rows, tokens, H, D, device=device, dtype=dtype) for _ in range(3))
    log_decay = retpop.log_spaced_decay(H).to(device)
    ops = torch.ops.retpop
    pop = (log_decay, None, None, [N, M], L, 0, 0.5, None)
    turn = torch.randn(1, tokens, 1, D, device=device)
    for run in (
        lambda q, k, v: ops.pop_fwd([q, k, v], *pop),
        lambda q, k, v: ops.rotary_fwd(q, k, turn, turn, "retnet", False),
        lambda q, k, v: (ops.norm_gate_fwd(q, k, None, None, "groupnorm", 1e-6),),
    ):
        everything, alone = run(q, k, v), run(q[-1:], k[-1:], v[-1:])
        for a, e in zip(everything, alone, strict=True):
            assert torch.isfinite(a[-1:]).all()
            assert largest_error(a[-1:], e, tokens_dim=None) <= BOUNDS[dtype].out
        del everything, alone

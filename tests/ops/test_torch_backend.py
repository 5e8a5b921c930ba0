"""The PyTorch backend's faster way: in stretches of any size, written into place, with its own gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from retention_cases import (
    CHUNK,
    PopCase,
    RetentionCase,
    assert_same_gradients,
    assert_same_results,
    gradients,
    largest_error,
    normal,
)
from torch import Tensor

import retpop
from retpop import RetNetConfig, RetNetDecoder
from retpop.ops import blocks

VALUES = [1, 200, 400, 800]
"""A block of 16 tokens has 2 x 3 x 16 = 96 values a row: one row at once; two; one block of all rows; two."""


@pytest.fixture(params=VALUES)
def values_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "VALUES_A_THREAD", request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return int(request.param)


def run(case: RetentionCase | PopCase, backend: str) -> tuple[Tensor, ...]:
    return (
        case.run(backend=backend, chunk_size=CHUNK)
        if isinstance(case, RetentionCase)
        else case.run(backend=backend)
    )


CASES = {
    "five chunks and a rest": RetentionCase.make(3, 85, 2, 3, 4),
    "less than a chunk": RetentionCase.make(3, 7, 2, 3, 4),
    "one row": RetentionCase.make(1, 64, 2, 3, 4, with_state=False),
    "POP": PopCase.make(3, 5, 16, 5, 7, 2, 3, 4, with_reset=True),
    "POP, offset": PopCase.make(3, 2, 16, 1, 30, 2, 3, 4, offset=2, with_state=False),
}


@pytest.mark.usefixtures("values_at_once")
@pytest.mark.parametrize("name", CASES)
def test_stretches_of_any_size(name: str) -> None:
    case = CASES[name].for_gradients()
    expected = run(case, "reference")
    with torch.no_grad():
        assert_same_results(run(case, "torch"), expected, 1e-12)
    actual = run(case, "torch")
    assert_same_results(actual, expected, 1e-12)
    assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, case.leaves()), 1e-12)


@pytest.mark.usefixtures("values_at_once")
@pytest.mark.parametrize("main_out", ["all", "last"])
def test_stretches_of_rows_in_a_decoder(main_out: str) -> None:
    cfg = RetNetConfig(embed_dim=12, num_heads=2, num_layers=2, ffn_dim=8)
    decoder = RetNetDecoder(cfg, dtype=torch.float64)
    tokens = [normal(3, 20, 12, seed=1).requires_grad_(), normal(3, 4, 3, 12, seed=2).requires_grad_()]
    reset = torch.tensor([[False, True, False, False], [False] * 4, [True, False, False, True]])
    found = []
    for backend in ("torch", "reference"):
        out, pred, state = decoder.pop(
            *tokens, block_size=5, offset=1, reset=reset, main_out=main_out, backend=backend
        )
        leaves = [*tokens, *decoder.parameters()]
        found.append(((out, pred, state.kv), gradients((out, pred, state.kv), leaves)))
    assert_same_results(*(results for results, _ in found), 1e-10)
    assert_same_gradients(*(grads for _, grads in found), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_derivatives_are_the_reference_s(name: str) -> None:
    """A gradient penalty: the gradient of the sum of the gradients' squares."""
    case = CASES[name].for_gradients()
    penalties = []
    for backend in ("torch", "reference"):
        results = run(case, backend)
        loss = sum((x * normal(*x.shape, seed=i)).sum() for i, x in enumerate(results))
        first = torch.autograd.grad(loss, case.leaves(), create_graph=True)
        penalties.append(torch.autograd.grad(sum((x**2).sum() for x in first), case.leaves()))
    assert_same_gradients(list(penalties[0]), list(penalties[1]), 1e-11)


def test_one_tensor_as_queries_keys_and_values() -> None:
    """Its gradient is the sum of three, and has a gradient."""
    x = normal(2, 40, 3, 4, seed=3).requires_grad_()
    decay = torch.tensor([-0.5, -0.1, 0.0], dtype=torch.float64)
    found = []
    for backend in ("torch", "reference"):
        out, _ = retpop.retention(x, x, x, decay, chunk_size=CHUNK, backend=backend)
        (first,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        found.append([first.detach(), *torch.autograd.grad(first.pow(2).sum(), x)])
    assert_same_gradients(*found, 1e-11)


def test_a_final_state_written_over_does_not_spoil_the_gradients() -> None:
    case = CASES["five chunks and a rest"].for_gradients()
    out, state = run(case, "torch")
    state.detach().zero_()
    expected, _ = run(case, "reference")
    assert_same_gradients(gradients((out,), case.leaves()), gradients((expected,), case.leaves()), 1e-12)


def test_inputs_written_over_before_backward_are_noticed() -> None:
    case = CASES["five chunks and a rest"].for_gradients()
    values = case.v * 1
    out, _ = run(replace(case, v=values), "torch")
    values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_may_run_twice() -> None:
    case = CASES["POP"].for_gradients()
    results = run(case, "torch")
    twice = [
        torch.autograd.grad([x.sum() for x in results], case.leaves(), retain_graph=True) for _ in range(2)
    ]
    for first, second in zip(*twice, strict=True):
        assert torch.equal(first, second)


def test_backward_under_autocast_keeps_its_precision() -> None:
    case = RetentionCase.make(2, 70, 2, 8, 8, dtype=torch.float32).for_gradients()
    results = run(case, "torch")
    outside = torch.autograd.grad(results[0].sum(), case.leaves(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(results[0].sum(), case.leaves())
    for x, y in zip(inside, outside, strict=True):
        assert torch.equal(x, y)


def test_what_training_keeps_is_its_inputs_and_the_states() -> None:
    case = RetentionCase.make(2, 20 * CHUNK, 2, 16, 16, dtype=torch.float32).for_gradients()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(case, "torch")
    states = 21 * case.state.nbytes
    assert sum(kept.values()) == states + sum(x.nbytes for x in case.leaves())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_program_sees_plain_operations() -> None:
    case = RetentionCase.make(1, 20, 2, 3, 4, with_state=False).for_gradients()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return retpop.retention(q, k, v, case.log_decay, backend="torch")[0]

    with pytest.warns(DeprecationWarning, match="trace"):
        traced = torch.jit.trace(function, (case.q, case.k, case.v))
    assert "PythonOp" not in str(traced.graph)
    others = normal(*case.q.shape, seed=8), case.k, case.v
    assert largest_error(traced(*others), function(*others)) < 1e-7  # a trace has the scale in float32

"""The PyTorch backend's faster way: in groups of any size, written into place, with its own gradients."""

from __future__ import annotations

import itertools
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
    largest_error,
    normal,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import retpop
from retpop import RetNetConfig, RetNetDecoder
from retpop.ops import reference_backend, torch_backend, triton_backend
from retpop.ops.powers import DecayPowers
from retpop.ops.rows import PopSpec
from retpop.ops.torch_backend import blocks
from retpop.ops.torch_backend.packed import Packing

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
def test_groups_of_any_size(name: str) -> None:
    case = CASES[name].for_gradients()
    expected = run(case, "reference")
    with torch.no_grad():
        assert_same_results(run(case, "torch"), expected, 1e-12)
    actual = run(case, "torch")
    assert_same_results(actual, expected, 1e-12)
    assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, case.leaves()), 1e-12)


def test_short_blocks_of_many_rows_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch counts its own tokens: short rows, and what is left over, are not cut finer."""
    monkeypatch.setattr(blocks, "VALUES_A_THREAD", 8 * 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    few, many = (torch.empty(16, length, 2, 4) for length in (4, 68))
    assert [group.rows for group in blocks.groups(few, 64)] == [slice(0, 16)]
    assert [group.num_blocks for group in blocks.groups(many, 64)] == [1] * 16 + [1]
    assert list(blocks.groups(many, 64))[-1] == blocks.Group(slice(0, 16), slice(1, 2), slice(64, 68), 4)


@pytest.mark.usefixtures("values_at_once")
@pytest.mark.parametrize("main_out", ["all", "last"])
def test_groups_of_rows_in_a_decoder(main_out: str) -> None:
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


def test_resets_written_over_before_backward_are_noticed() -> None:
    case = CASES["POP"].for_gradients()
    reset = case.reset.clone()
    out, *_ = run(replace(case, reset=reset), "torch")
    reset.fill_(False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["one row", "POP, offset"])
def test_gradients_in_batches(name: str) -> None:
    case = CASES[name].for_gradients()
    results = run(case, "torch")
    batch = [normal(3, *x.shape, seed=i) for i, x in enumerate(results)]
    actual = torch.autograd.grad(results, case.leaves(), batch, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(results, case.leaves(), [x[i] for x in batch], retain_graph=True)
        assert_same_gradients([x[i] for x in actual], list(expected), 1e-12)


def test_tangents_of_gradients() -> None:
    """Forward-mode AD through backward alone: the gradient is linear in what comes from above."""
    case = CASES["one row"].for_gradients()
    out, _ = run(case, "torch")
    above, tangent = (normal(*out.shape, seed=seed) for seed in (1, 2))
    expected = torch.autograd.grad(out, case.leaves(), tangent, retain_graph=True)
    with forward_ad.dual_level():
        duals = torch.autograd.grad(out, case.leaves(), forward_ad.make_dual(above, tangent))
        actual = [forward_ad.unpack_dual(x).tangent for x in duals]
    assert_same_gradients(actual, list(expected), 1e-12)


def test_a_traced_training_step() -> None:
    case = CASES["one row"]

    def step(v: Tensor) -> Tensor:
        v = v.detach().requires_grad_()
        return torch.autograd.grad(run(replace(case, v=v), "torch")[0].square().sum(), v)[0]

    others = normal(*case.v.shape, seed=5)
    assert_same_gradients([make_fx(step)(case.v)(others)], [step(others)], 1e-12)


@pytest.mark.parametrize("leaf", ["q", "k", "q_pred"])
def test_second_derivatives_of_what_nothing_depends_on(leaf: str) -> None:
    """No tokens, or no predictions: gradients are None or zero, and none are missed."""
    case = PopCase.make(2, 0, 4, 1, 0, 2, 3, 4)
    x = getattr(case, leaf).requires_grad_()
    results = run(replace(case, **{leaf: x}), "torch")
    loss = sum(r.sum() for r in results if r.requires_grad)
    (found,) = torch.autograd.grad(loss, x, create_graph=True, allow_unused=True)
    assert found is None or found.numel() == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (-1,), (0, 2)], ids=str)
def test_gradients_of_some_inputs(name: str, subset: tuple[int, ...]) -> None:
    """What is not wanted is not computed; what is wanted does not miss it."""
    case = CASES[name].for_gradients()
    names = [n for n in ("q", "k", "v", "q_pred", "k_pred", "v_pred", "state") if hasattr(case, n)]
    chosen = {names[i]: getattr(case, names[i]) for i in subset if getattr(case, names[i]) is not None}
    if not chosen:
        pytest.skip("this case begins without a state")
    frozen = {n: x.detach() for n in names if n not in chosen and (x := getattr(case, n)) is not None}
    found = []
    for backend in ("torch", "reference"):
        results = run(replace(case, **frozen), backend)
        found.append(gradients(results, list(chosen.values())))
    assert_same_gradients(*found, 1e-12)


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


@pytest.mark.parametrize("packed", [False, True])
def test_what_training_keeps_is_its_inputs_and_the_states(packed: bool) -> None:
    """No scores, of packed sequences neither: 8 chunks of the first, 13 of the second, each with a state."""
    case = RetentionCase.make(
        1, 20 * CHUNK, 2, 16, 16, dtype=torch.float32, sequences=2 if packed else None
    ).for_gradients()
    options = {"cu_seqlens": torch.tensor([0, 8 * CHUNK - 3, 20 * CHUNK])} if packed else {}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.run(chunk_size=CHUNK, **options)
    states = 21 * case.state[0].nbytes
    assert sum(kept.values()) == states + sum(x.nbytes for x in (*case.leaves(), case.log_decay))


@pytest.mark.filterwarnings(
    "ignore"
)  # tracing is deprecated, and warns of every length that it takes as given
def test_a_traced_program_sees_plain_operations() -> None:
    case = RetentionCase.make(1, 20, 2, 3, 4, with_state=False).for_gradients()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return retpop.retention(q, k, v, case.log_decay, backend="torch")[0]

    traced = torch.jit.trace(function, (case.q, case.k, case.v))
    assert "PythonOp" not in str(traced.graph)
    others = normal(*case.q.shape, seed=8), case.k, case.v
    assert largest_error(traced(*others), function(*others)) < 1e-7  # a trace has the scale in float32


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("bounds", [None, torch.tensor([0, 0, 0])], ids=["one", "packed"])
def test_without_tokens_the_state_comes_back_as_a_copy(mode: str, bounds: Tensor | None) -> None:
    case = RetentionCase.make(2 if bounds is None else 1, 0, 2, 3, 4, sequences=2)
    for backend in ("torch", "reference"):
        _, state = case.run(mode=mode, cu_seqlens=bounds, backend=backend)
        assert torch.equal(state, case.state)
        assert state.data_ptr() != case.state.data_ptr()
    _, _, state = PopCase.make(2, 0, 3, 1, 2, 2, 3, 4).run()
    assert state.is_contiguous()


def test_outputs_of_float16_tokens_can_be_had_in_float32() -> None:
    """Of packed sequences, rows of POP and in every mode: a sum that float16 cannot hold."""
    q = torch.full((1, 8, 1, 4), 100.0, dtype=torch.float16)
    powers = DecayPowers(torch.zeros(1), 1.0, torch.float32)
    options = {"state": None, "chunk_size": None, "out_dtype": torch.float32}
    exact = retpop.retention(*[q.double()] * 3, torch.zeros(1).double(), scale=1.0)[0]
    backends = torch_backend, triton_backend, reference_backend
    for backend, mode in itertools.product(backends, MODES):
        for packing in (None, Packing("here", torch.tensor([0, 8]), 8)):
            out, _ = backend.retention(q, q, q, powers, mode=mode, packing=packing, **options)
            assert out.dtype is torch.float32
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=0)
        spec = PopSpec(powers, (1, 2), 3, 1, None, out_dtype=torch.float32)
        row, _ = backend.pop((q, q, q), None, spec)
        torch.testing.assert_close(row[:, :6].double(), exact[:, :6], rtol=1e-5, atol=0)

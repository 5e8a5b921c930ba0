"""PyTorch's transforms on the torch backend: forward-mode, vmap, double backward, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
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
    mode_options,
    normal,
)
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import retpop

PAIRS = ("q", "k", "v", "state")
POP_PAIRS = ("q", "k", "v", "q_pred", "k_pred", "v_pred", "state")


def as_function(
    case: RetentionCase | PopCase, names: tuple[str, ...], **options: object
) -> Callable[..., tuple[Tensor, ...]]:
    """The op as a function of the named inputs alone."""

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return replace(case, **dict(zip(names, values, strict=True))).run(**options)

    return run


def inputs_of(case: RetentionCase | PopCase, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    return tuple(getattr(case, name) for name in names)


def tangents_of(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(normal(*value.shape, seed=90 + i) for i, value in enumerate(values))


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode(mode: str) -> None:
    case = RetentionCase.make(2, 18, 2, 3, 4)
    values = inputs_of(case, PAIRS)
    expected = torch.func.jvp(as_function(case, PAIRS, backend="reference"), values, tangents_of(values))
    actual = torch.func.jvp(as_function(case, PAIRS, **mode_options(mode)), values, tangents_of(values))
    for a, e in zip(actual, expected, strict=True):
        assert_same_results(a, e, 1e-11)


def test_forward_mode_of_pop() -> None:
    case = PopCase.make(2, 3, 2, 4, 3, 2, 3, 4, with_reset=True)
    values = inputs_of(case, POP_PAIRS)
    expected = torch.func.jvp(as_function(case, POP_PAIRS, backend="reference"), values, tangents_of(values))
    actual = torch.func.jvp(as_function(case, POP_PAIRS), values, tangents_of(values))
    for a, e in zip(actual, expected, strict=True):
        assert_same_results(a, e, 1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_vmap(mode: str) -> None:
    """Over an extra leading dim: an ensemble is a loop over its members."""
    members = [RetentionCase.make(2, 18, 2, 3, 4, seed=6 * i) for i in range(3)]
    run = as_function(members[0], PAIRS, **mode_options(mode))
    stacked = [torch.stack(values) for values in zip(*(inputs_of(m, PAIRS) for m in members), strict=True)]
    actual = torch.vmap(run)(*stacked)
    for i, member in enumerate(members):
        assert_same_results(tuple(t[i] for t in actual), member.run(backend="reference"), 1e-12)


def test_vmap_of_pop() -> None:
    members = [PopCase.make(2, 3, 2, 2, 3, 2, 3, 4, offset=1, seed=6 * i) for i in range(3)]
    run = as_function(members[0], POP_PAIRS)
    stacked = [
        torch.stack(values) for values in zip(*(inputs_of(m, POP_PAIRS) for m in members), strict=True)
    ]
    actual = torch.vmap(run)(*stacked)
    for i, member in enumerate(members):
        assert_same_results(tuple(t[i] for t in actual), member.run(backend="reference"), 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_per_sample_gradients(mode: str) -> None:
    """vmap of grad, as in differential privacy: one gradient for each row."""
    case = RetentionCase.make(3, 18, 2, 3, 4)

    def loss(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        row = replace(case, q=q[None], k=k[None], v=v[None], state=state[None])
        out, final = row.run(**mode_options(mode))
        return out.square().sum() + final.square().sum()

    actual = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*inputs_of(case, PAIRS))
    leaves = case.for_gradients()
    out, final = leaves.run(backend="reference")
    expected = torch.autograd.grad(out.square().sum() + final.square().sum(), leaves.leaves())
    assert_same_gradients(list(actual), list(expected), 1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_double_backward(mode: str) -> None:
    case = RetentionCase.make(1, 17, 1, 2, 2, seed=4).for_gradients()
    run = as_function(case, PAIRS, **mode_options(mode))
    assert torch.autograd.gradgradcheck(run, inputs_of(case, PAIRS), fast_mode=True)


def test_double_backward_of_pop() -> None:
    case = PopCase.make(1, 2, 2, 2, 3, 1, 2, 2, offset=1, with_reset=True, seed=4).for_gradients()
    run = as_function(case, POP_PAIRS)
    assert torch.autograd.gradgradcheck(run, inputs_of(case, POP_PAIRS), fast_mode=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("mode", "T"), [("parallel", 18), ("chunkwise", 18), ("recurrent", 3)])
def test_compiled_without_a_graph_break(mode: str, T: int) -> None:
    """Forward and backward in one graph each."""
    case = RetentionCase.make(2, T, 2, 3, 4).for_gradients(decay=True)
    run = as_function(case, PAIRS, **mode_options(mode))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual, expected = (function(*inputs_of(case, PAIRS)) for function in (compiled, run))
    assert_same_results(actual, expected, 1e-12)
    assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, case.leaves()), 1e-11)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("mode", "T"), [("parallel", 18), ("chunkwise", 18), ("recurrent", 3), ("recurrent", 1)]
)
def test_vmap_over_the_state_compiled(mode: str, T: int) -> None:
    """What the state is written over must not be a tensor that lacks its batch."""
    cases = [RetentionCase.make(2, T, 2, 3, 4, seed=seed) for seed in range(2)]
    states = torch.stack([case.state for case in cases])

    def run(state: Tensor) -> tuple[Tensor, Tensor]:
        return replace(cases[0], state=state).run(**mode_options(mode))

    compiled = torch.compile(torch.vmap(run), fullgraph=True, backend="eager")
    actual = compiled(states)
    expected = [torch.stack(each) for each in zip(*(run(state) for state in states), strict=True)]
    assert_same_results(actual, expected, 1e-12)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_parallel_form_compiles_once_for_all_lengths_but_the_first() -> None:
    counter = CompileCounterWithBackend("eager")
    log_decay = retpop.retnet_decay(2)
    compiled = torch.compile(
        lambda q: retpop.retention(q, q, q, log_decay, mode="parallel"), fullgraph=True, backend=counter
    )
    for length in (20, 7, 33):
        q = normal(2, length, 2, 4, seed=length, dtype=torch.float32)
        expected = retpop.retention(q, q, q, log_decay, backend="reference")
        assert_same_results(compiled(q), expected, 1e-5)
    assert counter.frame_count == 2


@pytest.mark.usefixtures("fresh_compiler")
def test_pop_compiled_without_a_graph_break() -> None:
    case = PopCase.make(2, 2, 3, 3, 2, 2, 3, 4, with_reset=True).for_gradients(decay=True)
    run = as_function(case, POP_PAIRS)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual, expected = (function(*inputs_of(case, POP_PAIRS)) for function in (compiled, run))
    assert_same_results(actual, expected, 1e-12)
    assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, case.leaves()), 1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_shapes_on_the_meta_device(mode: str) -> None:
    """No value is looked at: a model can be laid out without memory."""
    case = RetentionCase.make(2, 18, 2, 3, 4, dtype=torch.bfloat16)
    meta = replace(case, **{name: value.to("meta") for name, value in vars(case).items()})
    out, state = meta.run(mode=mode)
    assert (out.shape, out.dtype, out.device.type) == ((2, 18, 2, 4), torch.bfloat16, "meta")
    assert (state.shape, state.dtype, state.device.type) == ((2, 2, 3, 4), torch.float32, "meta")


@pytest.mark.parametrize("mode", MODES)
def test_linearized(mode: str) -> None:
    """A linear function of tangents, computed without the operation itself; constants in it are shared."""
    case = RetentionCase.make(2, 18, 2, 3, 4)
    leaf = case.k.requires_grad_()  # what the linear function holds as a constant may want a gradient

    def run(q: Tensor) -> Tensor:
        return replace(case, q=q, k=leaf).run(**mode_options(mode))[0]

    _, linear = torch.func.linearize(run, case.q)
    tangent = normal(*case.q.shape, seed=3)
    expected = torch.func.jvp(run, (case.q,), (tangent,))[1]
    for _ in range(2):
        assert_same_gradients([linear(tangent)], [expected], 1e-12)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["retention", "packed", "POP"])
def test_a_backward_that_is_compiled_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled autograd, over a forward that ran eagerly; the compiler does not know our poisoned memory."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.__base__.new_empty)
    if name == "POP":
        case, options = PopCase.make(2, 3, 2, 2, 3, 2, 3, 4, with_reset=True).for_gradients(), {}
    else:
        case = RetentionCase.make(1, 40, 2, 3, 4, sequences=2 if name == "packed" else None).for_gradients()
        options = {"cu_seqlens": torch.tensor([0, 17, 40])} if name == "packed" else {}
    expected = gradients(case.run(**options), case.leaves())
    loss = sum((normal(*r.shape, seed=7 + i) * r).sum() for i, r in enumerate(case.run(**options)))
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    assert_same_gradients([leaf.grad for leaf in case.leaves()], expected, 1e-12)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("mode", "backend"), [("chunkwise", "aot_eager"), ("recurrent", "eager")])
def test_two_graphs_serve_all_lengths(mode: str, backend: str) -> None:
    """The first length has a graph of its own; the second opens it. Gradients of the decay included."""
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(lambda case: case.run(mode=mode), backend=counter, fullgraph=True)
    for T in (3, 50, 64, 130, 201):
        case = RetentionCase.make(1, T, 2, 3, 4, seed=6).for_gradients(decay=True)
        actual, expected = run(case), case.run(mode="chunkwise")
        assert_same_results(actual, expected, 1e-12)
        assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, case.leaves()), 1e-11)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("cu_seqlens", "with_reset"), [(None, False), (None, True), ([0, 5, 5, 20], False), ([0, 0], False)]
)
def test_the_operation_that_graphs_hold(cu_seqlens: list[int] | None, with_reset: bool) -> None:
    """Its schema, aliasing, fakes and gradient, as torch asks of an operation."""
    T, S = (20, 2) if cu_seqlens is None else (cu_seqlens[-1], len(cu_seqlens) - 1)
    case = RetentionCase.make(S if cu_seqlens is None else 1, T, 2, 3, 4, sequences=S).for_gradients(
        decay=True
    )
    reset = torch.arange(2 * T).view(2, T) % 7 == 3 if with_reset else None
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    tensors = (case.q, case.k, case.v, case.log_decay, case.state, bounds, reset)
    torch.library.opcheck(
        torch.ops.retpop.chunkwise,
        (*tensors, 0.5, CHUNK, torch.float64),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize(("mode", "strict"), [*((mode, False) for mode in MODES), ("chunkwise", True)])
def test_exported_for_any_length(mode: str, strict: bool) -> None:
    """Not unrolled: chunkwise mode is one operation of such a program, and parallel mode one product."""
    case = RetentionCase.make(2, 130, 2, 3, 4, dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return retpop.retention(q, k, v, case.log_decay, mode=mode, state=case.state)

    length = torch.export.Dim("T", min=2, max=4096)
    dims = {name: {1: length} for name in "qkv"}
    program = torch.export.export(
        Module(), (case.q, case.k, case.v), dynamic_shapes=dims, strict=strict
    ).module()
    for T in (2, 64, 201):
        other = replace(RetentionCase.make(2, T, 2, 3, 4, seed=6, dtype=torch.float32), state=case.state)
        expected = other.run(mode=mode)
        assert_same_results(program(other.q, other.k, other.v), expected, 1e-6)

"""Resets at any token: a reset is nothing but a cut, after which the state is zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from retention_cases import (
    MODES,
    RetentionCase,
    assert_same_gradients,
    assert_same_results,
    gradients,
    mode_options,
    normal,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import retpop
from retpop.ops.torch_backend.packed import Packing

FORMS = {
    "reference": {"backend": "reference"},
    **{mode: {"backend": "torch", **mode_options(mode)} for mode in MODES},
}
every_form = pytest.mark.parametrize("form", FORMS)
Results = tuple[Tensor, Tensor]


def resets(*places: tuple[int, int], rows: int = 3, length: int = 40) -> Tensor:
    """A mask with resets at (row, token)."""
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, token in places:
        mask[row, token] = True
    return mask


def case_of(reset: Tensor, lengths: list[int] | None = None, **options: object) -> RetentionCase:
    sequences = None if lengths is None else len(lengths)
    return RetentionCase.make(*reset.shape, 2, 3, 4, sequences=sequences, **options)


def bounds(lengths: list[int] | None) -> Tensor | None:
    return None if lengths is None else torch.tensor([0, *accumulate(lengths)])


def cut_there(case: RetentionCase, reset: Tensor, lengths: list[int] | None = None) -> Results:
    """Every episode in a call of its own."""
    B, T = reset.shape
    spans = [(row, 0, T) for row in range(B)]
    if lengths is not None:
        spans = [(0, end - length, end) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    outs, states = [], []
    for s, (row, start, end) in enumerate(spans):
        state = None if case.state is None else case.state[s : s + 1]
        at = start
        for stop in [*(t for t in range(start, end) if reset[row, t]), end]:
            alone = replace(case, **{name: getattr(case, name)[row : row + 1] for name in "qkv"})
            out, state = alone.part(at, stop, state).run(backend="reference")
            outs.append(out)
            at, state = stop, state if stop == end else None
        states.append(state)
    return torch.cat(outs, dim=1).view(case.v.shape), torch.cat(states)


CASES: dict[str, tuple[Tensor, list[int] | None, bool]] = {
    "anywhere": (resets((0, 0), (0, 1), (1, 17), (1, 33), (2, 39)), None, True),
    "without a state": (resets((0, 16), (0, 15), (2, 3)), None, False),
    "nowhere": (resets(), None, True),
    "at every token": (~resets(length=19), None, True),
    "packed": (resets((0, 0), (0, 5), (0, 8), (0, 30), rows=1), [5, 0, 3, 32, 0], True),
}


@every_form
@pytest.mark.parametrize("name", CASES)
def test_a_reset_is_a_cut(name: str, form: str) -> None:
    """Outputs, final state and every gradient, with float64's own rounding."""
    reset, lengths, with_state = CASES[name]
    case = case_of(reset, lengths, with_state=with_state).for_gradients()
    actual = case.run(reset=reset, cu_seqlens=bounds(lengths), **FORMS[form])
    expected = cut_there(case, reset, lengths)
    assert_same_results(actual, expected, 1e-12)
    assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, case.leaves()), 1e-12)


@every_form
@pytest.mark.parametrize("lengths", [None, [8, 0, 32]])
def test_without_gradient_too(lengths: list[int] | None, form: str) -> None:
    reset = resets((0, 3), (0, 20), rows=1)
    case = case_of(reset, lengths)
    actual = case.run(reset=reset, cu_seqlens=bounds(lengths), **FORMS[form])
    assert_same_results(actual, cut_there(case, reset, lengths), 1e-12)


@every_form
def test_a_nan_does_not_pass_a_reset(form: str) -> None:
    """Neither forwards, from tokens or a dropped state, nor backwards, from gradients."""
    reset = resets((0, 20), (1, 20), (2, 0))
    case = case_of(reset).for_gradients()
    lost = torch.zeros(3, 40, dtype=torch.bool)
    lost[0, :20] = lost[1, 20:] = True
    broken = {
        name: torch.where(lost[..., None, None], torch.nan, getattr(case, name).detach()) for name in "qkv"
    }
    broken["state"] = case.state.detach().clone()
    broken["state"][2] = torch.inf
    leaves = {name: x.requires_grad_() for name, x in broken.items()}
    out, state = replace(case, **leaves).run(reset=reset, **FORMS[form])
    expected, expected_state = case.run(reset=reset, backend="reference")
    assert_same_results((out[~lost], state[[0, 2]]), (expected[~lost], expected_state[[0, 2]]), 1e-12)
    assert out[lost].isnan().all()
    assert state[1].isnan().all()
    grad_out = normal(*out.shape, seed=1).masked_fill(lost[..., None, None], torch.nan)
    grad_state = normal(*state.shape, seed=2)
    found = torch.autograd.grad((out, state), list(leaves.values()), (grad_out, grad_state))
    wanted = torch.autograd.grad(
        (expected, expected_state), case.leaves(), (grad_out.nan_to_num(0.0), grad_state)
    )
    kept = [*[~lost] * 3, torch.tensor([1, 2])]
    assert_same_gradients(
        *([x[rows] for x, rows in zip(grads, kept, strict=True)] for grads in (found, wanted)), 1e-12
    )


@pytest.mark.parametrize("mode", MODES)
def test_resets_at_first_tokens_drop_the_state_and_change_nothing_else(mode: str) -> None:
    reset = resets((1, 0))
    case = case_of(reset)
    dropped = replace(case, state=case.state.index_fill(0, torch.tensor([1]), 0.0))
    for a, b in zip(case.run(reset=reset, mode=mode), dropped.run(mode=mode), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(case.run(reset=resets(), mode=mode), case.run(mode=mode), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("every", "width"), [(20, 16), (50, 32), (500, 64)])
def test_short_episodes_have_short_chunks(every: int, width: int) -> None:
    """Most places of a longer chunk would be empty."""
    reset = torch.arange(1000).expand(2, -1) % every == 1
    assert Packing("here", None, 1000, reset).plan(64).tokens.shape[1] == width


@every_form
@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one(form: str, T: int) -> None:
    reset = resets((0, 0), length=1)[:, :T]
    case = case_of(reset)
    out, state = case.run(reset=reset, **FORMS[form])
    assert_same_results((out, state), cut_there(case, reset), 1e-12)
    assert state.data_ptr() != case.state.data_ptr()


@pytest.mark.parametrize("form", MODES)
def test_results_can_be_changed_in_place_in_training(form: str) -> None:
    reset, *_ = CASES["anywhere"]
    case = case_of(reset).for_gradients()
    expected = gradients([2 * x for x in case.run(reset=reset, **FORMS[form])], case.leaves())
    changed = [x.mul_(2) for x in case.run(reset=reset, **FORMS[form])]
    assert_same_gradients(gradients(changed, case.leaves()), expected, 0.0)


def as_function(case: RetentionCase, **options: object) -> Callable[..., Results]:
    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Results:
        return replace(case, q=q, k=k, v=v, state=state).run(**options)

    return run


@pytest.mark.parametrize("mode", MODES)
def test_transforms(mode: str) -> None:
    """Forward mode, an ensemble, and derivatives of derivatives."""
    reset = resets((0, 2), (1, 5), (1, 17), rows=2, length=18)
    case = case_of(reset)
    values = case.leaves()
    run, reference = (
        as_function(case, reset=reset, **options)
        for options in (mode_options(mode), {"backend": "reference"})
    )
    tangents = tuple(normal(*x.shape, seed=i) for i, x in enumerate(values))
    for a, e in zip(*(torch.func.jvp(f, tuple(values), tangents) for f in (run, reference)), strict=True):
        assert_same_results(a, e, 1e-11)
    members = torch.vmap(run)(*(torch.stack((x, 2 * x)) for x in values))
    assert_same_results(tuple(x[1] for x in members), run(*(2 * x for x in values)), 1e-12)
    leaves = case.for_gradients().leaves()
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_a_graph_break_once_for_all_lengths() -> None:
    log_decay = retpop.retnet_decay(2).double()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor, state: Tensor, reset: Tensor) -> Results:
        return retpop.retention(q, k, v, log_decay, state=state, reset=reset)

    for length in (40, 20, 33):
        reset = resets((0, 7), (2, 19), length=length)
        case = replace(case_of(reset), log_decay=log_decay).for_gradients()
        actual, expected = compiled(*case.leaves(), reset), cut_there(case, reset)
        assert_same_results(actual, expected, 1e-12)
        assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, case.leaves()), 1e-12)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("packed", [False, True])
def test_exported_for_any_length(packed: bool) -> None:
    case = RetentionCase.make(1, 40, 2, 3, 4, dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, reset: Tensor) -> Results:
            cu_seqlens = torch.tensor([0, q.shape[1]]) if packed else None
            return retpop.retention(q, k, v, case.log_decay, reset=reset, cu_seqlens=cu_seqlens)

    length = torch.export.Dim("T", min=2, max=4096)
    dims = {name: {1: length} for name in ("q", "k", "v", "reset")}
    inputs = (case.q, case.k, case.v, resets(rows=1))
    program = torch.export.export(Module(), inputs, dynamic_shapes=dims).module()
    for T in (2, 130):
        other = RetentionCase.make(1, T, 2, 3, 4, dtype=torch.float32, with_state=False)
        reset = resets((0, 1), (0, T // 2), rows=1, length=T)
        actual = program(other.q, other.k, other.v, reset)
        assert_same_results(actual, other.run(reset=reset, backend="reference"), 5e-6)


def test_shapes_on_the_meta_device() -> None:
    case = case_of(resets())
    meta = replace(case, **{name: value.to("meta") for name, value in vars(case).items()})
    out, state = meta.run(reset=resets().to("meta"))
    assert (out.shape, state.shape) == (case.v.shape, case.state.shape)


def test_by_kernels() -> None:
    reset, lengths = resets((0, 0), (0, 3), (0, 17), rows=1, length=20), [8, 0, 12]
    case = case_of(reset, lengths, dtype=torch.float32).for_gradients()
    exact = case.double().for_gradients()
    options = {"reset": reset, "cu_seqlens": bounds(lengths)}
    actual, expected = case.run(backend="triton", **options), exact.run(backend="reference", **options)
    assert_same_results(actual, expected, 5e-6)
    assert_same_gradients(gradients(actual, case.leaves()), gradients(expected, exact.leaves()), 2e-5)


def test_one_token_by_kernels() -> None:
    reset = resets((1, 0), length=1)
    case = case_of(reset, dtype=torch.float32)
    expected = case.double().run(reset=reset, backend="reference")
    assert_same_results(case.run(reset=reset, backend="triton"), expected, 5e-6)

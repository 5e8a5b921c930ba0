"""`backend="triton"` through the public functions, in Triton's interpreter: results, gradients, and refusals.

The kernels' own tests go through shapes and decays; these are about what lies between a user and a kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from retention_cases import (
    MODES,
    PopCase,
    RetentionCase,
    assert_same_gradients,
    assert_same_results,
    float32_products,
    gradients,
    largest_error,
    normal,
)
from torch import Tensor
from torch.autograd import forward_ad

import retpop
from benchmarks.kernel_audit.traffic import audit
from retpop import position
from retpop.ops import triton_backend
from retpop.ops.triton_backend import custom

FLOAT32 = 5e-6
GRADIENTS = 2e-5

TOKENS = ("q", "k", "v", "state")
POP_TOKENS = ("q", "k", "v", "q_pred", "k_pred", "v_pred", "state")


def retention_case(T: int = 20, **options: object) -> RetentionCase:
    return RetentionCase.make(2, T, 3, 4, 6, dtype=torch.float32, **options)


def pop_case(offset: int = 0, **options: object) -> PopCase:
    return PopCase.make(2, 2, 3, 2, 2, 3, 4, 6, offset=offset, dtype=torch.float32, **options)


@pytest.mark.parametrize(("mode", "T"), [*itertools.product(MODES, [1, 20]), ("chunkwise", 0)])
def test_every_mode(mode: str, T: int) -> None:
    case = retention_case(T)
    expected = case.double().run(backend="reference")
    assert_same_results(case.run(mode=mode, backend="triton"), expected, FLOAT32)


def test_without_a_state_and_with_a_scale_of_one_s_own() -> None:
    case = retention_case(with_state=False)
    actual = case.run(scale=0.3, backend="triton")
    assert_same_results(actual, case.double().run(scale=0.3, backend="reference"), FLOAT32)


def test_packed() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 20])
    case = RetentionCase.make(1, 20, 3, 4, 6, dtype=torch.float32, sequences=3)
    actual = case.run(cu_seqlens=cu_seqlens, backend="triton")
    expected = case.double().run(cu_seqlens=cu_seqlens, backend="reference")
    assert_same_results(actual, expected, FLOAT32)


def test_pop() -> None:
    case = pop_case(offset=1, with_reset=True)
    assert_same_results(case.run(backend="triton"), case.double().run(backend="reference"), FLOAT32)


def only(
    case: RetentionCase | PopCase, names: tuple[str, ...]
) -> tuple[RetentionCase | PopCase, list[Tensor]]:
    """The case with fresh leaves that require gradients for the named inputs, and those leaves."""
    leaves = [getattr(case, name).clone().requires_grad_() for name in names]
    return replace(case, **dict(zip(names, leaves, strict=True))), leaves


SUBSETS = [names for size in range(5) for names in itertools.combinations(TOKENS, size)]


@pytest.mark.parametrize(
    ("names", "T"),
    [
        *((names, 5) for names in (*SUBSETS, ("log_decay",))),
        *((names, 1) for names in (("q",), ("k", "state"), (*TOKENS, "log_decay"))),
    ],
)
def test_gradients_of_any_subset(names: tuple[str, ...], T: int) -> None:
    """None of the four to all of them; one token goes through an op of its own."""
    case, leaves = only(retention_case(T), names)
    results = case.run(backend="triton")
    assert all(result.requires_grad == bool(names) for result in results)
    exact, exact_leaves = only(case.double(), names)
    expected = gradients(exact.run(backend="reference"), exact_leaves)
    assert_same_gradients(gradients(results, leaves), expected, GRADIENTS)


@pytest.mark.parametrize(
    "names",
    [
        *SUBSETS,
        *(("q_pred",), ("v_pred",), ("k_pred", "v"), ("k_pred", "v_pred"), ("log_decay",)),
        (*POP_TOKENS, "log_decay"),
    ],
    ids="+".join,
)
def test_gradients_of_pop(names: tuple[str, ...]) -> None:
    case, leaves = only(pop_case(with_reset=True), names)
    exact, exact_leaves = only(case.double(), names)
    expected = gradients(exact.run(backend="reference"), exact_leaves)
    assert_same_gradients(gradients(case.run(backend="triton"), leaves), expected, GRADIENTS)


def test_gradients_of_packed_sequences() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 20])
    made = RetentionCase.make(1, 20, 3, 4, 6, dtype=torch.float32, sequences=3)
    names = (*TOKENS, "log_decay")
    case, leaves = only(made, names)
    exact, exact_leaves = only(made.double(), names)
    expected = gradients(exact.run(cu_seqlens=cu_seqlens, backend="reference"), exact_leaves)
    actual = gradients(case.run(cu_seqlens=cu_seqlens, backend="triton"), leaves)
    assert_same_gradients(actual, expected, GRADIENTS)


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_through_one_of_the_results(used: int) -> None:
    case, leaves = only(retention_case(), TOKENS)
    exact, exact_leaves = only(case.double(), TOKENS)
    actual, expected = case.run(backend="triton")[used], exact.run(backend="reference")[used]
    assert_same_gradients(gradients((actual,), leaves), gradients((expected,), exact_leaves), GRADIENTS)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradients_through_one_of_pop_s_results(used: int) -> None:
    case, leaves = only(pop_case(), POP_TOKENS)
    exact, exact_leaves = only(case.double(), POP_TOKENS)
    actual, expected = case.run(backend="triton")[used], exact.run(backend="reference")[used]
    assert_same_gradients(gradients((actual,), leaves), gradients((expected,), exact_leaves), GRADIENTS)


def test_training_after_inference_mode() -> None:
    case, leaves = only(retention_case(), TOKENS)
    with torch.inference_mode():
        case.run(backend="triton")
    for gradient in gradients(case.run(backend="triton"), leaves):
        assert gradient.any()


def test_repeats_are_bitwise_equal() -> None:
    case = pop_case(with_reset=True)
    for a, b in zip(case.run(backend="triton"), case.run(backend="triton"), strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_tokens_and_nothing_else() -> None:
    """In float16: the interpreter's bfloat16 is not the real one."""
    case, leaves = only(retention_case(), TOKENS)
    with torch.autocast("cpu", dtype=torch.float16):
        out, state = case.run(backend="triton")
        pred = pop_case().run(backend="triton")[1]
        loss = out.float().square().sum() + state.square().sum()
        loss.backward()
    assert (out.dtype, state.dtype, pred.dtype) == (torch.float16, torch.float32, torch.float16)
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 4
    expected = case.double().run(backend="reference")
    assert_same_results((out, state), expected, 2e-3)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f, x: torch.vmap(f)(x.unsqueeze(0)),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("T", [1, 5])
def test_transforms_are_refused(transform: str, T: int) -> None:
    case = retention_case(T)

    def run(q: Tensor) -> Tensor:
        return replace(case, q=q).run(backend="triton")[0]

    with pytest.raises(RuntimeError, match=r'backend="triton".*torch\.func.*backend="torch"'):
        TRANSFORMS[transform](run, case.q)


def test_transforms_of_pop_are_refused() -> None:
    case = pop_case()

    def run(k_pred: Tensor) -> Tensor:
        return replace(case, k_pred=k_pred).run(backend="triton")[1]

    with pytest.raises(RuntimeError, match=r'backend="triton".*torch\.func.*backend="torch"'):
        torch.func.jvp(run, (case.k_pred,), (case.k_pred,))


def test_dual_tensors_are_refused_and_others_pass() -> None:
    case = retention_case(5)
    with forward_ad.dual_level():
        case.run(backend="triton")
        dual = replace(case, v=forward_ad.make_dual(case.v, case.v))
        decay = replace(case, log_decay=forward_ad.make_dual(case.log_decay, torch.ones(3)))
        for wrong in (dual, decay):
            with pytest.raises(RuntimeError, match=r'forward-mode AD.*backend="torch"'):
                wrong.run(backend="triton")


def test_a_compiled_transform_is_refused_too() -> None:
    case = retention_case(5)

    def run(q: Tensor) -> object:
        return torch.func.jvp(lambda q: replace(case, q=q).run(backend="triton")[0], (q,), (q,))

    with pytest.raises(Exception, match=r"transform of torch\.func|Observed exception"):
        torch.compile(run, backend="eager", fullgraph=True)(case.q)


@pytest.mark.parametrize("name", ["retention", "pop"])
def test_a_second_derivative_is_refused(name: str) -> None:
    case, leaves = only(retention_case(5), ("q",)) if name == "retention" else only(pop_case(), ("q",))
    out = case.run(backend="triton")[0]
    (first,) = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r'derivative of a derivative; backend="torch"'):
        torch.autograd.grad(first.sum(), leaves)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_rotation_of_which_one_result_is_used(create_graph: bool) -> None:
    """It keeps the queries' norm, so the first derivative of its square is 2 q, and that one's is 8 q."""
    q, k = (normal(1, 5, 2, 8, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(2))
    frequencies = position.rotary_frequencies("rope", 8)
    rotation = triton_backend.rotation(torch.arange(5)[None], frequencies, "rope", 2)
    rotated, _ = triton_backend.rotate(q, k, rotation, "rope")
    (first,) = torch.autograd.grad(rotated.square().sum(), [q], create_graph=create_graph)
    torch.testing.assert_close(first, 2 * q.detach())
    if create_graph:
        (second,) = torch.autograd.grad(first.square().sum(), [q])
        torch.testing.assert_close(second, 8 * q.detach())


@pytest.mark.parametrize(
    ("word", "on"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False), ("no", False)]
)
def test_the_interpreter_s_switch(word: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert custom.interpreting() is on


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_backward_takes_the_states_that_the_forward_found(precision: str) -> None:
    """Long sequences are split; not if the setting that their tiles come from has changed in between."""
    case = RetentionCase.make(1, 2048, 1, 8, 8, dtype=torch.float16, with_state=False).for_gradients()
    with float32_products("ieee"):
        out, _ = case.run(backend="triton")
    with float32_products(precision), audit() as counts:
        found = torch.autograd.grad(out.sum(), [case.q, case.k, case.v])
    assert ("added_states_kernel" in counts.by_kernel) == (precision == "tf32")
    leaves = case.double().for_gradients()
    results = leaves.run(backend="torch")
    wanted = torch.autograd.grad(results[0].sum(), [leaves.q, leaves.k, leaves.v])
    for actual, expected in zip(found, wanted, strict=True):
        assert largest_error(actual, expected, tokens_dim=1) <= 2e-3


def test_the_backward_of_pop_takes_the_block_states_that_the_forward_found() -> None:
    """The blocks of few rows are split."""
    case = PopCase.make(1, 4, 3, 3, 2, 1, 4, 6, offset=1, dtype=torch.float32, with_reset=True)
    actual, double = case.for_gradients(), case.double().for_gradients()
    results = actual.run(backend="triton")
    with audit() as counts:
        found = gradients(results, actual.leaves())
    assert "added_states_kernel" not in counts.by_kernel
    assert counts.by_kernel["scan_states_kernel"].launches == 1
    assert_same_gradients(found, gradients(double.run(backend="reference"), double.leaves()), 2e-5)


def test_kernels_get_no_view_that_is_still_to_be_negated(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read memory, which holds the numbers before the negation."""
    taken: dict[str, list[Tensor]] = {"retention_fwd": [], "retention_bwd": []}
    for name in taken:
        module = custom.kernels(name)
        launch = getattr(module, name)

        def spy(
            *arguments: object,
            launch: Callable[..., object] = launch,
            given: list[Tensor] = taken[name],
            **options: object,
        ) -> object:
            given.extend(x for x in arguments if isinstance(x, Tensor))
            return launch(*arguments, **options)

        monkeypatch.setattr(module, name, spy)
    case = retention_case(5).for_gradients()
    negated = torch.complex(case.v, case.v).detach().conj().imag
    for v in (negated, case.v):
        out, _ = replace(case, v=v).run(backend="triton")
        torch.autograd.grad(out, case.q, negated)
    # A forward that an earlier test has planned launches what it found then, and calls neither.
    assert all(taken.values())
    assert not any(x.is_neg() for given in taken.values() for x in given)


def test_data_outlive_the_call() -> None:
    """Nothing that was passed in is written to, and what comes out is new."""
    case = pop_case(with_reset=True)
    before = {name: value.clone() for name, value in vars(case).items() if isinstance(value, Tensor)}
    results = case.run(backend="triton")
    for result in results:
        result.zero_()
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value)


def test_a_nan_comes_out() -> None:
    case = retention_case()
    v = case.v.clone()
    v[1, 9, 1, 2] = torch.nan
    out, state = replace(case, v=v).run(backend="triton")
    assert out[1, 9:, 1, 2].isnan().all()
    assert state[1, 1, :, 2].isnan().all()
    assert out[0].isfinite().all()


def test_the_auto_backend_on_a_cpu_is_torch() -> None:
    """Bit for bit, interpreter or not."""
    case = retention_case()
    for a, b in zip(case.run(), case.run(backend="torch"), strict=True):
        assert torch.equal(a, b)
    assert "torch backend" in retpop.explain_backend(case.q)


def test_gradients_have_the_inputs_dtype() -> None:
    case, leaves = only(
        replace(
            retention_case(5),
            **{n: normal(2, 5, 3, 4, seed=1, dtype=torch.float16) for n in "qkv"},
            state=None,
        ),
        ("q", "k", "v"),
    )
    out, state = case.run(backend="triton")
    (out.float().sum() + state.sum()).backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float16] * 3


@pytest.mark.parametrize("name", ["retention", "pop"])
def test_batches_of_gradients_are_refused(name: str) -> None:
    case, leaves = only(retention_case(5), ("q",)) if name == "retention" else only(pop_case(), ("q",))
    out = case.run(backend="triton")[0]
    with pytest.raises(RuntimeError, match=r'batches of gradients; backend="torch"'):
        torch.autograd.grad(out, leaves, out.detach().expand(3, *out.shape), is_grads_batched=True)

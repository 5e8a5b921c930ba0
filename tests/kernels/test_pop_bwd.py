"""`pop_bwd` in Triton's interpreter against float64 autograd of the reference; the choice of its sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from retention_cases import PopCase, largest_error, normal
from torch import Tensor

from benchmarks.kernel_audit.calls import on_architecture
from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import PopConfig
from retpop.kernels.configs_bwd import PopBwdConfig, pop_bwd_config
from retpop.kernels.launch import run as run_launches
from retpop.kernels.pop_bwd import plan_pop_bwd, pop_bwd
from retpop.kernels.pop_fwd import pop_fwd

LIMIT = 2e-5

FLOAT16 = 2**-10
"""Of float16 tokens and a float32 gradient, which is rounded to their dtype, as are scores and results."""

NAMES = ("q", "k", "v", "q_pred", "k_pred", "v_pred", "state")

# One sweep for dk and dv or one for each; all boundaries one after another or each a program of its own.
FORMS = ("both", "each", "both, split", "each, split")
TWO_FORMS = ("both", "each, split")

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def tiles_for(case: PopCase, form: str = "both", tile: int = 16) -> PopBwdConfig:
    """A form with small tiles, so that short cases have several."""
    config = pop_bwd_config(
        pairs=1,
        num_blocks=1,
        lengths=(64, 64),
        head_dims=(case.q.shape[-1], case.v.shape[-1]),
        dtype=torch.float32,
        precision="tf32",
        architecture="sm_90",
        multiprocessors=1,
    )
    both = None if config.both is None or "each" in form else replace(config.both, tile=tile)
    keys, values = (replace(sweep, tile=tile, cols_v=16) for sweep in (config.keys, config.values))
    return PopBwdConfig(both=both, keys=keys, values=values, split="split" in form)


def some_grads(case: PopCase, given: Sequence[bool] = (True, True, True)) -> Grads:
    """Gradients of the outputs, the predictions and the final state, or None where not given."""
    B, _, H, Dk = case.q.shape
    shapes = [case.v.shape, case.v_pred.shape, (B, H, Dk, case.v.shape[-1])]
    out, pred, state = (
        normal(*shape, seed=50 + i, dtype=torch.float32) if there else None
        for i, (shape, there) in enumerate(zip(shapes, given, strict=True))
    )
    return out, pred, state


def arguments(case: PopCase, grads: Grads) -> tuple[object, ...]:
    tokens = (case.q, case.k, case.v, case.q_pred, case.k_pred, case.v_pred)
    numbers = (case.block_size, case.offset, case.q.shape[-1] ** -0.5)
    return *tokens, case.log_decay, case.state, case.reset, *grads, *numbers


def run(
    case: PopCase,
    grads: Grads,
    needs: Sequence[bool] = (True,) * 7,
    config: PopBwdConfig | None = None,
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """`pop_bwd` of a case; it must leave what it reads as it is, and its accesses are audited."""
    given = arguments(case, grads)
    tensors = [x for x in given if isinstance(x, Tensor)]
    before = [x.clone() for x in tensors]
    with audit(outputs=[] if out is None else [x for x in out if x is not None]):
        found = pop_bwd(*given, needs, out=out, config=config)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))
    return found


def expected_gradients(case: PopCase, grads: Grads) -> list[Tensor | None]:
    """By float64 autograd of the reference; None for a state that is not there."""
    double = case.double().for_gradients()
    results = double.run(backend="reference")
    total = sum(((g.double() * r).sum() for g, r in zip(grads, results, strict=True) if g is not None), 0.0)
    leaves = double.leaves()
    found = [None] * len(leaves)
    if isinstance(total, Tensor) and total.requires_grad:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    zeroed = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    return zeroed if case.state is not None else [*zeroed, None]


def assert_gradients(
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    needs: Sequence[bool] = (True,) * 7,
    limit: float = LIMIT,
) -> None:
    for name, actual, wanted, need in zip(NAMES, found, expected, needs, strict=True):
        if not need or wanted is None:
            assert actual is None, f"d{name} was not wanted"
            continue
        assert actual is not None, f"d{name} is missing"
        assert actual.dtype is torch.float32
        tokens_dim = None if name == "state" else 2 if "pred" in name else 1
        error = largest_error(actual, wanted, tokens_dim=tokens_dim)
        assert error <= limit, f"d{name}: error {error:.3g} is above {limit:.3g}"


def check(case: PopCase, given: Sequence[bool] = (True, True, True), form: str = "both") -> None:
    grads = some_grads(case, given)
    found = run(case, grads, config=tiles_for(case, form))
    assert_gradients(found, expected_gradients(case, grads))


def make(N: int, L: int, P: int, M: int, **options: object) -> PopCase:
    sizes = {"B": 1, "H": 2, "Dk": 8, "Dv": 8, "seed": 10 * N + P} | options
    return PopCase.make(N=N, L=L, P=P, M=M, dtype=torch.float32, **sizes)


# ---- shapes ----


@pytest.mark.parametrize(
    ("N", "L", "P", "M", "offset", "forms"),
    [
        (2, 17, 2, 16, 0, FORMS),
        (3, 5, 2, 21, 1, ("both", "each, split")),  # M > L, two tiles
        (2, 1, 3, 1, 0, ("each", "both, split")),  # L = 1, a prediction after the last block
        (1, 33, 1, 7, 1, ("both", "each, split")),
        (2, 9, 0, 4, 0, ("each", "both, split")),
        (0, 9, 1, 34, 0, ("both", "each, split")),  # of three tiles
    ],
)
def test_blocks_and_predictions(N: int, L: int, P: int, M: int, offset: int, forms: Sequence[str]) -> None:
    for form in forms:
        check(make(N, L, P, M, offset=offset, with_reset=N > 1), form=form)


@pytest.mark.parametrize(
    ("Dk", "Dv", "form"), [(24, 60, "both"), (60, 24, "each"), (100, 8, "each"), (8, 100, "each, split")]
)
def test_head_dims(Dk: int, Dv: int, form: str) -> None:
    check(make(2, 18, 2, 5, H=1, Dk=Dk, Dv=Dv), form=form)


@pytest.mark.parametrize("form", TWO_FORMS)
def test_any_decay_with_a_partial_tile(form: str) -> None:
    case = make(1, 20, 2, 19, H=5)
    gammas = torch.tensor([0.0, 0.01, 0.5, 1 - 2**-20, 1.0], dtype=torch.float64)
    check(replace(case, log_decay=gammas.log().float()), form=form)


@pytest.mark.parametrize(
    ("starts", "form"),
    [
        ([1, 0, 0], "both"),
        ([1, 0, 0], "each, split"),
        ([0, 0, 1], "each, split"),
        ([1, 1, 1], "both"),
        ([0, 1, 0], "both"),
    ],
)
def test_a_reset_stops_gradients(starts: list[int], form: str) -> None:
    case = make(3, 5, 4, 3)
    check(replace(case, reset=torch.tensor([starts], dtype=torch.bool)), form=form)


def test_a_reset_stops_a_nan() -> None:
    """What comes after a reset has no gradient in what comes before it, not even a NaN."""
    case = replace(make(2, 5, 2, 4), reset=torch.tensor([[False, True]]))
    grads = some_grads(case)
    clean = expected_gradients(case, grads)
    grads[0][:, 5:] = math.nan
    grads[1][:, 1:] = math.nan
    for form in TWO_FORMS:
        found = run(case, grads, config=tiles_for(case, form))
        for i, tokens in {1: 5, 2: 5, 4: 1, 5: 1}.items():
            assert torch.allclose(found[i][:, :tokens].double(), clean[i][:, :tokens], atol=1e-5)
            assert found[i][:, tokens:].isnan().any()
        assert torch.allclose(found[6].double(), clean[6], atol=1e-5)


def test_a_nan_after_a_prediction_does_not_reach_it() -> None:
    """A prediction leaves no trace: dk and dv of its tokens come from its own outputs only."""
    case = make(2, 5, 2, 4)
    grads = some_grads(case)
    clean = expected_gradients(case, grads)
    grads[0].fill_(math.nan)
    for form in TWO_FORMS:
        found = run(case, grads, config=tiles_for(case, form))
        assert all(torch.allclose(found[i].double(), clean[i], atol=1e-5) for i in (3, 4, 5))


# ---- what is given and what is wanted ----


@pytest.mark.parametrize("given", [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
def test_undefined_gradients(given: tuple[int, int, int]) -> None:
    form = TWO_FORMS[sum(given) % 2]
    check(make(2, 5, 2, 4, offset=1, H=1), given=[bool(x) for x in given], form=form)


@pytest.mark.parametrize("form", TWO_FORMS)
def test_every_subset_that_tells_apart(form: str) -> None:
    case = make(2, 5, 2, 4, H=1)
    grads = some_grads(case)
    expected = expected_gradients(case, grads)
    subsets = [{name} for name in NAMES] + [
        {"q", "state"},
        {"k", "v"},
        {"k_pred", "v"},
        {"k_pred", "v_pred"},
        {"q_pred", "k", "v_pred"},
        {"v", "state"},
        set(),
    ]
    for subset in subsets:
        needs = [name in subset for name in NAMES]
        found = run(case, grads, needs=needs, config=tiles_for(case, form))
        assert_gradients(found, expected, needs)


def test_nothing_is_launched_for_nothing() -> None:
    case = make(2, 5, 2, 4)
    nothing_for = [
        ((0, 0, 0), NAMES),
        ((1, 1, 1), ()),
        ((0, 0, 1), ("q", "q_pred")),
        ((1, 0, 0), ("q_pred", "k_pred")),
    ]
    for given, subset in nothing_for:
        grads = some_grads(case, [bool(x) for x in given])
        launches, found = plan_pop_bwd(*arguments(case, grads), [name in subset for name in NAMES])
        assert launches == []
        assert all(not x.any() for x in found if x is not None)


@pytest.mark.parametrize("B", [0, 1])
@pytest.mark.parametrize("with_state", [True, False])
def test_no_tokens(B: int, with_state: bool) -> None:
    """The gradient of a state that nothing follows is that of the final state, in memory of its own."""
    case = make(0, 3, 0, 4, B=B, with_state=with_state)
    for given in (True, False):
        grads = some_grads(case, (True, True, given))
        found = run(case, grads)
        assert [None if x is None else x.numel() for x in found[:6]] == [0] * 6
        if with_state:
            assert torch.equal(found[6], grads[2] if given else torch.zeros(B, 2, 8, 8))
            assert not given or B == 0 or found[6].data_ptr() != grads[2].data_ptr()
        else:
            assert found[6] is None


@pytest.mark.parametrize("given", [(True, True, True), (True, False, True), (False, True, False)])
def test_states_that_the_forward_found_are_not_found_again(given: Sequence[bool]) -> None:
    """Also those of a boundary after the last block, which gradients of blocks alone do not have."""
    case = make(2, 18, 3, 5, Dk=8, Dv=24, with_reset=True)
    forward = PopConfig(tile=16, cols_v=16, num_warps=4, num_stages=2, steps=True, split=True)
    *inputs, _, _, _, L, offset, scale = arguments(case, (None, None, None))
    *_, states = pop_fwd(*inputs, L, offset, scale, with_states=True, config=forward)
    assert states.shape == (1, 3, 2, 8, 24)
    grads = some_grads(case, given)
    config = tiles_for(case, "both")
    launches, found = plan_pop_bwd(*arguments(case, grads), (True,) * 7, states=states, config=config)
    assert [launch.kernel.__name__ for launch in launches][1:] == ["pop_bwd_kernel"]
    with audit():
        run_launches(launches, case.q.device)
    assert_gradients(found, expected_gradients(case, grads))


def test_a_forward_in_one_pass_has_no_states_to_keep() -> None:
    for N in (0, 2):
        *inputs, _, _, _, L, offset, scale = arguments(make(N, 5, 1, 4), (None, None, None))
        assert pop_fwd(*inputs, L, offset, scale, with_states=True)[3] is None


# ---- memory ----


def layouts(case: PopCase) -> dict[str, PopCase]:
    """The same numbers, or some of them repeated, in other strides."""
    tokens = ("q", "k", "v", "q_pred", "k_pred", "v_pred")
    swapped = {name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in tokens}
    by_column = {name: getattr(case, name).mT.contiguous().mT for name in tokens}
    heads = {name: getattr(case, name)[..., :1, :].expand_as(getattr(case, name)) for name in ("k", "v_pred")}
    return {
        "time first": replace(case, **swapped),
        "last dim strided": replace(case, **by_column, state=case.state.mT.contiguous().mT),
        "heads expanded": replace(case, **heads),
        "state expanded": replace(case, state=case.state[:, :1].expand_as(case.state)),
        "reset strided": replace(case, reset=case.reset.mT.contiguous().mT),
        "decay expanded": replace(case, log_decay=case.log_decay[:1].expand_as(case.log_decay)),
    }


@pytest.mark.parametrize(
    "layout",
    ["time first", "last dim strided", "heads expanded", "state expanded", "reset strided", "decay expanded"],
)
def test_strides(layout: str) -> None:
    check(layouts(make(2, 5, 2, 4, B=2, with_reset=True))[layout])


def test_expanded_gradients() -> None:
    """The gradient of a sum is one number in no memory of its own."""
    case = make(2, 5, 2, 4)
    out, pred, state = some_grads(case)
    grads = (out[:1, :1, :1, :1].expand_as(out), pred[..., :1].expand_as(pred), state.mT.contiguous().mT)
    for form in TWO_FORMS:
        assert_gradients(run(case, grads, config=tiles_for(case, form)), expected_gradients(case, grads))


@pytest.mark.parametrize("form", TWO_FORMS)
def test_packed_rows(form: str) -> None:
    """Main and prediction tokens, and q, k and v, are views of one tensor, and so are the gradients."""
    plain = make(3, 5, 2, 4, B=2, offset=1, with_reset=True)
    length, size = plain.q.shape[1], plain.q_pred.shape[1:3]

    def split(row: Tensor) -> tuple[Tensor, Tensor]:
        return row[:, :length], row[:, length:].unflatten(1, size)

    def joined(main: Tensor, pred: Tensor) -> Tensor:
        return torch.cat((main, pred.flatten(1, 2)), dim=1)

    rows = torch.stack([joined(getattr(plain, x), getattr(plain, f"{x}_pred")) for x in "qkv"], dim=2)
    views = {x: split(row) for x, row in zip("qkv", rows.unbind(2), strict=True)}
    main, twins = ({f"{x}{twin}": views[x][i] for x in "qkv"} for i, twin in enumerate(("", "_pred")))
    case = replace(plain, **main, **twins)
    out, pred, state = some_grads(plain)
    grads = (*split(joined(out, pred)), state)
    found_rows = torch.empty_like(rows)
    parts = [split(row) for row in found_rows.unbind(2)]
    into = [main for main, _ in parts] + [pred for _, pred in parts]
    found = run(case, grads, config=tiles_for(case, form), out=into)
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(found, into, strict=False))
    assert_gradients(found, expected_gradients(plain, (out, pred, state)))


# ---- dtypes ----


@pytest.mark.parametrize("form", FORMS)
def test_gradients_too_small_for_float16_of_outputs_too_large(form: str) -> None:
    """Outputs of large states, kept in float32, have gradients of which float16 holds a few bits."""
    case = make(2, 21, 2, 18, Dk=16, Dv=24)
    tokens = {name: 30 * getattr(case, name).half() for name in NAMES[:6]}
    case = replace(case, **tokens, state=case.state * 1e5)
    grads = [1e-6 * grad for grad in some_grads(case)]
    found = run(case, grads, config=tiles_for(case, form))
    assert [x.dtype for x in found] == [torch.float16] * 6 + [torch.float32]
    assert_gradients([x.float() for x in found], expected_gradients(case, grads), limit=FLOAT16)


@pytest.mark.parametrize("given", [(True, False, True), (False, True, False), (False, False, True)])
def test_a_gradient_in_float32_of_float16_tokens_alone(given: Sequence[bool]) -> None:
    """What is not given is zero in the dtype of what is."""
    case = make(2, 5, 2, 4, Dk=16, Dv=16)
    case = replace(case, **{name: getattr(case, name).half() for name in NAMES[:6]})
    grads = some_grads(case, given)
    found = [x.float() for x in run(case, grads)]
    assert_gradients(found, expected_gradients(case, grads), limit=FLOAT16)


# ---- configs, traffic ----


def test_default_configs_compute_the_same() -> None:
    """As an H200 would be used: wide slices, tiles as long as the blocks."""
    case = make(2, 33, 2, 20, Dk=24, Dv=16)
    grads = some_grads(case)
    assert_gradients(run(case, grads), expected_gradients(case, grads))


def chosen(pairs: int = 256, num_blocks: int = 10, **changes: object) -> PopBwdConfig:
    given = {"lengths": (65, 64), "head_dims": (64, 64), "dtype": torch.bfloat16, "precision": "ieee"}
    return pop_bwd_config(
        **{**given, "architecture": "sm_90", "multiprocessors": 132, **changes},
        pairs=pairs,
        num_blocks=num_blocks,
    )


def test_sweeps_are_chosen_by_head_dims_and_dtype() -> None:
    assert chosen().both is not None
    assert chosen(head_dims=(24, 60)).both.cols_v == 64
    assert chosen(head_dims=(64, 129)).both is chosen(head_dims=(256, 16)).both is None
    assert chosen(dtype=torch.float32).both is None
    assert chosen(dtype=torch.float32, precision="tf32").both is not None
    assert chosen(lengths=(10, 9)).both.tile == 16
    assert (chosen().both.num_warps, chosen(lengths=(65, 130)).both.num_warps) == (4, 8)
    keys, values = chosen(head_dims=(128, 24)).keys, chosen(head_dims=(128, 24)).values
    assert (keys.cols_v, values.cols_v) == (64, 32)
    with pytest.raises(ValueError, match=r"pop_bwd\(\): \(Dk, Dv\) is \(16, 300\)"):
        chosen(head_dims=(16, 300))


def test_only_what_leaves_half_of_the_gpu_idle_is_split() -> None:
    assert [chosen(pairs=pairs).split for pairs in (66, 67)] == [True, False]
    assert [chosen(pairs=1, num_blocks=blocks).split for blocks in (3, 4)] == [False, True]
    # Narrow slices come first: 4 of 32 columns for each pair.
    assert [chosen(pairs=pairs, head_dims=(128, 128)).split for pairs in (16, 17)] == [True, False]


def test_a_whole_state_of_128_columns_is_swept_at_once() -> None:
    """On sm_90, where programs with an SM each keep 0.6 of 132 busy, and two tiles hold a prediction."""
    config = chosen(head_dims=(100, 128))
    assert (config.both.cols_v, config.queries.cols_v) == (128, 128)
    assert chosen(head_dims=(64, 65)).queries.cols_v == 64
    whole = [chosen(pairs=pairs, head_dims=(128, 128)).both is not None for pairs in (7, 8, 17, 79, 80, 141)]
    assert whole == [False, True, False, False, True, False]  # up to 16 pairs each block is a program
    assert chosen(pairs=16, head_dims=(128, 128)).queries.split
    for changes in ({"lengths": (65, 65)}, {"architecture": "sm_80"}, {"dtype": torch.float32}):
        assert chosen(head_dims=(128, 128), **changes).both is None


@pytest.mark.parametrize("split", [False, True])
def test_a_whole_state_of_128_columns(split: bool) -> None:
    """A prediction of 40 tokens, in two tiles, and of float16 with a float32 gradient."""
    case = make(2, 18, 2, 40, H=1, Dk=100, Dv=24, offset=1, with_reset=True)
    case = replace(case, **{name: getattr(case, name).half() for name in NAMES[:6]})
    grads = some_grads(case)
    config = chosen(head_dims=(100, 24), lengths=(18, 40))
    assert config.both.tile == 32
    config = replace(config, split=split, queries=replace(config.queries, split=split))
    found = run(case, grads, config=config)
    assert_gradients([x.float() for x in found], expected_gradients(case, grads), limit=FLOAT16)


@pytest.mark.parametrize(
    ("dtype", "units", "D"),
    [(torch.bfloat16, 10, 64), (torch.float32, 12, 64), (torch.bfloat16, 10, 128), (torch.bfloat16, 30, 256)],
)
def test_traffic(dtype: torch.dtype, units: int, D: int) -> None:
    """In tensors of all tokens: 4 for dq, and 6 for dk and dv at once or 8 one by one; 7 have to move."""
    case = make(1, 65, 1, 64, H=1, Dk=D, Dv=D, with_state=False)
    tokens = [x.to(dtype) for x in (case.q, case.k, case.v, case.q_pred, case.k_pred, case.v_pred)]
    given = arguments(case, (tokens[2], tokens[5], None))[6:]
    with on_architecture("sm_90", "pop_bwd", fraction=1 / 132), audit() as counts:
        pop_bwd(*tokens, *given, [True] * 7)
    expected = units * (65 + 64) * D * dtype.itemsize
    assert expected <= counts.bytes <= 1.01 * expected


@pytest.mark.parametrize("form", ["both", "each", "each, split"])
def test_what_is_not_needed_is_not_moved(form: str) -> None:
    """Bytes in tensors of main and of prediction tokens, both 32 of 16 features here; states aside."""
    case = make(2, 16, 2, 16, H=1, Dk=16, Dv=16, with_state=False)
    grads = some_grads(case, (True, True, False))
    split = "split" in form
    for subset, tensors, states in (
        ({"q"}, 4, 0),
        ({"q_pred"}, 4 + 2, 0),  # g, v, k and dq, and the blocks' k and v, which make the states
        ({"k_pred"}, 4, 0),  # nothing of the blocks
        ({"k_pred", "v_pred"}, 6 if form == "both" else 8, 0),
        ({"k"}, 4 + 2 + 4 * split, 3.5 * split),  # v, q, g and dk, and the predictions' q and g, which make E
        ({"k", "v_pred"}, (8 if form == "both" else 12) + 4 * split, 4.5 * split),
    ):
        needs = [name in subset for name in NAMES]
        with audit() as counts:
            pop_bwd(*arguments(case, grads), needs, config=tiles_for(case, form))
        expected = 4 * 32 * 16 * tensors + 4 * 2 * 16 * 16 * states
        assert expected <= counts.bytes < expected + 64, (subset, counts.bytes, expected)


# ---- the longer matrix ----


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("Dk", "Dv"), [(24, 60), (60, 100), (128, 16), (16, 256)])
@pytest.mark.parametrize(
    ("N", "L", "P", "M", "offset"), [(3, 65, 3, 64, 0), (3, 37, 2, 70, 1), (2, 1, 1, 33, 2), (4, 16, 4, 1, 1)]
)
def test_matrix(N: int, L: int, P: int, M: int, offset: int, Dk: int, Dv: int, form: str) -> None:
    case = make(N, L, P, M, offset=offset, Dk=Dk, Dv=Dv, with_reset=True)
    grads = some_grads(case)
    found = run(case, grads, config=tiles_for(case, form, tile=32))
    assert_gradients(found, expected_gradients(case, grads))


@pytest.mark.slow
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_every_tile(tile: int) -> None:
    case = make(2, 65, 2, 70, Dk=24, Dv=40, with_reset=True)
    grads = some_grads(case)
    expected = expected_gradients(case, grads)
    for form in FORMS:
        for scale_v in (False, True):
            config = tiles_for(case, form, tile)
            keys, values = (replace(x, scale_v=scale_v) for x in (config.keys, config.values))
            both = None if config.both is None else replace(config.both, scale_v=scale_v)
            config = replace(config, both=both, keys=keys, values=values)
            assert_gradients(run(case, grads, config=config), expected)

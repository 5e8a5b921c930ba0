"""A wrong contender gets no ratio: outputs, states and gradients are checked in the run that times them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import retpop
from benchmarks import decoder, pop, retention, runner
from benchmarks.checks import Checker, largest_error
from benchmarks.measurements import Measurement, RefusedError, print_measurements, ratio
from benchmarks.timing import QUICK
from benchmarks.work import BOTH, FORWARD, UPDATE, Contender, Group, Problem, Work

CPU = torch.device("cpu")

SIZES = retention.Sizes(B=2, T=70, H=2, D=8)

Spoil = Callable[[Tensor], Tensor]


def spoiled(problem: Problem, *, spoil: Spoil) -> Work:
    """Ours with another output; its gradient is that of what it computes."""
    work = retention.by_us(problem, backend="torch")

    def run() -> tuple[Tensor, Tensor]:
        out, state = work.run()
        return spoil(out), state

    return replace(work, run=run)


def last_token_of_a_head(out: Tensor) -> Tensor:
    keep = torch.ones_like(out)
    keep[:, -1, 1] = 0
    return keep * out


class HalfGradient(torch.autograd.Function):
    """The identity, with a wrong gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 0.5 * grad


WRONG = {
    "a little off": lambda out: out * (1 + 1e-4),
    "one token of a head": last_token_of_a_head,
    "NaN": lambda out: out.clone().index_fill(1, torch.tensor([3]), torch.nan),
}


def verdicts(make: Callable[[Problem], Work], dtype: torch.dtype = torch.float32) -> dict[str, bool]:
    problem = retention.problem(SIZES, dtype, CPU)
    contender = Contender(make=make, reference=retention.reference, states=1)
    found = Checker(problem, graded=True).check(contender, make(problem), [FORWARD, BOTH])
    return {name: verdict.right for name, verdict in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_is_right(dtype: torch.dtype) -> None:
    assert verdicts(partial(retention.by_us, backend="torch"), dtype) == {FORWARD: True, BOTH: True}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_wrong_output_is_wrong(spoil: Spoil) -> None:
    assert verdicts(partial(spoiled, spoil=spoil)) == {FORWARD: False, BOTH: False}


def test_a_wrong_gradient_is_wrong_in_training() -> None:
    assert verdicts(partial(spoiled, spoil=HalfGradient.apply)) == {FORWARD: True, BOTH: False}


def test_a_wrong_state_is_wrong() -> None:
    def make(problem: Problem) -> Work:
        work = retention.by_us(problem, backend="torch")
        return replace(work, run=lambda: [x * (1 + 1e-3 * i) for i, x in enumerate(work.run())])

    assert not verdicts(make)[FORWARD]


def test_an_error_is_that_of_the_worst_piece() -> None:
    expected = torch.ones(1, 640, 2, 4, dtype=torch.float64)
    actual = expected.clone()
    actual[:, 630:, 1] += 0.1  # 10 of the last 64 tokens of a head
    assert largest_error(actual, expected, -3) == pytest.approx(0.1 * (10 / 64) ** 0.5)
    assert largest_error(expected, expected, -3) == 0
    with pytest.raises(ValueError, match=r"\(1, 639, 2, 4\) cannot be compared"):
        largest_error(actual[:, 1:], expected, -3)


def group(make: Callable[[Problem], Work]) -> Group:
    """Ours beside a rival."""
    right = Contender(make=partial(retention.by_us, backend="torch"), reference=retention.reference, states=1)
    return Group(
        op="retention",
        shape="test",
        mode="chunkwise",
        dtype="float32",
        passes=(FORWARD, BOTH),
        problem=partial(retention.problem, SIZES, torch.float32),
        contenders={"torch": right, "rival": replace(right, make=make)},
    )


def measured(group: Group) -> list[Measurement]:
    return [row for rows in runner.measure(group, CPU, QUICK) for row in rows]


def test_no_ratio_for_a_wrong_backend(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(group(partial(spoiled, spoil=WRONG["a little off"])))
    by_name = {(r.backend, r.direction): r for r in rows}
    assert by_name["rival", FORWARD].samples  # it was timed all the same
    for sides in (("rival", "torch"), ("torch", "rival")):
        with pytest.raises(RefusedError, match=r"rival is wrong: output .* of 5\.0e-06"):
            ratio(*(by_name[side, FORWARD] for side in sides))
    print_measurements(rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rival")]
    assert len(lines) == 2
    assert all("refused: rival is wrong" in line and "x (" not in line for line in lines)


def test_no_ratio_to_ourselves_when_we_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    right = group(partial(retention.by_us, backend="torch"))
    wrong = right.contenders["torch"]
    wrong = replace(wrong, make=partial(spoiled, spoil=WRONG["a little off"]))
    rows = measured(replace(right, contenders={**right.contenders, "torch": wrong}))
    print_measurements(rows)
    shown = capsys.readouterr().out
    assert "refused: torch is wrong" in shown
    assert "x (" not in shown


def test_a_contender_that_raises_costs_itself_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(problem: Problem) -> Work:
        raise RuntimeError("no such kernel\nat all")

    rows = measured(group(broken))
    assert [(r.backend, r.verdict) for r in rows if r.direction == BOTH] == [
        ("torch", "right"),
        ("rival", "failed"),
    ]
    assert rows[-1].note == "RuntimeError: no such kernel"
    print_measurements(rows)
    assert "refused: rival is failed" in capsys.readouterr().out


TINY = list(runner.Selection(tiny=True, dtypes=["float32"]).groups())


@pytest.mark.parametrize("tiny", TINY, ids=lambda g: f"{g.op}-{g.mode}-{g.size}")
def test_every_contender_computes_what_its_reference_does(tiny: Group) -> None:
    """Of every operation, in float32, at tiny shapes."""
    problem = tiny.problem(CPU)
    checker = Checker(problem, graded=True)
    for name, contender in tiny.contenders.items():
        if name == "compile":  # takes a minute: test_what_is_compiled_is_right
            continue
        found = checker.check(contender, contender.make(problem), tiny.passes)
        assert all(verdict.right for verdict in found.values()), (name, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiny", [g for g in TINY if "compile" in g.contenders], ids=lambda g: f"{g.op}-{g.mode}"
)
def test_what_is_compiled_is_right(tiny: Group, fresh_compiler: None) -> None:
    problem, compiled = tiny.problem(CPU), tiny.contenders["compile"]
    found = Checker(problem, graded=True).check(compiled, compiled.make(problem), tiny.passes)
    assert all(verdict.right for verdict in found.values()), found


def test_a_model_in_bfloat16_may_err_as_its_definition_does() -> None:
    groups = runner.Selection(tiny=True, ops=["decoder"], modes=["pop"], dtypes=["bfloat16"]).groups()
    tiny = next(groups)
    problem = tiny.problem(CPU)
    checker = Checker(problem, graded=True)
    ours = tiny.contenders["torch"]
    work = ours.make(problem)
    assert all(verdict.right for verdict in checker.check(ours, work, tiny.passes).values())
    off = replace(work, run=lambda: [x * 1.05 for x in work.run()])
    assert not checker.check(ours, off, tiny.passes)[FORWARD].right


def test_a_training_step_updates_every_matrix() -> None:
    problem = decoder.problem(decoder.SHAPES["tiny"], torch.float32, CPU)
    work = decoder.by_us(problem, mode="pop", backend="torch")
    before = [x.clone() for x in work.weights]
    passes = work.passes((BOTH, UPDATE))
    assert passes[UPDATE].flops == passes[BOTH].flops
    passes[UPDATE].run()
    matrices = [(x, y) for x, y in zip(before, work.weights, strict=True) if x.dim() > 1]
    assert matrices
    assert all(y.isfinite().all() and not torch.equal(x, y) for x, y in matrices)


def test_yet_another_retnet_is_wrong_in_bfloat16() -> None:
    """Its decays are made in the queries' dtype: 1 - 1/512 is 1 there."""
    sizes = retention.Sizes(B=1, T=1024, H=4, D=16)
    problem = retention.problem(sizes, torch.bfloat16, CPU)
    group = retention.group("test", sizes, "parallel", "bfloat16", FORWARD)
    contender = group.contenders["yet-another-retnet"]
    found = Checker(problem, graded=False).check(contender, contender.make(problem), [FORWARD])
    assert found[FORWARD].error > 3


def test_flash_linear_attentions_composition_is_pop() -> None:
    """With a stand-in for its function, which no CPU has: the same retention by ours."""
    from benchmarks.peers.flash_linear_attention import compose_pop

    log_decay = retpop.log_spaced_decay(2)

    def chunk_retention(
        q: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor, output_final_state: bool
    ) -> tuple[Tensor, Tensor]:
        return retpop.retention(q, k, v, log_decay, state=initial_state)

    for offset in (0, 1):
        problem = pop.problem(replace(pop.SHAPES["tiny"], offset=offset), torch.float32, CPU)
        make = partial(pop.composed, call=partial(compose_pop, chunk_retention))
        contender = Contender(make=make, reference=pop.reference)
        found = Checker(problem, graded=True).check(contender, make(problem), [FORWARD])
        assert found[FORWARD].right, found

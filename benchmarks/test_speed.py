"""Our own times for pytest-benchmark, which stores them and reports regressions: `make bench`.

    make bench ARGS=--benchmark-autosave
    make bench ARGS='--benchmark-compare --benchmark-compare-fail=median:20%'

The groups are those of `python -m benchmarks run`, which measures them beside others.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.checks import Checker
from benchmarks.runner import Selection
from benchmarks.work import BOTH, Group

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SHAPES = ("rem_train", "rem_imagine", "rem_8", "position")

CASES = [
    pytest.param(group, direction, id=f"{group.op}-{group.mode}-{group.shape}-{group.size}-{direction}")
    for group in Selection(shapes=SHAPES, dtypes=["float32"], backends=["torch"]).groups()
    if group.size <= 1024
    for direction in group.passes
]


@pytest.mark.parametrize(("group", "direction"), CASES)
def test_speed(benchmark: BenchmarkFixture, group: Group, direction: str) -> None:
    torch.manual_seed(0)
    problem = group.problem(DEVICE)
    contender = group.contenders["torch"]
    work = contender.make(problem)
    verdict = Checker(problem, graded=direction == BOTH).check(contender, work, [direction])[direction]
    assert verdict.right, verdict.what
    run = work.passes()[direction].run

    def run_to_the_end() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    what = f"{group.op}, {group.mode}, {group.shape}, {direction}"
    benchmark.group = f"{what}, {DEVICE.type}, {torch.get_num_threads()} threads"
    benchmark.pedantic(run_to_the_end, rounds=5, warmup_rounds=1)

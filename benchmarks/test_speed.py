"""Our own times for pytest-benchmark, which keeps them and tells regressions: `make bench`.

    make bench ARGS=--benchmark-autosave
    make bench ARGS='--benchmark-compare --benchmark-compare-fail=median:20%'

The groups are those of `python -m benchmarks run`, which measures them beside others.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.checks import Checker
from benchmarks.runner import Selection
from benchmarks.work import BOTH, Group

SHAPES = ("rem_train", "rem_imagine", "rem_8", "position")

CASES = [
    pytest.param(group, direction, id=f"{group.op}-{group.mode}-{group.shape}-{group.size}-{direction}")
    for group in Selection(shapes=SHAPES, dtypes=["float32"], backends=["torch"]).groups(torch.device("cpu"))
    if group.size <= 1024
    for direction in group.passes
]


@pytest.mark.parametrize(("group", "direction"), CASES)
def test_speed(
    timed: Callable[[str, Callable[[], object]], None], device: torch.device, group: Group, direction: str
) -> None:
    problem = group.problem(device)
    contender = group.contenders["torch"]
    work = contender.make(problem)
    verdict = Checker(problem, graded=direction == BOTH).check(contender, work, [direction])[direction]
    assert verdict.right, verdict.what
    timed(f"{group.op}, {group.mode}, {group.shape}, {direction}", work.passes()[direction].run)

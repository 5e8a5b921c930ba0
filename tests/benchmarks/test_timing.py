"""Samples are as long as they should be, also of runs that are slow at first."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.timing import Effort, Run, in_turn, sampler

CPU = torch.device("cpu")


def samples_of(runs: dict[str, Run], effort: Effort) -> dict[str, list[float]]:
    return in_turn({name: sampler(run, CPU, effort) for name, run in runs.items()}, effort)


class Runs:
    """Runs on a clock of their own: some slow ones, then quick ones."""

    def __init__(self, *, slow: int, first: float, then: float) -> None:
        self.slow, self.first, self.then = slow, first, then
        self.count, self.now = 0, 0.0

    def __call__(self) -> None:
        self.count += 1
        self.now += self.first if self.count <= self.slow else self.then

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("slow", [0, 1, 5])
def test_a_slow_start_does_not_shorten_the_samples(slow: int) -> None:
    runs = Runs(slow=slow, first=1e-3, then=1e-5)
    effort = Effort(rounds=4, sample_seconds=0.02, group_seconds=10.0, clock=runs.clock)
    samples = samples_of({"it": runs}, effort)["it"]
    assert samples == pytest.approx([1e-5] * 4)
    before = runs.count
    assert runs.now == pytest.approx(slow * 1e-3 + (before - slow) * 1e-5)
    assert before > 4 * 1_600  # samples of 2,000 runs; the estimate is rough where some of it was slow


def test_a_long_run_is_sampled_singly_and_after_itself() -> None:
    runs = Runs(slow=0, first=0.0, then=1.5)
    effort = Effort(rounds=3, sample_seconds=0.02, group_seconds=100.0, clock=runs.clock)
    assert samples_of({"it": runs}, effort)["it"] == pytest.approx([1.5] * 3)
    assert runs.count == 1 + 2 * 3


def test_what_a_neighbour_leaves_behind_is_not_timed() -> None:
    """Runs that take twice as long after another's are sampled as in a loop of their own."""
    now, last = 0.0, ""

    def run(name: str) -> None:
        nonlocal now, last
        now += 1.0 if last == name else 2.0
        last = name

    effort = Effort(rounds=4, group_seconds=100.0, clock=lambda: now)
    samples = samples_of({name: partial(run, name) for name in "ab"}, effort)
    assert samples == {"a": [1.0] * 4, "b": [1.0] * 4}

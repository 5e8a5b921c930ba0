"""Times taken in turn, the rate of matrix products among them, and the memory of a call."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.work import Run

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, asked for memory, is not to chat

RATE = "matrix rate"
"""Name of the matrix product among the runs of a group."""

SIDES = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices whose product is the matrix rate."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: samples of each run, at most.
        least: samples of each run, whatever they take.
        sample_seconds: a sample repeats its run until it takes about so long.
        group_seconds: no round is begun after so long.
        side: of the matrices of the matrix rate; None: as `SIDES` has it.
        clock: seconds of the wall, or those that the process computed: with one thread they are the same on
            a quiet machine, and on a busy one only the second are of use.
    """

    rounds: int = 7
    least: int = 3
    sample_seconds: float = 0.02
    group_seconds: float = 4.0
    side: int | None = None
    clock: Callable[[], float] = time.perf_counter


LONG = 0.2
"""Seconds from which one run warms up for long enough."""

QUICK = Effort(rounds=2, least=2, sample_seconds=0.0, group_seconds=0.0, side=64)


def interleaved(runs: Mapping[str, Run], device: torch.device, effort: Effort) -> dict[str, list[float]]:
    """Seconds of every run, sample by sample: all first ones, then all second ones, and so on.

    A slow moment of the machine then slows all sides of a ratio. Every second round goes backwards, so that
    nobody always follows the same neighbour. Each run is warmed up before. One that is a sample by itself is
    warmed up before every sample, as in a loop that makes nothing else: the state that others leave malloc in
    would cost it page faults, up to a fifth of a training pass.
    """
    repeats = {name: _repeats(run, device, effort) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    started = effort.clock()
    with _without_collection():
        for number in range(effort.rounds):
            if number >= effort.least and effort.clock() - started > effort.group_seconds:
                break
            for name in reversed(runs) if number % 2 else runs:
                if repeats[name] == 1:
                    runs[name]()
                samples[name].append(_sample(runs[name], repeats[name], device, effort.clock))
    return samples


def matrix_product(dtype: torch.dtype, device: torch.device, effort: Effort) -> tuple[Run, int]:
    """A product of square matrices of random numbers, and its operations."""
    side = effort.side or SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def peak_bytes(run: Run, device: torch.device) -> int:
    """Bytes that PyTorch holds at most during a run, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _repeats(run: Run, device: torch.device, effort: Effort) -> int:
    """How many runs make a sample; finding out warms them up.

    More and more of them are timed: one run after another's, with nothing of its own in a cache, may take ten
    times as long as the next hundred.
    """
    once = _sample(run, 1, device, effort.clock)
    if once >= LONG:
        return 1
    repeats = 1
    while True:
        once = _sample(run, repeats, device, effort.clock)
        wanted = max(1, round(effort.sample_seconds / max(once, 1e-7)))
        if wanted <= 2 * repeats:
            return wanted
        repeats = min(wanted, 8 * repeats)


def _sample(run: Run, repeats: int, device: torch.device, clock: Callable[[], float]) -> float:
    _wait(device)
    started = clock()
    for _ in range(repeats):
        run()
    _wait(device)
    return (clock() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Python's garbage collection waits until the times are taken."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

"""Times taken in turn, on the device's own clock, and the memory of a call."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler prints no banner

Run = Callable[[], object]
Sampler = Callable[[], float]
"""Takes a sample: the seconds of one run."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: samples of each run, at most.
        least: samples of each run, however long they take.
        sample_seconds: a sample repeats its run for about so long; 0: it is one run, with nothing before it.
        group_seconds: no round begins after so long.
        side: of the matrices of the matrix rate; None: as `floors.SIDES` has it.
        clock: of a CPU: `time.perf_counter`, or `time.process_time` for one thread on a busy machine. On a
            GPU its own events tell the time.
    """

    rounds: int = 7
    least: int = 3
    sample_seconds: float = 0.02
    group_seconds: float = 4.0
    side: int | None = None
    clock: Callable[[], float] = time.perf_counter


QUICK = Effort(rounds=2, least=2, sample_seconds=0.0, group_seconds=0.0, side=64)
REHEARSAL = Effort(rounds=1, least=1, sample_seconds=0.0, group_seconds=0.0, side=64)

LONG = 0.2
"""Seconds of a run that is long enough as a warm-up."""


def sampler(run: Run, device: torch.device, effort: Effort) -> Sampler:
    """Takes samples of a run that has warmed up.

    On a GPU a sample is `triton.testing.do_bench`'s median, with the L2 cache cleared before each run. On a
    CPU it is the mean of as many runs as make a sample. A run that is a sample by itself runs once untimed
    before each: the memory that other runs leave to malloc would cost it page faults, up to a fifth of a
    training pass.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        run()
        torch.cuda.synchronize(device)
        milliseconds = 1e3 * effort.sample_seconds
        return lambda: 1e-3 * do_bench(run, warmup=milliseconds / 4, rep=milliseconds, return_mode="median")
    repeats = _repeats(run, effort)

    def sample() -> float:
        if repeats == 1 and effort.sample_seconds:
            run()
        return _mean(run, repeats, effort.clock)

    return sample


def in_turn(samplers: Mapping[str, Sampler], effort: Effort) -> dict[str, list[float]]:
    """Samples by name: the first of each, then the second of each, and so on.

    A slow moment of the machine then slows all sides of a ratio. Every second round goes backwards, so that
    no run always follows the same neighbour.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    started = effort.clock()
    with _without_collection():
        for number in range(effort.rounds):
            if number >= effort.least and effort.clock() - started > effort.group_seconds:
                break
            for name in reversed(samplers) if number % 2 else samplers:
                samples[name].append(samplers[name]())
    return samples


def in_graph(run: Run, device: torch.device) -> Run:
    """Replays a CUDA graph of ``run``: the GPU's share of its time. On a CPU, for rehearsals, ``run`` itself.

    Three calls on a side stream come first, as PyTorch's documentation of graphs recommends.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_bytes(run: Run, device: torch.device) -> int:
    """PyTorch's peak memory in bytes during a run, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _repeats(run: Run, effort: Effort) -> int:
    """The number of runs in a sample; measuring it warms them up.

    More and more of them are timed, because the first run, with a cold cache, may take ten times as long as
    the next hundred.
    """
    if _mean(run, 1, effort.clock) >= LONG or not effort.sample_seconds:
        return 1
    repeats = 1
    while True:
        wanted = max(1, round(effort.sample_seconds / max(_mean(run, repeats, effort.clock), 1e-7)))
        if wanted <= 2 * repeats:
            return wanted
        repeats = min(wanted, 8 * repeats)


def _mean(run: Run, repeats: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(repeats):
        run()
    return (clock() - started) / repeats


@contextmanager
def _without_collection() -> Iterator[None]:
    """Disable Python's garbage collection while times are taken."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

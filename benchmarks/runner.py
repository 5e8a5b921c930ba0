"""Measures groups: checks each contender, times all of them in turn, and takes their memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import agent, decoder, host, imagination, pop, retention, step, token_wise
from benchmarks.checks import Checker
from benchmarks.floors import ARITHMETICS, copy, matrix_product
from benchmarks.machine import origin
from benchmarks.measurements import FAILED, IN_GRAPH, RIGHT, WRONG, Measurement
from benchmarks.text import first_line
from benchmarks.timing import Effort, Run, Sampler, in_graph, in_turn, peak_bytes, quartiles, sampler
from benchmarks.work import BOTH, DTYPES, ON_GPU, Group, Pass, Problem

OPS: dict[str, Callable[[], Iterator[Group]]] = {
    "retention": retention.groups,
    "pop": pop.groups,
    "token_wise": token_wise.groups,
    "decoder": decoder.groups,
    "step": step.groups,
    "imagination": imagination.groups,
    "agent": agent.groups,
}

MATRIX, COPY = "matrix product", "copy"
"""Names of the device's ceilings among the runs of a group."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The selection of rows to measure; None: everything.

    Attributes:
        ops, shapes, modes, dtypes, backends, passes: names.
        tiny: only the shapes "tiny", or all others.
        on_gpu: whether contenders that need a GPU, a GPU's shapes and CUDA graphs are measured.
    """

    ops: Sequence[str] | None = None
    shapes: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    passes: Sequence[str] | None = None
    tiny: bool = False
    on_gpu: bool = False

    def groups(self) -> Iterator[Group]:
        """The groups, reduced to the selection."""
        for op in self.ops or OPS:
            for group in OPS[op]() if op in OPS else ():
                if not self._takes(group):
                    continue
                contenders = {n: c for n, c in group.contenders.items() if self._takes_contender(n)}
                passes = [name for name in group.passes if self.passes is None or name in self.passes]
                if contenders and passes:
                    yield replace(group, contenders=contenders, passes=passes)

    def _takes(self, group: Group) -> bool:
        chosen = ((self.shapes, group.shape), (self.modes, group.mode), (self.dtypes, group.dtype))
        if self.shapes is None and (group.shape == "tiny") != self.tiny:
            return False
        if self.shapes is None and group.for_gpu and not self.on_gpu:
            return False
        return all(names is None or name in names for names, name in chosen)

    def _takes_contender(self, name: str) -> bool:
        backend = name.partition(",")[0]
        if backend in ON_GPU and not self.on_gpu:
            return False
        return self.backends is None or backend in self.backends or name in self.backends


Prepared = tuple[Measurement, Pass | None]
"""A row that has been checked but not timed, and what is timed; None where that raised."""


def prepare(group: Group, problem: Problem) -> Iterator[Prepared]:
    """The rows of a group; a contender that raises loses only its own rows."""
    checker = Checker(problem, graded=BOTH in group.passes)
    for name, contender in group.contenders.items():
        row = {"sizes": problem.sizes.text, "computes": contender.computes, "backend": name}
        row |= _names(group) | origin(problem.device)
        try:
            work = contender.make(problem)
            passes = work.passes(group.passes)
            verdicts = checker.check(contender, work, list(passes))
        except Exception as error:
            failed = partial(Measurement, **row, verdict=FAILED, note=_note(error))
            yield from ((failed(direction=direction), None) for direction in group.passes)
            continue
        for direction, found in passes.items():
            verdict = RIGHT if verdicts[direction].right else WRONG
            floor = {"flops": found.flops, "floor_bytes": found.floor_bytes}
            note = verdicts[direction].what
            yield Measurement(**row, **floor, direction=direction, verdict=verdict, note=note), found


def measure(
    group: Group, device: torch.device, effort: Effort, *, graphs: bool = False
) -> Iterator[list[Measurement]]:
    """The measurements of a group, one pass after another; with ``graphs``, in CUDA graphs too."""
    torch.manual_seed(0)
    problem = group.problem(device)
    prepared = list(prepare(group, problem))
    ceilings = _ceilings(DTYPES[group.dtype], device, effort)
    for direction in group.passes:
        there = [(row, found) for row, found in prepared if row.direction == direction]
        yield list(_time(there, group, ceilings, device, effort, graphs=graphs))
    torch.compiler.reset()


def _time(
    prepared: list[Prepared],
    group: Group,
    ceilings: dict[str, tuple[Run, int]],
    device: torch.device,
    effort: Effort,
    *,
    graphs: bool,
) -> Iterator[Measurement]:
    """All contenders in turn, in one pass; graphs come last, because a failed capture may break others."""
    now, runs = origin(device, effort.clock), [(row, found.run) for row, found in prepared if found]
    plans = {row.backend: partial(sampler, run, device, effort) for row, run in runs}
    if graphs:
        plans |= {
            row.backend + IN_GRAPH: partial(_graph_sampler, run, device, effort)
            for row, run in runs
            if group.contenders[row.backend].graphable
        }
    samplers, failed = _warmed_up(plans)
    beside = {name: sampler(run, device, effort) for name, (run, _) in ceilings.items()}
    samples = in_turn({**beside, **samplers}, effort)
    rates = {name: amount / quartiles(samples[name])[1] for name, (_, amount) in ceilings.items()}
    by_name = {row.backend: (row, found) for row, found in prepared}
    for name in dict.fromkeys((*by_name, *plans)):
        row, found = by_name[name.removesuffix(IN_GRAPH)]
        times = {"samples": tuple(samples.get(name, ())), "matrix_rate": rates[MATRIX]}
        times |= {"copy_rate": rates.get(COPY, 0.0), "backend": name}
        if name in failed:
            times |= {"verdict": FAILED, "note": failed[name]}
        elif found and name == row.backend:
            times["peak_bytes"] = peak_bytes(found.run, device)
        yield replace(row, **now, **times)


def _graph_sampler(run: Run, device: torch.device, effort: Effort) -> Sampler:
    return sampler(in_graph(run, device), device, effort)


def _warmed_up(plans: dict[str, Callable[[], Sampler]]) -> tuple[dict[str, Sampler], dict[str, str]]:
    """The samplers by name, and notes on failed runs."""
    made, failed = {}, {}
    for name, plan in plans.items():
        try:
            made[name] = plan()
        except Exception as error:
            failed[name] = _note(error)
    return made, failed


def _names(group: Group) -> dict[str, Any]:
    return {name: getattr(group, name) for name in ("op", "shape", "size", "mode", "dtype")}


def failures(group: Group, device: torch.device, error: Exception) -> list[Measurement]:
    """The rows of a group that could not be measured."""
    failed = partial(Measurement, **origin(device), **_names(group), verdict=FAILED, note=first_line(error))
    return [failed(backend=name, direction=d) for d in group.passes for name in group.contenders]


def floors(device: torch.device, effort: Effort) -> Iterator[list[Measurement]]:
    """The device's own ceilings: a matrix product in each arithmetic, and a copy."""
    for name in ARITHMETICS:
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        run, flops = matrix_product(DTYPES.get(name, torch.float32), device, effort.side)
        yield [_ceiling(MATRIX, name, run, flops, "FLOP/s", device, effort)]
        torch.set_float32_matmul_precision("highest")
    run, moved = copy(device)
    yield [_ceiling(COPY, "bfloat16", run, moved, "B/s", device, effort)]


def _ceiling(
    what: str, dtype: str, run: Run, amount: int, unit: str, device: torch.device, effort: Effort
) -> Measurement:
    samples = in_turn({what: sampler(run, device, effort)}, effort)[what]
    rate = f"{1e-12 * amount / quartiles(samples)[1]:.3g} T{unit}"
    now = origin(device, effort.clock)
    return Measurement(**now, op="floors", mode=what, dtype=dtype, samples=tuple(samples), note=rate)


DIRECT: dict[str, Callable[[torch.device, Effort], Iterator[list[Measurement]]]] = {
    "floors": floors,
    "rem_atari": agent.whole_run,
    "host": host.host,
}
"""Measurements without contenders, made if named; the first two are also part of a GPU's run."""


def run(selection: Selection, device: torch.device, effort: Effort) -> Iterator[list[Measurement]]:
    """All that is selected, as it is measured; an error of the device itself ends it."""
    named = (
        selection.ops if selection.ops is not None else ("floors", "rem_atari") if selection.on_gpu else ()
    )
    for name in (name for name in DIRECT if name in named):
        try:
            yield from DIRECT[name](device, effort)
        except Exception as error:
            traceback.print_exc()
            yield [Measurement(**origin(device), op=name, verdict=FAILED, note=first_line(error))]
    for group in selection.groups():
        left = list(group.passes)
        try:
            for found in measure(group, device, effort, graphs=selection.on_gpu):
                left.pop(0)
                yield found
        except Exception as error:
            traceback.print_exc()
            yield failures(replace(group, passes=left), device, error)
            if is_fatal(error):
                return


def _ceilings(dtype: torch.dtype, device: torch.device, effort: Effort) -> dict[str, tuple[Run, int]]:
    product = {MATRIX: matrix_product(dtype, device, effort.side)}
    return product | ({COPY: copy(device)} if device.type == "cuda" else {})


def is_fatal(error: Exception) -> bool:
    """Whether the device itself failed: from then on every call of this process does."""
    return isinstance(error, torch.AcceleratorError) or any(
        words in str(error) for words in ("CUDA error", "Triton Error [CUDA]")
    )


def _note(error: Exception) -> str:
    """The error in one line. An error of the device ends the run: later results would be unreliable."""
    if is_fatal(error):
        raise error
    traceback.print_exc()
    return first_line(error)

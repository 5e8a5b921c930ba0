"""Measures groups: checks each contender, times all of them in turn, and takes their memory."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from benchmarks import agent, decoder, imagination, pop, retention, step
from benchmarks.checks import Checker
from benchmarks.kernel_audit import print_table
from benchmarks.machine import commit, machine
from benchmarks.records import FAILED, RIGHT, WRONG, Record, RefusedError, ratio
from benchmarks.text import duration, size_of
from benchmarks.timing import RATE, Effort, interleaved, matrix_product, peak_bytes
from benchmarks.work import BOTH, DTYPES, Group, Pass, Problem

OPS: dict[str, Callable[[], Iterator[Group]]] = {
    "retention": retention.groups,
    "pop": pop.groups,
    "decoder": decoder.groups,
    "step": step.groups,
    "imagination": imagination.groups,
    "agent": agent.groups,
}

BASELINE = "torch"
"""Whose time all others are printed in multiples of."""

GPU_ONLY = ("triton",)
"""Contenders that are left out on a CPU, where they would run in an interpreter."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is measured; None: everything.

    Attributes:
        ops, shapes, modes, dtypes, backends, passes: names.
        tiny: the shapes "tiny" and nothing else, or all others.
    """

    ops: Sequence[str] | None = None
    shapes: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    passes: Sequence[str] | None = None
    tiny: bool = False

    def groups(self, device: torch.device) -> Iterator[Group]:
        """The groups with what was asked for of each."""
        for op, groups in OPS.items():
            if self.ops is not None and op not in self.ops:
                continue
            for group in groups():
                if not self._takes(group):
                    continue
                contenders = {
                    name: contender
                    for name, contender in group.contenders.items()
                    if self._takes_backend(name) and (device.type == "cuda" or name not in GPU_ONLY)
                }
                passes = [name for name in group.passes if self.passes is None or name in self.passes]
                if contenders and passes:
                    yield replace(group, contenders=contenders, passes=passes)

    def _takes(self, group: Group) -> bool:
        chosen = ((self.shapes, group.shape), (self.modes, group.mode), (self.dtypes, group.dtype))
        if self.shapes is None and (group.shape == "tiny") != self.tiny:
            return False
        return all(names is None or name in names for names, name in chosen)

    def _takes_backend(self, name: str) -> bool:
        return self.backends is None or any(
            name == each or name.startswith(f"{each},") for each in self.backends
        )


def measure(group: Group, device: torch.device, effort: Effort) -> list[Record]:
    """The records of a group's passes and contenders."""
    torch.manual_seed(0)
    problem = group.problem(device)
    passes: dict[tuple[str, str], Pass] = {}
    verdicts: dict[tuple[str, str], tuple[str, str]] = {}
    checker = Checker(problem, graded=BOTH in group.passes)
    for name in group.contenders:
        for direction, (found, verdict) in _prepare(group, name, problem, checker).items():
            verdicts[name, direction] = verdict
            if found is not None:
                passes[name, direction] = found
    product, product_flops = matrix_product(DTYPES[group.dtype], device, effort)
    records = []
    for direction in group.passes:
        runs = {name: passes[name, direction].run for name in group.contenders if (name, direction) in passes}
        samples = interleaved({RATE: product, **runs}, device, effort)
        rate = product_flops / sorted(samples[RATE])[len(samples[RATE]) // 2]
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        for name, contender in group.contenders.items():
            if (name, direction) not in verdicts:
                continue
            verdict, note = verdicts[name, direction]
            records.append(
                Record(
                    machine=machine(device, effort.clock),
                    commit=commit(),
                    date=date,
                    torch=torch.__version__,
                    op=group.op,
                    shape=group.shape,
                    size=group.size,
                    mode=group.mode,
                    dtype=group.dtype,
                    backend=name,
                    direction=direction,
                    sizes=problem.sizes.text,
                    computes=contender.computes,
                    samples=tuple(samples.get(name, ())),
                    peak_bytes=peak_bytes(runs[name], device) if name in runs else None,
                    flops=passes[name, direction].flops if name in runs else 0,
                    matrix_rate=rate,
                    verdict=verdict,
                    note=note,
                )
            )
    torch.compiler.reset()
    return records


def _prepare(
    group: Group, name: str, problem: Problem, checker: Checker
) -> dict[str, tuple[Pass | None, tuple[str, str]]]:
    """Passes of a contender with what the check says of them; what it raises costs itself alone."""
    contender = group.contenders[name]
    try:
        work = contender.make(problem)
        passes = work.passes()
        wanted = [direction for direction in group.passes if direction in passes]
        verdicts = checker.check(contender, work, wanted)
    except Exception as error:
        traceback.print_exc()
        note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return dict.fromkeys(group.passes, (None, (FAILED, note)))
    return {
        direction: (passes[direction], (RIGHT if verdict.right else WRONG, verdict.what))
        for direction, verdict in verdicts.items()
    }


def print_records(records: Sequence[Record]) -> None:
    """One group's table: times, memory, share of the matrix rate, and how many times our time it takes."""
    if not records:
        return
    first = records[0]
    size = f" {first.size}" if first.size else ""
    print(f"\n{first.op}, {first.mode}, {first.shape}{size} ({first.sizes}), {first.dtype}")
    ours = {record.direction: record for record in records if record.backend == BASELINE}
    body = []
    for record in records:
        share = record.fraction
        body.append(
            [
                record.backend,
                record.direction,
                duration(record.seconds) if record.samples else "",
                " to ".join(map(duration, record.spread)) if record.samples else "",
                "" if record.peak_bytes is None else size_of(record.peak_bytes),
                "" if share is None else f"{share:.0%}",
                _against(record, ours.get(record.direction)),
            ]
        )
    heading = ["backend", "pass", "median", "quartiles", "memory", "of rate", f"times {BASELINE}'s"]
    print_table(heading, body)


def _against(record: Record, ours: Record | None) -> str:
    if ours is None or record is ours:
        return "" if record.verdict == RIGHT else f"{record.verdict}: {record.note}"
    try:
        return str(ratio(record, ours)) + (f"; computes {record.computes}" if record.computes else "")
    except RefusedError as refused:
        return f"refused: {refused}"

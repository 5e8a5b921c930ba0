"""This checkout beside another one, sample by sample in one run: which rows became slower.

Two processes hold the same row, one with each checkout's library and both with this checkout's benchmarks and
agent; one takes a sample while the other waits. So both sides of a ratio see the same moment of the machine,
and a ratio is a median over pairs. A side's process is `python -m benchmarks.against TASK`: it prints a
line of JSON for each row, and one for each sample that a line of its input asks for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from benchmarks import runner
from benchmarks.compare import Change, change
from benchmarks.machine import ROOT, environment_with
from benchmarks.measurements import FAILED, Measurement
from benchmarks.text import first_line
from benchmarks.timing import QUICK, Effort, Sampler, in_turn, sampler

EFFORT = Effort(rounds=15, least=5, sample_seconds=0.05, group_seconds=15.0)


def effort_of(*, quick: bool, cpu_time: bool) -> Effort:
    """How a side measures; ``cpu_time``: one thread, measured in CPU time."""
    effort = QUICK if quick else EFFORT
    if cpu_time:
        torch.set_num_threads(1)
        effort = replace(effort, clock=time.process_time)
    return effort


class Side:
    """A process that measures the library of one checkout, row after row."""

    def __init__(self, library: Path, task: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.against", json.dumps(task)],
            env=environment_with(library, Path(self._folder.name)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def next_row(self) -> Measurement | None:
        """The next row, without samples; None after the last one."""
        row = self._answer("next")
        return None if row is None else Measurement(**row)

    def sample(self) -> float:
        """Seconds of one run of the row."""
        return float(self._answer("sample"))

    def _answer(self, question: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(question, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a side of the comparison ended with status {self._process.wait()}")
        return json.loads(answer)


def compare_with(
    other: Path, selection: dict[str, Any], device: str, *, quick: bool = False, cpu_time: bool = False
) -> Iterator[Change]:
    """The changes from the checkout ``other`` to this one, row by row as they are measured.

    Args:
        other: its folder.
        selection: the fields of `runner.Selection`.
        device: "cpu", "cuda", ...
        quick: the smallest number of samples.
        cpu_time: one thread, measured in CPU time, for a busy machine.
    """
    effort = QUICK if quick else EFFORT
    task = {"selection": selection, "device": device, "quick": quick, "cpu_time": cpu_time}
    with Side(other, task) as before, Side(ROOT, task) as after:
        while (old := before.next_row()) is not None:
            new = after.next_row()
            if new is None or new.key != old.key:
                raise RuntimeError(
                    f"the two checkouts measure different rows: {old.key} and {new and new.key}"
                )
            if FAILED not in (old.verdict, new.verdict):
                samples = in_turn({"before": before.sample, "after": after.sample}, effort)
                old = replace(old, samples=tuple(samples["before"]))
                new = replace(new, samples=tuple(samples["after"]))
            yield change(old, new, in_turn=True)


def serve(selection: dict[str, Any], device: str, **how: bool) -> None:
    """A side: measure the selection's rows as standard input asks for them."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the library's own output must not mix with the answers
    effort = effort_of(**how)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    sys.stdin.readline()
    for row, sample in _rows(runner.Selection(**selection), torch.device(device), effort):
        answer(asdict(row))
        while sys.stdin.readline() == "sample\n":
            answer(sample())
    answer(None)


def _rows(
    selection: runner.Selection, device: torch.device, effort: Effort
) -> Iterator[tuple[Measurement, Sampler]]:
    """Every row of a selection, checked and warmed up; one that failed has nothing to sample."""
    for group in selection.groups():
        torch.manual_seed(0)
        try:
            prepared = list(runner.prepare(group, group.problem(device)))
        except Exception as error:
            prepared = [(row, None) for row in runner.failures(group, device, error)]
        for row, found in prepared:
            try:
                sample = sampler(found.run, device, effort) if found else float
            except Exception as error:
                row, sample = replace(row, verdict=FAILED, note=first_line(error)), float
            yield row, sample
        torch.compiler.reset()


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))

"""Measurements as rows of a CSV, one file a machine and commit; and ratios of two of them.

Rows are appended as they are measured; of two with one key the later one counts.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.machine import ROOT, slug
from benchmarks.timing import quartiles

RESULTS = ROOT / "benchmarks" / "results"

RIGHT, WRONG, FAILED = "right", "wrong", "failed"

Key = tuple[str, str, int, str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement.

    Attributes:
        machine, commit, date, torch: what it holds for; the date is UTC, one for what was timed in turn.
        op, shape, size, mode, dtype: the group's, see `benchmarks.work.Group`.
        backend: who computed it.
        direction: "forward" or "forward+backward".
        sizes: the shape in numbers.
        computes: "" if it is the same function as ours, else what is computed instead.
        samples: seconds of each repetition, as they were taken in turn with those of its group.
        peak_bytes: what PyTorch held at most beyond what it held before; None: not measured.
        flops: products that it must at least do.
        matrix_rate: operations a second of a large matrix product in this dtype, taken in turn with it.
        verdict: "right", "wrong" or "failed".
        note: the largest error and what is allowed, or why it failed.
    """

    machine: str
    commit: str
    date: str
    torch: str
    op: str
    shape: str
    size: int
    mode: str
    dtype: str
    backend: str
    direction: str
    sizes: str
    computes: str
    samples: tuple[float, ...]
    peak_bytes: int | None
    flops: int
    matrix_rate: float
    verdict: str
    note: str

    @property
    def key(self) -> Key:
        """What it is a measurement of, on one machine and commit."""
        return (*self.group, self.backend, self.direction)

    @property
    def group(self) -> tuple[str, str, int, str, str]:
        """What it was timed in turn with."""
        return (self.op, self.shape, self.size, self.mode, self.dtype)

    @property
    def seconds(self) -> float:
        """Median."""
        return quartiles(list(self.samples))[1]

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the seconds."""
        low, _, high = quartiles(list(self.samples))
        return low, high

    @property
    def fraction(self) -> float | None:
        """Share of the matrix rate that its products came to; None where nothing is counted or timed."""
        if not (self.flops and self.matrix_rate and self.samples):
            return None
        return self.flops / self.seconds / self.matrix_rate


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as long one thing takes as another: median and quartiles over repetitions."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f}x ({self.low:.2f} to {self.high:.2f})"


class RefusedError(ValueError):
    """A ratio that says nothing, because one of its sides is not right."""


def ratio(over: Record, under: Record) -> Ratio:
    """How many times as long ``over`` takes as ``under``.

    Samples of one group were taken in turn and are compared one by one; else all with all.

    Raises:
        RefusedError: one of them is not right, or was not timed.
    """
    for side in (over, under):
        if side.verdict != RIGHT:
            raise RefusedError(f"{side.backend} is {side.verdict}: {side.note}")
    if (over.group, over.date, len(over.samples)) == (under.group, under.date, len(under.samples)):
        pairs = list(zip(over.samples, under.samples, strict=True))
    else:
        pairs = [(a, b) for a in over.samples for b in under.samples]
    low, middle, high = quartiles([a / b for a, b in pairs])
    return Ratio(low=low, middle=middle, high=high)


def path_of(machine: str, commit: str) -> Path:
    """Where a machine's results at a commit are kept."""
    return RESULTS / f"{slug(machine)}-{slug(commit)}.csv"


NAMES = [field.name for field in fields(Record)]


def append(path: Path, records: Iterable[Record]) -> None:
    """Add rows to a file, which is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for record in records:
            row = asdict(record)
            row["samples"] = " ".join(f"{seconds:.4g}" for seconds in record.samples)
            row["peak_bytes"] = "" if record.peak_bytes is None else record.peak_bytes
            row["matrix_rate"] = f"{record.matrix_rate:.4g}"
            writer.writerow(row)


def read(path: Path) -> list[Record]:
    """The rows of a file; of those with one key the last, where the first one stood."""
    with path.open(newline="", encoding="utf-8") as file:
        found = [_record(row) for row in csv.DictReader(file)]
    return list({record.key: record for record in found}.values())


def _record(row: dict[str, str]) -> Record:
    values: dict[str, object] = dict(row)
    values["samples"] = tuple(map(float, row["samples"].split()))
    values["peak_bytes"] = int(row["peak_bytes"]) if row["peak_bytes"] else None
    values |= {"size": int(row["size"]), "flops": int(row["flops"]), "matrix_rate": float(row["matrix_rate"])}
    return Record(**values)  # type: ignore[arg-type]


def find(name: str, results: Path = RESULTS) -> Path:
    """A file of results by its path, or by the first digits of its commit.

    Raises:
        FileNotFoundError: there is none, or several.
    """
    if Path(name).is_file():
        return Path(name)
    found = sorted(results.glob(f"*-{slug(name)}*.csv")) if slug(name) else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{name} is no file, and in {results} it is the commit of: {names}")
    return found[0]


def by_group(records: Sequence[Record]) -> dict[tuple[str, str, int, str, str], list[Record]]:
    """Records of one group together."""
    groups: dict[tuple[str, str, int, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    return groups

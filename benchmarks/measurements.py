"""Measurements as rows of a CSV, one file a machine and commit; and ratios of two of them.

Rows are appended as they are measured; of two with one key the later one counts.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.machine import ROOT, slug
from benchmarks.text import duration, print_table, size_of
from benchmarks.timing import quartiles
from benchmarks.work import BACKENDS, FORWARD

RESULTS = ROOT / "benchmarks" / "results"

RIGHT, WRONG, FAILED = "right", "wrong", "failed"

BASELINE = "torch"
"""The baseline: other times are printed as multiples of this contender's."""

IN_GRAPH = ", CUDA graph"
"""Ends the name of a contender that was timed in a CUDA graph."""

Group = tuple[str, str, int, str, str]
Key = tuple[str, str, int, str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement: a row of the CSV.

    Attributes:
        machine, commit, date, torch: its conditions; rows timed in turn share one date (UTC).
        op, shape, size, mode, dtype: the group's, see `benchmarks.work.Group`.
        backend: the contender.
        direction: the pass, for example "forward".
        sizes: the shape in numbers.
        computes: "" if it is the same function as ours, else what is computed instead.
        samples: seconds of each sample, as they were taken in turn with those of its group.
        peak_bytes: PyTorch's peak memory beyond what it held before; None: not measured.
        flops: the least products that it must do.
        matrix_rate: operations a second of a large matrix product in this dtype, taken in turn with it.
        verdict: "right", "wrong" or "failed".
        note: the largest error and what is allowed, or why it failed.
        floor_bytes: the least bytes that it must move.
        copy_rate: bytes a second of a large copy, taken in turn with it; 0: not measured, as on a CPU.
    """

    machine: str
    commit: str
    date: str
    torch: str
    op: str
    shape: str = ""
    size: int = 0
    mode: str = ""
    dtype: str = ""
    backend: str = ""
    direction: str = FORWARD
    sizes: str = ""
    computes: str = ""
    samples: tuple[float, ...] = ()
    peak_bytes: int | None = None
    flops: int = 0
    matrix_rate: float = 0.0
    verdict: str = RIGHT
    note: str = ""
    floor_bytes: int = 0
    copy_rate: float = 0.0

    @property
    def key(self) -> Key:
        """The fields that identify a row among those of one machine and commit."""
        return (*self.group, self.backend, self.direction)

    @property
    def group(self) -> Group:
        """What it was timed in turn with."""
        return (self.op, self.shape, self.size, self.mode, self.dtype)

    @property
    def is_ours(self) -> bool:
        """Whether a backend of ours computed it; "torch, ..." is that backend with an option."""
        return self.backend.partition(",")[0] in BACKENDS

    @property
    def seconds(self) -> float:
        """Median."""
        return quartiles(self.samples)[1]

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the seconds."""
        low, _, high = quartiles(self.samples)
        return low, high

    @property
    def fraction(self) -> float | None:
        """Its floor over its time, at best 1; None without a floor or a time.

        The floor is the time of its products at the matrix rate or, if that is longer, of its bytes at the
        copy rate.
        """
        pairs = ((self.flops, self.matrix_rate), (self.floor_bytes, self.copy_rate))
        floors = [count / rate for count, rate in pairs if count and rate]
        return max(floors) / self.seconds if floors and self.samples else None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The ratio of two times: median and quartiles over samples."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]], factor: float = 1.0) -> Ratio:
        """Ratios of pairs of seconds, the first over the second, times ``factor``."""
        low, middle, high = (factor * x for x in quartiles([a / b for a, b in pairs]))
        return cls(low=low, middle=middle, high=high)

    def __str__(self) -> str:
        return f"{self.middle:.2f}x ({self.low:.2f} to {self.high:.2f})"


class RefusedError(ValueError):
    """There is no ratio, because one of its sides is not right."""


def ratio(over: Measurement, under: Measurement, factor: float = 1.0) -> Ratio:
    """How many times as long ``over`` takes as ``under``, times ``factor``.

    Samples taken in turn, of one group and date, are compared one by one; else all with all.

    Raises:
        RefusedError: one of them is not right, or was not timed.
    """
    for side in (over, under):
        if side.verdict != RIGHT:
            raise RefusedError(f"{side.backend} is {side.verdict}: {side.note}")
    if (over.machine, over.commit, over.date, over.group) == (
        under.machine,
        under.commit,
        under.date,
        under.group,
    ) and len(over.samples) == len(under.samples):
        return Ratio.of(zip(over.samples, under.samples, strict=True), factor)
    return Ratio.of(((a, b) for a in over.samples for b in under.samples), factor)


def path_of(machine: str, commit: str) -> Path:
    """The folder of a machine's results at a commit."""
    return RESULTS / f"{slug(machine)}-{slug(commit)}.csv"


NAMES = [field.name for field in fields(Measurement)]


def append(path: Path, measurements: Iterable[Measurement]) -> None:
    """Add rows to a file, which is made if there is none.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and before.splitlines()[0] != ",".join(NAMES):
        raise ValueError(f"{path} has other columns than {', '.join(NAMES)}; rows go to a new file.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        if not before:
            writer.writeheader()
        elif not before.endswith("\n"):  # a row that a crash cut off
            file.write("\n")
        for measurement in measurements:
            row = asdict(measurement)
            row["samples"] = " ".join(f"{seconds:.4g}" for seconds in measurement.samples)
            row["peak_bytes"] = "" if measurement.peak_bytes is None else measurement.peak_bytes
            row |= {name: f"{row[name]:.4g}" for name in ("matrix_rate", "copy_rate")}
            writer.writerow(row)


def read(path: Path) -> list[Measurement]:
    """The rows of a file; of those with one key the last, where the first one stood.

    A file may lack the columns that came later. A row that a crash cut off is left out.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        whole = [line for line in file if line.endswith("\n")]
    found = [_measurement(row) for row in csv.DictReader(whole) if None not in row.values()]
    return list({measurement.key: measurement for measurement in found}.values())


def _measurement(row: dict[str, str]) -> Measurement:
    kinds: dict[str, Callable[[str], object]] = {
        "samples": lambda text: tuple(map(float, text.split())),
        "peak_bytes": lambda text: int(text) if text else None,
        **dict.fromkeys(("size", "flops", "floor_bytes"), int),
        **dict.fromkeys(("matrix_rate", "copy_rate"), float),
    }
    return Measurement(**{name: kinds.get(name, str)(text) for name, text in row.items()})  # type: ignore[arg-type]


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


def by_group(measurements: Iterable[Measurement]) -> dict[Group, list[Measurement]]:
    """Measurements of one group together."""
    groups: dict[Group, list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault(measurement.group, []).append(measurement)
    return groups


def print_measurements(measurements: Sequence[Measurement]) -> None:
    """A table a group: times, memory, share of the floor, and how many times our time it takes."""
    for group in by_group(measurements).values():
        first, baseline = group[0], {m.direction: m for m in group if m.backend == BASELINE}
        size = f" {first.size}" if first.size else ""
        print(f"\n{first.op}, {first.mode}, {first.shape}{size} ({first.sizes}), {first.dtype}")
        heading = ["backend", "pass", "median", "quartiles", "memory", "of floor", f"times {BASELINE}'s"]
        print_table(heading, [_line(m, baseline.get(m.direction)) for m in group])


def _line(m: Measurement, baseline: Measurement | None) -> list[str]:
    return [
        m.backend,
        m.direction,
        duration(m.seconds) if m.samples else "",
        " to ".join(map(duration, m.spread)) if m.samples else "",
        "" if m.peak_bytes is None else size_of(m.peak_bytes),
        "" if m.fraction is None else f"{m.fraction:.0%}",
        against(m, baseline) + (f"; computes {m.computes}" if m.computes else ""),
    ]


def against(measurement: Measurement, baseline: Measurement | None) -> str:
    """The ratio to the baseline's time in words, or the reason why there is none."""
    if baseline is None or measurement is baseline:
        return "" if measurement.verdict == RIGHT else f"{measurement.verdict}: {measurement.note}"
    try:
        return str(ratio(measurement, baseline))
    except RefusedError as refused:
        return f"refused: {refused}"

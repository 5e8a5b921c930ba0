"""What the project wants to reach, and what was measured of it: met, missed, or not measured.

A target takes its figure from the results of one machine, from the audit of the kernels, or from a GPU's
report. The best of our own backends stands for us, the best of its chunk sizes for yet-another-retnet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.audit import targets as audit_targets
from benchmarks.peers.yet_another_retnet import NAME as THEIRS
from benchmarks.records import RIGHT, Ratio, Record, ratio
from benchmarks.text import duration
from benchmarks.work import BOTH, FORWARD

OURS = ("torch", "compile", "triton")
"""Our backends; "torch, ..." is the first with an option."""

Row = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that is known.

    Attributes:
        records: of one machine and commit.
        audit: rows of kernel_audit.csv.
        gpu: rows of a GPU's report; empty where no GPU was measured.
        name: of the records' file.
        others: results of the same commit on other machines, or with other numbers of threads.
    """

    records: Sequence[Record] = ()
    audit: Sequence[Row] = ()
    gpu: Sequence[Row] = ()
    name: str = ""
    others: Sequence[Results] = ()

    def of(self, **wanted: object) -> list[Record]:
        """The right records whose fields have these values."""
        return [
            record
            for record in self.records
            if record.verdict == RIGHT and all(getattr(record, name) == x for name, x in wanted.items())
        ]

    def ours(self, **wanted: object) -> Record | None:
        """The fastest of ours."""
        return _fastest(record for record in self.of(**wanted) if is_ours(record))

    def theirs(self, **wanted: object) -> Record | None:
        """The fastest of yet-another-retnet's."""
        return _fastest(record for record in self.of(**wanted) if record.backend.startswith(THEIRS))


def is_ours(record: Record) -> bool:
    """Whether it is one of our backends."""
    return record.backend.partition(",")[0] in OURS


def is_series(record: Record) -> bool:
    """Whether it is a point of a series, which is about a slope: single tokens are a shape of their own."""
    return record.size > 0 and record.shape != "token"


def _fastest(records: Iterable[Record]) -> Record | None:
    return min(records, key=lambda record: record.seconds, default=None)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure that was measured, as a number and in words."""

    value: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something wanted.

    Attributes:
        name: what.
        limit: what the figure is to be at most, or at least if ``at_least``.
        wanted: that in words.
        measure: finds the figure; None where it was not measured.
        missing: why it was not.
    """

    name: str
    limit: float
    wanted: str
    measure: Callable[[Results], Figure | None]
    at_least: bool = True
    missing: str = "not in these results"

    def judge(self, results: Results) -> Judged:
        """What became of it."""
        figure = self.measure(results)
        if figure is None:
            return Judged(target=self, figure=None, verdict=f"not measured: {self.missing}")
        return Judged(target=self, figure=figure, verdict=_verdict(self, figure))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A target, its figure and what that means."""

    target: Target
    figure: Figure | None
    verdict: str


def _verdict(target: Target, figure: Figure) -> str:
    met = figure.value >= target.limit if target.at_least else figure.value <= target.limit
    if met:
        return "met"
    return f"**missed** by {abs(figure.value / target.limit - 1):.0%}" if target.limit else "**missed**"


def judge(results: Results) -> list[Judged]:
    """All targets in order, the kernels' among them."""
    cpu, gpu = ([target.judge(results) for target in targets] for targets in (CPU, GPU))
    return [*cpu, *_audited(results.audit), *gpu]


def _share(**wanted: object) -> Callable[[Results], Figure | None]:
    """The share of the matrix rate of our fastest."""

    def measure(results: Results) -> Figure | None:
        record = results.ours(**wanted)
        if record is None or record.fraction is None:
            return None
        low, high = (record.fraction * record.seconds / x for x in reversed(record.spread))
        text = f"{record.fraction:.0%} ({low:.0%} to {high:.0%}), {record.backend}"
        return Figure(value=record.fraction, text=text)

    return measure


def _over_floor(**wanted: object) -> Callable[[Results], Figure | None]:
    """The time of our fastest in units of its floor."""

    def measure(results: Results) -> Figure | None:
        record = results.ours(**wanted)
        if record is None or not record.fraction:
            return None
        value = 1 / record.fraction
        return Figure(value=value, text=f"{value:.2f}x, {record.backend}")

    return measure


def _against_theirs(theirs_dtype: str | None = None, **wanted: object) -> Callable[[Results], Figure | None]:
    """How many times as long their fastest takes as ours."""

    def measure(results: Results) -> Figure | None:
        ours = results.ours(computes="", **wanted)  # all that they compute
        theirs = results.theirs(**{**wanted, "dtype": theirs_dtype or wanted["dtype"]})
        if ours is None or theirs is None:
            return None
        found: Ratio = ratio(theirs, ours)
        return Figure(value=found.middle, text=str(found))

    return measure


def _worst(figures: Callable[[Results], list[tuple[str, Figure]]]) -> Callable[[Results], Figure | None]:
    def measure(results: Results) -> Figure | None:
        found = figures(results)
        if not found:
            return None
        name, figure = min(found, key=lambda each: each[1].value)
        return Figure(value=figure.value, text=f"at worst {figure.text}: {name}")

    return measure


def _modes(results: Results) -> list[tuple[str, Figure]]:
    """Every mode, shape and pass in float32 that both computed right."""
    found = []
    for op in ("retention", "decoder"):
        rows = [r for r in results.of(op=op, dtype="float32") if not is_series(r) and r.shape != "tiny"]
        for shape, size, mode, direction in sorted({(r.shape, r.size, r.mode, r.direction) for r in rows}):
            wanted = {"op": op, "shape": shape, "size": size, "mode": mode, "direction": direction}
            figure = _against_theirs(dtype="float32", **wanted)(results)
            if figure is not None:
                batch = f" at batch {size}" if size else ""
                found.append((f"{op}, {mode}, {shape}{batch}, {direction}", figure))
    return found


def _long_chunkwise(results: Results) -> list[tuple[str, Figure]]:
    return [each for each in _modes(results) if each[0].startswith("retention, chunkwise, long")]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through the logarithms, by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    over = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return over / sum((x - mean_x) ** 2 for x, _ in logs)


def series(
    results: Results, backend: str, value: Callable[[Record], float | None], **wanted: object
) -> Points:
    """A backend's values over the sizes of a series, where they are known."""
    found = {r.size: value(r) for r in results.of(backend=backend, **wanted)}
    return sorted((size, float(y)) for size, y in found.items() if y)


Points = list[tuple[int, float]]


def steady_time(record: Record) -> float:
    """Its time in units of the matrix product timed in turn with it: a series outlasts a machine's moods."""
    return record.seconds * record.matrix_rate


LONGEST_FIT = 16384
"""Tokens up to which a slope is fitted."""


def _length_slope(
    direction: str, value: Callable[[Record], float | None]
) -> Callable[[Results], Figure | None]:
    def measure(results: Results) -> Figure | None:
        points = series(results, "torch", value, op="retention", shape="length", direction=direction)
        points = [(x, y) for x, y in points if x <= LONGEST_FIT]
        if len(points) < 3:
            return None
        found = slope(points)
        return Figure(value=found, text=f"{found:.2f}")

    return measure


def _constant_step(results: Results) -> Figure | None:
    at_positions = results.of(op="step", shape="positions_in_turn")
    if len(at_positions) < 2:
        return None
    first, *later = at_positions
    found = [ratio(record, first) for record in later]
    slowest = max(found, key=lambda each: each.middle)
    name = later[found.index(slowest)].backend.partition(", ")[2]
    return Figure(value=slowest.middle, text=f"{slowest} the first's: {name}")


_TRAINING = {"op": "decoder", "shape": "rem_train", "mode": "pop", "direction": BOTH}
_CALL = {"op": "agent", "shape": "rem_8", "mode": "call"}

CPU = [
    *(
        Target(
            name=f"POP forward + backward of REM's decoder, {dtype}: share of the matrix rate",
            limit=limit,
            wanted=f"at least {limit:.0%}",
            measure=_share(dtype=dtype, **_TRAINING),
        )
        for dtype, limit in (("float32", 0.65), ("bfloat16", 0.35))
    ),
    Target(
        name="the same beside a two-pass port on yet-another-retnet's layers, float32",
        limit=1.0,
        wanted="faster",
        measure=_against_theirs(dtype="float32", **_TRAINING),
    ),
    Target(
        name="the same in bfloat16 beside that port in float32",
        limit=1.0,
        wanted="faster",
        measure=_against_theirs(theirs_dtype="float32", dtype="bfloat16", **_TRAINING),
    ),
    *(
        Target(
            name=f"imagination steps alone, batch {batch}, {dtype}: share of the matrix rate",
            limit=limit,
            wanted=f"at least {limit:.0%}",
            measure=_share(op="imagination", shape=f"rem_{batch}", mode="step", dtype=dtype),
        )
        for batch in (8, 64)
        for dtype, limit in (("float32", 0.60), ("bfloat16", 0.35))
    ),
    *(
        Target(
            name=f"whole imagination call, batch 8, 21 frames burnt in, {dtype}: over its floor",
            limit=limit,
            wanted=f"at most {limit}x",
            measure=_over_floor(dtype=dtype, **_CALL),
            at_least=False,
        )
        for dtype, limit in (("float32", 1.8), ("bfloat16", 3.5))
    ),
    Target(
        name="every mode beside yet-another-retnet, float32",
        limit=1.0,
        wanted="none slower",
        measure=_worst(_modes),
    ),
    Target(
        name="chunkwise at T = 4096 beside the best of yet-another-retnet's chunk sizes, float32",
        limit=1.5,
        wanted="at least 1.5x",
        measure=_worst(_long_chunkwise),
    ),
    *(
        Target(
            name=f"chunkwise over 1k to 16k tokens, {direction}, {what}: slope of the log-log fit",
            limit=1.1,
            wanted="at most 1.1",
            measure=_length_slope(direction, value),
            at_least=False,
        )
        for direction in (FORWARD, BOTH)
        for what, value in (("time", steady_time), ("memory", lambda r: r.peak_bytes))
    ),
    Target(
        name="a recurrent step over the position",
        limit=1.1,
        wanted="constant (within 1.1x)",
        measure=_constant_step,
        at_least=False,
    ),
]
"""Those that a CPU answers."""


def _audited(rows: Sequence[Row]) -> list[Judged]:
    """The audit's own targets with its own verdicts: they hold for all kernels, without a GPU."""
    known = {target.name: target.at_least for target in audit_targets.TARGETS}
    judged = []
    for row in (row for row in rows if row["part"] == "target"):
        worst, limit, at_least = float(row["worst"]), float(row["limit"]), known.get(row["target"], False)
        target = Target(
            name=f"kernels, counted: {row['target']}",
            limit=limit,
            wanted=f"at {'least' if at_least else 'most'} {limit:g}",
            measure=lambda results: None,
            at_least=at_least,
        )
        figure = Figure(value=worst, text=f"{worst:.4g} ({row['where']})")
        judged.append(Judged(target=target, figure=figure, verdict=_verdict(target, figure)))
    return judged


def _gpu_row(results: Results, **wanted: str) -> Row | None:
    """The one row of the GPU's report with these values; a part of a text is enough for ``shape``."""
    for row in results.gpu:
        fits = all((x in row[n]) if n == "shape" else (row[n] == x) for n, x in wanted.items())
        if fits and row["seconds"] and row.get("failed") != "True":
            return row
    return None


_GPU_POP = {"shape": "rem training", "dtype": "bfloat16"}


def _gpu_bandwidth(results: Results) -> Figure | None:
    row = _gpu_row(results, part="pop", what="pop_rows", way=FORWARD, mode="graph", **_GPU_POP)
    if row is None or not row["of_floor"]:
        return None
    value = float(row["of_floor"])
    return Figure(value=value, text=f"{value:.0%} ({row['gpu']})")


def _gpu_ratio(ours: dict[str, str], theirs: dict[str, str]) -> Callable[[Results], Figure | None]:
    def measure(results: Results) -> Figure | None:
        under, over = _gpu_row(results, **ours), _gpu_row(results, **theirs)
        if under is None or over is None:
            return None
        value = float(over["seconds"]) / float(under["seconds"])
        return Figure(value=value, text=f"{value:.2f}x ({under['gpu']})")

    return measure


def _gpu_run(results: Results) -> Figure | None:
    row = _gpu_row(results, part="rem_atari", what="projected run, in all")
    if row is None:
        return None
    value = float(row["seconds"])
    return Figure(value=value, text=f"{duration(value)} ({row['gpu']})")


_NO_GPU = "no GPU"

GPU = [
    Target(
        name="GPU: fused POP forward at REM's training shape, bfloat16: share of the copy bandwidth",
        limit=0.65,
        wanted="at least 65%",
        measure=_gpu_bandwidth,
        missing=_NO_GPU,
    ),
    Target(
        name="GPU: the same, forward + backward, beside flash-linear-attention's calls composed",
        limit=2.0,
        wanted="at least 2x",
        measure=_gpu_ratio(
            {"part": "pop", "what": "pop_retention", "way": BOTH, "mode": "eager", **_GPU_POP},
            {
                "part": "peers",
                "what": "fla chunk_retention, composed",
                "way": BOTH,
                "mode": "eager",
                **_GPU_POP,
            },
        ),
        missing=_NO_GPU,
    ),
    *(
        Target(
            name=f"GPU: chunkwise retention B 8, T 4096, H 16, D {dim}, bfloat16, {way}, beside"
            " flash-linear-attention's chunk_retention",
            limit=1.0,
            wanted="at least as fast",
            measure=_gpu_ratio(
                {"part": "retention", "what": "retention", "way": way, "mode": "eager", "shape": f"D{dim}"},
                {
                    "part": "peers",
                    "what": "fla chunk_retention",
                    "way": way,
                    "mode": "graph",
                    "shape": f"D{dim}",
                },
            ),
            missing=_NO_GPU,
        )
        for dim in (64, 128)
        for way in (FORWARD, BOTH)
    ),
    Target(
        name="GPU: REM at the paper's sizes, projected run of 600 epochs",
        limit=3600.0,
        wanted="under 1 hour",
        measure=_gpu_run,
        at_least=False,
        missing=_NO_GPU,
    ),
]
"""Those that a GPU's report answers (`benchmarks/gpu_report.sh`)."""

"""The project's targets, and the measured figures: met, missed, or not measured.

A target takes its figure from the results of one machine, from the audit of the kernels, or from a GPU's
report. Our figure is that of the best of our backends, yet-another-retnet's that of its best chunk size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.kernel_audit import targets as audit_targets
from benchmarks.measurements import IN_GRAPH, RIGHT, Measurement, ratio
from benchmarks.peers.yet_another_retnet import NAME as THEIRS
from benchmarks.text import duration
from benchmarks.work import BOTH, FORWARD


@dataclass(frozen=True, kw_only=True)
class Results:
    """All available results.

    Attributes:
        rows: of one machine and commit.
        audit: rows of kernel_audit.csv.
        gpu: rows of a GPU's report; empty where no GPU was measured.
        host: rows of host.csv.
        name: of the file that the rows are from.
        others: results of the same commit on other machines, or with other numbers of threads.
    """

    rows: Sequence[Measurement] = ()
    audit: Sequence[Mapping[str, str]] = ()
    gpu: Sequence[Measurement] = ()
    host: Sequence[Measurement] = ()
    name: str = ""
    others: Sequence[Results] = ()

    def of(self, **wanted: object) -> list[Measurement]:
        """The right rows whose fields have these values."""
        return [m for m in self.rows if m.verdict == RIGHT and has(m, **wanted)]

    def ours(self, **wanted: object) -> Measurement | None:
        """The fastest of ours."""
        return fastest(m for m in self.of(**wanted) if m.is_ours)

    def theirs(self, name: str = THEIRS, **wanted: object) -> Measurement | None:
        """The fastest rival's."""
        return fastest(m for m in self.of(**wanted) if m.backend == name or m.backend.startswith(f"{name}, "))


def has(measurement: Measurement, **wanted: object) -> bool:
    """Whether its fields have these values."""
    return all(getattr(measurement, name) == value for name, value in wanted.items())


def is_series(measurement: Measurement) -> bool:
    """Whether it is a point of a series, which is about a slope: single tokens are a shape of their own."""
    return measurement.size > 0 and measurement.shape != "token"


def fastest(measurements: Iterable[Measurement]) -> Measurement | None:
    """The one with the lowest median."""
    return min(measurements, key=lambda m: m.seconds, default=None)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured figure, as a number and in words."""

    value: float
    text: str


Find = Callable[[Results], Figure | None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target.

    Attributes:
        name: its name.
        limit: the least figure or, with ``at_least=False``, the largest.
        wanted: the limit in words.
        find: finds the figure; None if it was not measured.
        missing: the reason for a missing figure.
    """

    name: str
    limit: float
    wanted: str
    find: Find
    at_least: bool = True
    missing: str = "not in these results"

    def judge(self, results: Results) -> Judged:
        """The verdict on this target."""
        figure = self.find(results)
        if figure is None:
            missing = self.missing if not results.gpu else Target.missing
            return Judged(target=self, figure=None, verdict=f"not measured: {missing}")
        if figure.value >= self.limit if self.at_least else figure.value <= self.limit:
            verdict = "met"
        else:
            verdict = "**missed**" + (f" by {abs(figure.value / self.limit - 1):.0%}" if self.limit else "")
        return Judged(target=self, figure=figure, verdict=verdict)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A target, its figure and the verdict."""

    target: Target
    figure: Figure | None
    verdict: str


def judge(results: Results) -> list[Judged]:
    """All targets in order: a CPU's, the host's, the audit's, a GPU's."""
    return [target.judge(results) for target in (*CPU, *HOST, *audited(results.audit), *GPU)]


def at_least(name: str, limit: float, find: Find, wanted: str = "at least {:g}", **options: str) -> Target:
    """A target whose figure is not to fall below the limit, which ``wanted`` may show."""
    return Target(name=name, limit=limit, wanted=wanted.format(limit), find=find, **options)


def at_most(name: str, limit: float, find: Find, wanted: str = "at most {:g}", **options: str) -> Target:
    """A target whose figure is not to exceed the limit, which ``wanted`` may show."""
    return Target(name=name, limit=limit, wanted=wanted.format(limit), find=find, at_least=False, **options)


def _share(**wanted: object) -> Find:
    """The share of the matrix rate of our fastest."""

    def find(results: Results) -> Figure | None:
        best = results.ours(**wanted)
        if best is None or best.fraction is None:
            return None
        low, high = (best.fraction * best.seconds / x for x in reversed(best.spread))
        return Figure(
            value=best.fraction, text=f"{best.fraction:.0%} ({low:.0%} to {high:.0%}), {best.backend}"
        )

    return find


def _over_floor(**wanted: object) -> Find:
    """The time of our fastest in units of its floor."""

    def find(results: Results) -> Figure | None:
        best = results.ours(**wanted)
        if best is None or not best.fraction:
            return None
        return Figure(value=1 / best.fraction, text=f"{1 / best.fraction:.2f}x, {best.backend}")

    return find


def _against_theirs(theirs_dtype: str | None = None, **wanted: object) -> Find:
    """The ratio of their fastest time to ours."""

    def find(results: Results) -> Figure | None:
        ours = results.ours(computes="", **wanted)  # all that they compute
        theirs = results.theirs(**{**wanted, "dtype": theirs_dtype or wanted["dtype"]})
        if ours is None or theirs is None:
            return None
        found = ratio(theirs, ours)
        return Figure(value=found.middle, text=str(found))

    return find


def _worst_mode(**only: str) -> Find:
    """The worst of every mode, shape and pass in float32 that both computed right."""

    def find(results: Results) -> Figure | None:
        found = []
        for op in ("retention", "decoder"):
            rows = [r for r in results.of(op=op, dtype="float32") if not is_series(r) and r.shape != "tiny"]
            for shape, size, mode, direction in sorted(
                {(r.shape, r.size, r.mode, r.direction) for r in rows}
            ):
                wanted = {"op": op, "shape": shape, "size": size, "mode": mode, "direction": direction}
                figure = _against_theirs(dtype="float32", **wanted)(results)
                if figure is not None and only.items() <= wanted.items():
                    batch = f" at batch {size}" if size else ""
                    found.append((figure, f"{op}, {mode}, {shape}{batch}, {direction}"))
        if not found:
            return None
        figure, name = min(found, key=lambda each: each[0].value)
        return Figure(value=figure.value, text=f"at worst {figure.text}: {name}")

    return find


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the straight line through the logarithms, by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    over = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return over / sum((x - mean_x) ** 2 for x, _ in logs)


Value = Callable[[Measurement], float | None]


def series(results: Results, backend: str, value: Value, **wanted: object) -> list[tuple[int, float]]:
    """A backend's values over the sizes of a series, where they are known."""
    found = {r.size: value(r) for r in results.of(backend=backend, **wanted)}
    return sorted((size, float(y)) for size, y in found.items() if y)


def steady_time(measurement: Measurement) -> float:
    """Its time in units of the matrix product timed in turn with it: a series outlasts a machine's moods."""
    return measurement.seconds * measurement.matrix_rate


VALUES: dict[str, Value] = {"time": steady_time, "memory": lambda m: m.peak_bytes}

LONGEST_FIT = 16384
"""Tokens up to which a slope is fitted."""


def _length_slope(direction: str, value: Value) -> Find:
    def find(results: Results) -> Figure | None:
        points = series(results, "torch", value, op="retention", shape="length", direction=direction)
        points = [(x, y) for x, y in points if x <= LONGEST_FIT]
        if len(points) < 3:
            return None
        return Figure(value=slope(points), text=f"{slope(points):.2f}")

    return find


def _constant_step(results: Results) -> Figure | None:
    at_positions = results.of(op="step", shape="positions_in_turn")
    if len(at_positions) < 2:
        return None
    first, *later = at_positions
    found, slowest = max(((ratio(m, first), m) for m in later), key=lambda each: each[0].middle)
    position = slowest.backend.partition(", ")[2]
    return Figure(value=found.middle, text=f"{found} the first's: {position}")


_TRAINING = {"op": "decoder", "shape": "rem_train", "mode": "pop", "direction": BOTH}
_CALL = {"op": "agent", "shape": "rem_8", "mode": "call"}

CPU = [
    *(
        at_least(
            f"POP forward + backward of REM's decoder, {dtype}: share of the matrix rate",
            limit,
            _share(dtype=dtype, **_TRAINING),
            "at least {:.0%}",
        )
        for dtype, limit in (("float32", 0.65), ("bfloat16", 0.35))
    ),
    at_least(
        "the same beside a two-pass port on yet-another-retnet's layers, float32",
        1.0,
        _against_theirs(dtype="float32", **_TRAINING),
        "faster",
    ),
    at_least(
        "the same in bfloat16 beside that port in float32",
        1.0,
        _against_theirs(theirs_dtype="float32", dtype="bfloat16", **_TRAINING),
        "faster",
    ),
    *(
        at_least(
            f"imagination steps alone, batch {batch}, {dtype}: share of the matrix rate",
            limit,
            _share(op="imagination", shape=f"rem_{batch}", mode="step", dtype=dtype),
            "at least {:.0%}",
        )
        for batch in (8, 64)
        for dtype, limit in (("float32", 0.60), ("bfloat16", 0.35))
    ),
    *(
        at_most(
            f"whole imagination call, batch 8, 21 frames burnt in, {dtype}: over its floor",
            limit,
            _over_floor(dtype=dtype, **_CALL),
            "at most {}x",
        )
        for dtype, limit in (("float32", 1.8), ("bfloat16", 3.5))
    ),
    at_least("every mode beside yet-another-retnet, float32", 1.0, _worst_mode(), "none slower"),
    at_least(
        "chunkwise at T = 4096 beside the best of yet-another-retnet's chunk sizes, float32",
        1.5,
        _worst_mode(op="retention", mode="chunkwise", shape="long"),
        "at least {}x",
    ),
    *(
        at_most(
            f"chunkwise over 1k to 16k tokens, {direction}, {what}: slope of the log-log fit",
            1.1,
            _length_slope(direction, value),
        )
        for direction in (FORWARD, BOTH)
        for what, value in VALUES.items()
    ),
    at_most("a recurrent step over the position", 1.1, _constant_step, "constant (within {}x)"),
]
"""The targets that are measured on a CPU."""


DISPATCH = "torch.mm"
"""The unit of host time: a product of matrices of 16 x 16."""

HOST_LIMITS = {FORWARD: 8.0, BOTH: 21.0}
"""Units; 15 and 40 µs where one takes 1.9 µs."""

NOTHING = "a function that does nothing"
"""The rows of autograd's own time."""

HOST_BEYOND = 70.0
"""Units that an operation takes beyond it, forward and backward."""


def _host_time(direction: str, beyond: str | None = None) -> Find:
    """The worst operation's time in units, beyond that of another row if one is named."""

    def find(results: Results) -> Figure | None:
        rows = [m for m in results.host if m.verdict == RIGHT and has(m, direction=direction)]
        by_side = {side: {m.mode: m for m in rows if m.backend == side} for side in (DISPATCH, beyond)}
        found = []
        for taken in (m for m in rows if m.backend == "triton"):
            if beyond is not None:
                pairs = zip(taken.samples, by_side[beyond][taken.mode].samples, strict=True)
                taken = replace(taken, samples=tuple(a - b for a, b in pairs))
            found.append((ratio(taken, by_side[DISPATCH][taken.mode]), taken.mode))
        if not found:
            return None
        worst, mode = max(found, key=lambda each: each[0].middle)
        return Figure(value=worst.middle, text=f"{worst}, {mode}")

    return find


HOST = [
    *(
        at_most(
            f"host time of an operation by kernels, {direction}, in dispatches of {DISPATCH}",
            limit,
            _host_time(direction),
            "at most {:g}x",
        )
        for direction, limit in HOST_LIMITS.items()
    ),
    at_most(
        "the same beyond what autograd takes for a function of as many tensors that does nothing",
        HOST_BEYOND,
        _host_time(BOTH, beyond=NOTHING),
        "at most {:g}x",
    ),
]
"""Those that a stub of a GPU answers (`benchmarks/host.py`)."""


def audited(rows: Iterable[Mapping[str, str]]) -> list[Target]:
    """The audit's own targets with its figures: they hold for all kernels, without a GPU."""
    known = {target.name: target.at_least for target in audit_targets.TARGETS}
    targets = []
    for row in (row for row in rows if row["part"] == "target"):
        worst = float(row["worst"])
        figure = Figure(value=worst, text=f"{worst:.4g} ({row['where']})")
        made = at_least if known.get(row["target"], False) else at_most
        targets.append(
            made(f"kernels, counted: {row['target']}", float(row["limit"]), lambda _, figure=figure: figure)
        )
    return targets


def _on_gpu(results: Results, **wanted: object) -> Measurement | None:
    """The fastest right row of the GPU's report with these values."""
    return fastest(m for m in results.gpu if m.verdict == RIGHT and m.samples and has(m, **wanted))


def _gpu_bandwidth(results: Results) -> Figure | None:
    found = _on_gpu(results, op="pop", mode="rows", backend=f"triton{IN_GRAPH}", direction=FORWARD, **_PAPER)
    if found is None or found.fraction is None:
        return None
    return Figure(value=found.fraction, text=f"{found.fraction:.0%} ({found.machine})")


def _gpu_ratio(theirs: str, **wanted: object) -> Find:
    def find(results: Results) -> Figure | None:
        under, over = (_on_gpu(results, backend=name, **wanted) for name in ("triton", theirs))
        if under is None or over is None:
            return None
        found = ratio(over, under)
        return Figure(value=found.middle, text=f"{found} ({under.machine})")

    return find


def _gpu_run(results: Results) -> Figure | None:
    found = _on_gpu(results, op="rem_atari", mode="projected run, in all")
    if found is None:
        return None
    return Figure(value=found.seconds, text=f"{duration(found.seconds)} ({found.machine})")


_PAPER = {"shape": "paper_train", "dtype": "bfloat16"}
_NO_GPU = "no GPU"

GPU = [
    at_least(
        "GPU: fused POP forward at REM's training shape, bfloat16: share of the copy bandwidth",
        0.65,
        _gpu_bandwidth,
        "at least {:.0%}",
        missing=_NO_GPU,
    ),
    at_least(
        "GPU: the same, forward + backward, beside flash-linear-attention's calls composed",
        2.0,
        _gpu_ratio("fla, composed", op="pop", mode="pop", direction=BOTH, **_PAPER),
        "at least {:g}x",
        missing=_NO_GPU,
    ),
    *(
        at_least(
            f"GPU: chunkwise retention B 8, T 4096, H 16, D {dim}, bfloat16, {direction}, beside"
            " flash-linear-attention's chunk_retention",
            1.0,
            _gpu_ratio("fla, chunk_retention", op="retention", shape=f"long_{dim}", direction=direction),
            "at least as fast",
            missing=_NO_GPU,
        )
        for dim in (64, 128)
        for direction in (FORWARD, BOTH)
    ),
    at_most(
        "GPU: REM at the paper's sizes, projected run of 600 epochs",
        3600.0,
        _gpu_run,
        "under 1 hour",
        missing=_NO_GPU,
    ),
]
"""The targets that a GPU's report measures (`benchmarks/gpu_report.sh`)."""

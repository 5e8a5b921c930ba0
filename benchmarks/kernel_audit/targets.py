"""The audit's targets, for speed and for reliability, and the CSV that keeps its rows and verdicts.

A target is a named row: a limit, the worst figure among the audited cases that it covers, and where that
stood. A target that no audited case covers is left out, so a run over part of the cases judges that part.

The CSV has a row for each kernel of a case, with the commit it was made on. A case that is audited again
takes the place of its earlier rows. Rows of other cases stay, so the audit can be made part by part; rows of
another Triton are dropped, and so are cases that are no longer audited. The targets are judged over all rows.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernel_audit.calls import MULTIPROCESSORS
from benchmarks.kernel_audit.cases import PARTS

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AuditTarget:
    """One target of the audit.

    Attributes:
        name: its name.
        part: whose rows it covers: "compile", "huge" or "traffic"; empty for all, failures included.
        covers: whether it covers a row.
        figure: the number that is judged.
        limit: the largest allowed figure, or with ``at_least`` the smallest.
    """

    name: str
    part: str
    covers: Callable[[Row], bool]
    figure: Callable[[Row], float]
    limit: float
    at_least: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A target, the worst figure and its place, and whether the target is met."""

    target: AuditTarget
    worst: float
    where: str
    met: bool


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """The verdicts on all targets that cover a row."""
    rows = list(rows)
    verdicts = []
    for target in TARGETS:
        covered = [row for row in rows if _judged_by(target, row)]
        if not covered:
            continue
        choose = min if target.at_least else max
        worst = choose(covered, key=target.figure)
        figure = target.figure(worst)
        met = figure >= target.limit if target.at_least else figure <= target.limit
        verdicts.append(Verdict(target=target, worst=figure, where=where(worst), met=met))
    return verdicts


def _judged_by(target: AuditTarget, row: Row) -> bool:
    """A case that failed has no figures: only the target without a part, which counts failures, covers it."""
    if not target.part:
        return target.covers(row)
    return bool(row["part"] == target.part and not row["failure"] and target.covers(row))


def where(row: Row) -> str:
    """For example "pop_fwd, rem training, bfloat16, sm_90"."""
    return ", ".join(row[name] for name in ("op", "shape", "dtype", "architecture"))


def _is(op: str | None = None, **wanted: object) -> Callable[[Row], bool]:
    """Rows of an op (any if None) whose fields have the wanted values, or one of them if a tuple is given."""

    def covers(row: Row) -> bool:
        fields = wanted if op is None else {**wanted, "op": op}
        return all(
            row[name] in (value if isinstance(value, tuple) else (value,)) for name, value in fields.items()
        )

    return covers


def _both(*conditions: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: all(condition(row) for condition in conditions)


def _ratio(figure: str, floor: str) -> Callable[[Row], float]:
    return lambda row: float(row[figure] / row[floor])


def _small(row: Row) -> bool:
    return bool(row["head_dim"] <= 64)


def _large(row: Row) -> bool:
    return bool(row["head_dim"] > 64)


def _rem(row: Row) -> bool:
    return str(row["shape"]).startswith("rem")


def _multiplies(row: Row) -> bool:
    """A scan over states only scales and adds."""
    return not str(row["kernel"]).startswith("scan_")


def _named(shape: str) -> Callable[[Row], bool]:
    return lambda row: str(row["shape"]).startswith(shape)


_LOW_PRECISION = ("bfloat16", "float16")
_DOTS = ("pop_fwd", "retention_fwd", "pop_bwd", "retention_bwd")
_SWEPT = ("pop_bwd", "retention_bwd")

TARGETS = [
    AuditTarget(
        name="cases that do not compile or run, faulty accesses included",
        part="",
        covers=lambda row: True,
        figure=lambda row: float(bool(row["failure"])),
        limit=0,
    ),
    *(
        AuditTarget(
            name=f"POP forward, {shape}: {what}",
            part="traffic",
            covers=_both(_is("pop_fwd", architecture="sm_90", dtype="bfloat16"), _named(shape)),
            figure=figure,
            limit=limit,
        )
        for shape in ("rem training", "rem imagination")
        for what, figure, limit in (
            ("bytes over the floor", _ratio("bytes", "floor_bytes"), 1.05),
            ("flops over the yardstick", _ratio("flops", "yardstick_flops"), 1.3),
        )
    ),
    AuditTarget(
        name="POP backward, rem training: bytes over the floor",
        part="traffic",
        covers=_both(_is("pop_bwd", architecture="sm_90", dtype="bfloat16"), _named("rem training")),
        figure=_ratio("bytes", "floor_bytes"),
        limit=1.45,
    ),
    AuditTarget(
        name="backward, D above 64, in one sweep: launches",
        part="traffic",
        covers=_both(_is(op=_SWEPT), _large),
        figure=lambda row: row["launches"],
        limit=3,
    ),
    *(
        AuditTarget(
            name=f"{name} backward, {heads}, bfloat16, sm_90: bytes over the floor",
            part="traffic",
            covers=_is(op, architecture="sm_90", dtype="bfloat16", shape=shapes),
            figure=_ratio("bytes", "floor_bytes"),
            limit=limit,
        )
        for op, name, heads, shapes, limit in (
            ("retention_bwd", "retention", "D 100 and 128", ("D 100", "D 128"), 1.5),
            ("retention_bwd", "retention", "D 256", ("D 256",), 2.6),
            ("pop_bwd", "POP", "D 100 and 128", ("D 100", "D 128"), 1.5),
            ("pop_bwd", "POP", "D 256", ("D 256",), 4.3),
        )
    ),
    *(
        AuditTarget(
            name=f"stack bytes, {heads}, bfloat16, {architecture}",
            part="compile",
            covers=_both(_is(architecture=architecture, dtype="bfloat16"), covers),
            figure=lambda row: row["stack"],
            limit=limit,
        )
        for architecture, heads, covers, limit in (
            ("sm_90", "D <= 64", _small, 0),
            ("sm_90", "D above 64", lambda row: _large(row) and row["op"] not in _SWEPT, 0),
            ("sm_90", "D above 64, reverse sweeps", _both(_large, _is(op=_SWEPT)), 16),
            ("sm_80", "D <= 64", _small, 64),
            ("sm_80", "D above 64", _large, 64),
        )
    ),
    AuditTarget(
        name="POP forward, REM's shapes, sm_90: KiB of shared memory",
        part="compile",
        covers=_both(_is("pop_fwd", architecture="sm_90", dtype="bfloat16"), _rem),
        figure=lambda row: row["shared"] / 1024,
        limit=113,
    ),
    AuditTarget(
        name="POP forward, REM's shapes, sm_90: warps",
        part="compile",
        covers=_both(_is("pop_fwd", architecture="sm_90", dtype="bfloat16"), _rem),
        figure=lambda row: row["num_warps"],
        limit=4,
    ),
    AuditTarget(
        name="POP forward, REM's shapes, sm_90: async copies in the block loop",
        part="compile",
        covers=_both(_is("pop_fwd", architecture="sm_90", dtype="bfloat16"), _rem),
        figure=lambda row: row["loop_async_copies"],
        limit=1,
        at_least=True,
    ),
    AuditTarget(
        name="retention forward, D 24, 60 and 100, sm_90: async copies in the loop over chunks",
        part="compile",
        covers=_is("retention_fwd", architecture="sm_90", dtype="bfloat16", shape=("D 24", "D 60", "D 100")),
        figure=lambda row: row["loop_async_copies"],
        limit=1,
        at_least=True,
    ),
    *(
        AuditTarget(
            name=f"shared memory over the limit, {architecture}",
            part="compile",
            covers=_is(architecture=architecture),
            figure=_ratio("shared", "shared_limit"),
            limit=1,
        )
        for architecture in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
    ),
    AuditTarget(
        name="sm_90: products that public reports tie to wrong results",
        part="compile",
        covers=_is(architecture="sm_90"),
        figure=lambda row: len(row["hazards"]),
        limit=0,
    ),
    AuditTarget(
        name="float32 without tf32: tensor-core products on NVIDIA",
        part="compile",
        covers=_both(_is(dtype="float32"), lambda row: str(row["architecture"]).startswith("sm_")),
        figure=lambda row: row["hgmma"] + row["hmma"],
        limit=0,
    ),
    AuditTarget(
        name="16-bit dtypes: tensor-core products, in the loop if there is one",
        part="compile",
        covers=_both(_is(dtype=_LOW_PRECISION, op=_DOTS), _multiplies),
        figure=lambda row: row["loop_mma"] if row["loop_instructions"] else row["hgmma"] + row["hmma"],
        limit=1,
        at_least=True,
    ),
    AuditTarget(
        name="offsets that leave 32 bits, above 2^31 elements",
        part="huge",
        covers=lambda row: True,
        figure=lambda row: len(row["overflows"]),
        limit=0,
    ),
    AuditTarget(
        name="grids that CUDA does not launch, above 2^31 elements",
        part="huge",
        covers=lambda row: True,
        figure=lambda row: float(not row["grid_fits"]),
        limit=0,
    ),
]


# ---- the CSV ----

_TEXTS = ("commit", "triton", "torch", "part", "op", "shape", "dtype", "architecture", "kernel", "failure")
_LISTS = ("grid", "overflows", "hazards")


def merge(path: Path, rows: Sequence[Row], versions: Mapping[str, str]) -> None:
    """Put all rows of some cases into the file; ``versions``: of the checkout, "triton" and "torch"."""
    new = [{**versions, **row} for row in rows]
    replaced = {_case(row) for row in new}
    earlier = [row for row in read(path) if row["triton"] == versions["triton"]]
    places = _places()
    kept = [row for row in earlier if _case(row) not in replaced and _case(row) in places] + new
    kept.sort(key=lambda row: places[_case(row)])
    records = [{name: text(value) for name, value in row.items()} for row in kept]
    for verdict in judge(kept):
        judged = {
            "part": "target",
            "target": verdict.target.name,
            "limit": f"{verdict.target.limit:g}",
            "worst": f"{verdict.worst:.6g}",
            "where": verdict.where,
            "verdict": "met" if verdict.met else "missed",
        }
        records.append({**versions, **judged})
    names = list(dict.fromkeys(name for record in records for name in record))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    beside.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of the file, without the targets; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        found = [record for record in csv.DictReader(file) if record["part"] != "target"]
    return [
        {name: _value(name, written) for name, written in record.items() if written or name == "failure"}
        | {name: _value(name, record[name]) for name in _LISTS if name in record}
        for record in found
    ]


def text(value: object) -> str:
    """A figure as text for a cell."""
    if isinstance(value, list):
        return (" x " if all(isinstance(x, int) for x in value) else "; ").join(map(str, value))
    return str(value)


def _value(name: str, written: str) -> Any:
    """The inverse of `text`."""
    if name in _TEXTS:
        return written
    if name in _LISTS:
        parts = written.split(" x " if name == "grid" else "; ") if written else []
        return [int(part) for part in parts] if name == "grid" else parts
    if written in ("True", "False"):
        return written == "True"
    return float(written) if "." in written or "e" in written else int(written)


def _places() -> dict[tuple[str, ...], int]:
    """The order of the cases in the file: by part, then by architecture."""
    cases = (
        (part, case.op, case.shape, str(case.dtype).removeprefix("torch."), architecture)
        for part, cases in PARTS.items()
        for architecture in MULTIPROCESSORS
        for case in cases
    )
    return {case: place for place, case in enumerate(cases)}


def _case(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("part", "op", "shape", "dtype", "architecture"))

"""docs/performance.md and the README's results: tables and pictures made of results, prose left as it is.

In a page, what stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is made here; the rest is
written by hand. `python -m benchmarks page` makes all of it anew.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.peers.yet_another_retnet import NAME as THEIRS
from benchmarks.records import RESULTS, RIGHT, Record, RefusedError, by_group, ratio, read
from benchmarks.targets import LONGEST_FIT, Results, is_ours, is_series, judge, series, slope, steady_time
from benchmarks.text import duration, markdown_table, size_of
from benchmarks.work import BOTH, FORWARD

PAGES = (ROOT / "docs" / "performance.md", ROOT / "README.md")

PICTURES = ROOT / "docs" / "performance"

PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Part = Callable[[Results], str]


def newest(folder: Path = RESULTS) -> Path:
    """The results that the pages show: of those that `python -m benchmarks run` wrote, the latest.

    Raises:
        FileNotFoundError: there are none.
    """
    dated = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            dates = [row["date"] for row in csv.DictReader(file) if row.get("samples") is not None]
        if dates:
            dated[path] = max(dates)
    if not dated:
        raise FileNotFoundError(f"there are no results in {folder}: python -m benchmarks run")
    return max(dated, key=lambda path: dated[path])


def load(path: Path, folder: Path = RESULTS) -> Results:
    """Results of a file, with the kernels' audit, a GPU's report, and others of its commit in the folder."""
    reports = sorted(folder.glob("gpu_*.csv"))
    audit = folder / "kernel_audit.csv"
    return Results(
        records=read(path),
        audit=_rows(audit) if audit.exists() else (),
        gpu=_rows(reports[-1]) if reports else (),
        name=path.name,
        others=[
            Results(records=read(other), name=other.name)
            for other in sorted(folder.glob(f"*-{path.stem.rpartition('-')[2]}.csv"))
            if other.name != path.name
        ],
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def render(text: str, results: Results) -> str:
    """A page with its generated parts made anew.

    Raises:
        ValueError: a part has a name that nothing is made for.
    """

    def part(match: re.Match[str]) -> str:
        if match[2] not in PARTS:
            raise ValueError(f"{match[2]!r} is no generated part; there are {', '.join(PARTS)}")
        made = PARTS[match[2]](results) or "Not measured."
        return f"{match[1]}\n{made}\n\n{match[3]}"

    return PART.sub(part, text)


def _source(results: Results) -> str:
    """Where the figures come from."""
    first = results.records[0]
    days = sorted({record.date[:10] for record in results.records})
    rates = {}
    for dtype in ("float32", "bfloat16"):
        found = sorted(r.matrix_rate for r in results.records if r.dtype == dtype and r.matrix_rate)
        if found:
            rates[dtype] = f"{1e-9 * found[0]:.0f} to {1e-9 * found[-1]:.0f} GFLOP/s in {dtype}"
    lines = [
        ["machine", first.machine],
        ["commit", ", ".join(sorted({record.commit for record in results.records}))],
        ["date, PyTorch", f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, {first.torch}"],
        ["matrix rate", "; ".join(rates.values())],
        ["rows", f"`benchmarks/results/{results.name}`"],
        ["commands", "`python -m benchmarks run`, `python -m benchmarks page`"],
    ]
    return markdown_table(["", ""], lines)


def _targets(results: Results) -> str:
    body = [
        [j.target.name, j.target.wanted, j.figure.text if j.figure else "", j.verdict] for j in judge(results)
    ]
    met = sum(line[3] == "met" for line in body)
    missed = sum(line[3].startswith("**") for line in body)
    table = markdown_table(["what", "wanted", "measured", ""], body)
    return f"{met} met, {missed} missed, {len(body) - met - missed} not measured.\n\n{table}"


def _others(results: Results) -> str:
    """The targets that the same commit's other results measure, side by side."""
    sides = [[j for j in judge(x) if j.figure] for x in results.others]
    verdicts = [{j.target.name: f"{j.figure.text}, {j.verdict}" for j in side if j.figure} for side in sides]
    body = [
        [
            j.target.name,
            j.target.wanted,
            j.figure.text if j.figure else "",
            *(v.get(j.target.name, "") for v in verdicts),
        ]
        for j in judge(results)
        if any(j.target.name in v for v in verdicts)
    ]
    machines = [x.records[0].machine for x in (results, *results.others) if x.records]
    files = ", ".join(f"`benchmarks/results/{x.name}`" for x in results.others)
    return f"{markdown_table(['what', 'wanted', *machines], body)}\n\nFrom {files}." if body else ""


def _picture(name: str, text: str) -> str:
    """A link to a picture that could be drawn."""
    return f"![{text}](performance/{name}.svg)\n\n" if (PICTURES / f"{name}.svg").exists() else ""


def _table(records: Iterable[Record], *, named: bool = False) -> str:
    """A line a record; times are compared with ours of the same group."""
    records = list(records)
    body = []
    for group in by_group(records).values():
        for record in group:
            ours = next((r for r in group if r.backend == "torch" and r.direction == record.direction), None)
            body.append(
                [
                    *([_name(record)] if named else []),
                    record.dtype,
                    _who(record),
                    record.direction,
                    _time(record),
                    "" if record.peak_bytes is None else size_of(record.peak_bytes),
                    "" if record.fraction is None else f"{record.fraction:.0%}",
                    _against(record, ours),
                ]
            )
    heading = ["dtype", "by", "pass", "time", "memory", "of the matrix rate", "times ours"]
    return markdown_table([*(["what"] if named else []), *heading], body) if body else ""


def _name(record: Record) -> str:
    return f"{record.mode}, {record.sizes}"


def _who(record: Record) -> str:
    return f"**retpop**, {record.backend}" if is_ours(record) else record.backend


def _time(record: Record) -> str:
    if not record.samples:
        return ""
    low, high = record.spread
    return f"{duration(record.seconds)} ({duration(low)} to {duration(high)})"


def _against(record: Record, ours: Record | None) -> str:
    if record.verdict != RIGHT:
        return f"no ratio: {record.verdict} ({record.note})"
    if ours is None or record is ours:
        return ""
    try:
        return f"{ratio(record, ours).middle:.2f}x"
    except RefusedError as refused:
        return f"no ratio: {refused}"


def _only(results: Results, **wanted: object) -> list[Record]:
    return [r for r in results.records if all(getattr(r, name) == x for name, x in wanted.items())]


def _training(results: Results) -> str:
    table = _table(_only(results, op="decoder", shape="rem_train"), named=True)
    return table and _picture("training", "Bars: time of a training pass by who computes it") + table


def _operations(results: Results) -> str:
    records = [
        r for r in results.records if r.op in ("retention", "pop") and not is_series(r) and r.shape != "tiny"
    ]
    picture = _picture("modes", "Bars: how many times as long yet-another-retnet takes, by mode")
    return picture + _table(records, named=True) if records else ""


def _scaling(results: Results) -> str:
    body = []
    for direction in (FORWARD, BOTH):
        for what, value in (("time", steady_time), ("memory", lambda r: r.peak_bytes)):
            for backend in ("torch", f"{THEIRS}, chunks of 128", "attention"):
                wanted = {"op": "retention", "direction": direction}
                length = series(results, backend, value, shape="length", **wanted)
                length = [(x, y) for x, y in length if x <= LONGEST_FIT]
                batch = series(results, backend, value, shape="batch", **wanted)
                if len(length) > 2:
                    who = "**retpop**, torch" if backend == "torch" else backend
                    slopes = [f"{slope(x):.2f}" if len(x) > 2 else "" for x in (length, batch)]
                    body.append([who, direction, what, *slopes])
    if not body:
        return ""
    heading = ["by", "pass", "", "slope over 1k to 16k tokens", "slope over the batch, 1 to 32"]
    picture = _picture("scaling", "Lines: time and memory over the length of a sequence")
    return picture + markdown_table(heading, body)


def _series_table(results: Results, op: str, shape: str, along: str) -> str:
    records = _only(results, op=op, shape=shape)
    sizes = sorted({record.size for record in records})
    body = []
    for backend in dict.fromkeys(record.backend for record in records):
        own = {record.size: record for record in records if record.backend == backend}
        cells = [
            "" if size not in own else _time(own[size]) if own[size].verdict == RIGHT else own[size].verdict
            for size in sizes
        ]
        body.append([_who(next(iter(own.values()))), *cells])
    return markdown_table([along, *(f"{size:,}" for size in sizes)], body) if body else ""


def _decoding(results: Results) -> str:
    table = _series_table(results, "step", "position", "position")
    return table and _picture("decoding", "Lines: time of a token over its position") + table


def _imagination(results: Results) -> str:
    table = _series_table(results, "imagination", "tokens", "tokens of an observation")
    if not table:
        return ""
    steps = [r for r in results.records if r.op == "imagination" and not r.size and r.shape != "tiny"]
    calls = [r for r in results.records if r.op == "agent" and r.shape != "tiny"]
    picture = _picture("imagination", "Lines: time of an imagined observation over its tokens")
    parts = [picture + table, "A step of REM's decoder (129 tokens a row):", _table(steps, named=True)]
    if calls:
        parts += ["In the whole agent, heads, controller and draws included:", _table(calls, named=True)]
    return "\n\n".join(parts)


def _losses(results: Results) -> str:
    """Where somebody else takes less time than our fastest that computes as much, beyond the spread."""
    lines = []
    for group in by_group([r for r in results.records if r.shape != "tiny"]).values():
        for direction in dict.fromkeys(r.direction for r in group):
            sides = [r for r in group if r.direction == direction and r.verdict == RIGHT]
            whole = (r for r in sides if is_ours(r) and not r.computes)
            ours = min(whole, key=lambda r: r.seconds, default=None)
            for other in sides:
                if ours is None or is_ours(other):
                    continue
                found = ratio(other, ours)
                if found.high < 1:
                    size = f" {other.size:,}" if other.size else ""
                    what = f"{other.op}, {other.shape}{size}, {_name(other)}, {other.dtype}, {direction}"
                    computes = f" ({other.computes})" if other.computes else ""
                    lines.append(f"- {what}: {other.backend}{computes} takes {found} our time.")
    return "\n".join(lines) or "Nowhere, in these results."


def _gpu(results: Results) -> str:
    """The GPU's report, if there is one."""
    rows = [r for r in results.gpu if r["seconds"] and r["part"] != "tests" and r["failed"] != "True"]
    if not rows:
        return (
            "No GPU was measured: nothing here says how fast the kernels are. `benchmarks/gpu_report.sh` "
            "measures them in 8 minutes."
        )
    body = [
        [
            r["what"],
            r["shape"],
            r["dtype"],
            r["way"],
            r["mode"],
            duration(float(r["seconds"])),
            f"{float(r['of_floor']):.0%}" if r["of_floor"] else "",
        ]
        for r in rows
    ]
    first = rows[0]
    said = f"{first['gpu']}, commit {first['commit']}, torch {first['torch']}, Triton {first['triton']}."
    return (
        said + "\n\n" + markdown_table(["what", "shape", "dtype", "pass", "", "time", "of its floor"], body)
    )


def _summary(results: Results) -> str:
    """The README's: what most people ask, one line each."""
    questions: Sequence[tuple[str, dict[str, object], str]] = [
        (
            "training pass of REM's decoder, forward + backward, float32",
            {"op": "decoder", "shape": "rem_train", "mode": "pop", "dtype": "float32", "direction": BOTH},
            THEIRS,
        ),
        (
            "retention, 4096 tokens, chunkwise, forward + backward",
            {"op": "retention", "shape": "long", "mode": "chunkwise", "dtype": "float32", "direction": BOTH},
            THEIRS,
        ),
        (
            "imagining 64 tokens in each of 8 episodes",
            {"op": "imagination", "shape": "tokens", "size": 64},
            "transformer, token by token",
        ),
        (
            "the token at position 65,536",
            {"op": "step", "shape": "position", "size": 65536},
            "transformer",
        ),
    ]
    body = []
    for name, wanted, other in questions:
        ours = results.ours(computes="", **wanted)
        sides = [
            r for r in results.of(**wanted) if r.backend == other or r.backend.startswith(f"{other}, chunks")
        ]
        theirs = min(sides, key=lambda r: r.seconds, default=None)
        if ours is None or theirs is None:
            continue
        body.append([name, _time(ours), f"{_time(theirs)}, {theirs.backend}", str(ratio(theirs, ours))])
    if not body:
        return ""
    first = results.records[0]
    table = markdown_table(["", "retpop", "other", "other / retpop"], body)
    commits = ", ".join(sorted({record.commit for record in results.records}))
    source = f"`python -m benchmarks run` on {first.machine}, commit {commits}; medians and quartiles."
    picture = _picture("imagination", "Lines: time of an imagined observation over its tokens")
    return f"{table}\n\n{source}\n\n{picture.replace('(', '(docs/')}".rstrip()


PARTS: dict[str, Part] = {
    "source": _source,
    "targets": _targets,
    "others": _others,
    "training": _training,
    "operations": _operations,
    "scaling": _scaling,
    "decoding": _decoding,
    "imagination": _imagination,
    "losses": _losses,
    "gpu": _gpu,
    "summary": _summary,
}
"""By the names that stand in the pages."""

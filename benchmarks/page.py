"""The performance pages and the README's results: tables made of measurements, prose left as it is.

The text between ``<!-- generated: NAME -->`` and ``<!-- end -->`` of a page is made here; the rest is
written by hand. `python -m benchmarks page` makes all generated parts anew.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.measurements import RESULTS, RIGHT, Measurement, by_group, ratio, read
from benchmarks.peers.yet_another_retnet import NAME as THEIRS
from benchmarks.targets import (
    LONGEST_FIT,
    VALUES,
    Results,
    fastest,
    has,
    is_series,
    judge,
    series,
    slope,
)
from benchmarks.text import duration, markdown_table, size_of
from benchmarks.work import BOTH, FORWARD

PAGES = (
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "performance_targets.md",
    ROOT / "README.md",
)

PICTURES = ROOT / "docs" / "performance"

PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def newest(folder: Path = RESULTS) -> Path:
    """The results that the pages show: the latest that `python -m benchmarks run` wrote for a CPU.

    Raises:
        FileNotFoundError: there are none.
    """
    dated = {}
    for path in sorted(folder.glob("*.csv")):
        if path.name not in (AUDIT, HOST) and not path.name.startswith("gpu_"):
            dates = [m.date for m in read(path)]
            dated |= {path: max(dates)} if dates else {}
    if not dated:
        raise FileNotFoundError(f"there are no results in {folder}: python -m benchmarks run")
    return max(dated, key=lambda path: dated[path])


AUDIT, HOST = "kernel_audit.csv", "host.csv"


def load(path: Path, folder: Path = RESULTS) -> Results:
    """Results of a file, with the kernels' audit, a GPU's report, and others of its commit in the folder."""
    reports = sorted(folder.glob("gpu_*.csv"))
    beside = sorted(folder.glob(f"*-{path.stem.rpartition('-')[2]}.csv"))
    return Results(
        rows=read(path),
        audit=_audit(folder / AUDIT),
        gpu=read(reports[-1]) if reports else (),
        host=read(folder / HOST),
        name=path.name,
        others=[Results(rows=read(other), name=other.name) for other in beside if other.name != path.name],
    )


def _audit(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def render(text: str, results: Results) -> str:
    """A page with its generated parts made anew.

    Raises:
        ValueError: the page has a part with an unknown name.
    """

    def part(match: re.Match[str]) -> str:
        if match[2] not in PARTS:
            raise ValueError(f"{match[2]!r} is no generated part; there are {', '.join(PARTS)}")
        made = PARTS[match[2]](results) or "Not measured."
        return f"{match[1]}\n{made}\n\n{match[3]}"

    return PART.sub(part, text)


def _source(results: Results) -> str:
    """Where the figures come from."""
    first = results.rows[0]
    days = sorted({m.date[:10] for m in results.rows})
    rates = {}
    for dtype in ("float32", "bfloat16"):
        found = sorted(m.matrix_rate for m in results.rows if m.dtype == dtype and m.matrix_rate)
        if found:
            rates[dtype] = f"{1e-9 * found[0]:.0f} to {1e-9 * found[-1]:.0f} GFLOP/s in {dtype}"
    lines = [
        ["machine", first.machine],
        ["commit", ", ".join(sorted({m.commit for m in results.rows}))],
        ["date, PyTorch", f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, {first.torch}"],
        ["matrix rate", "; ".join(rates.values())],
        ["rows", f"`benchmarks/results/{results.name}`"],
        ["commands", "`python -m benchmarks run`, `python -m benchmarks page`"],
    ]
    return markdown_table(["", ""], lines)


QUESTIONS: list[tuple[str, dict[str, Any], str]] = [
    (
        "training pass of REM's decoder, forward + backward, float32",
        {"op": "decoder", "shape": "rem_train", "mode": "pop", "dtype": "float32", "direction": BOTH},
        THEIRS,
    ),
    (
        "the same in bfloat16",
        {"op": "decoder", "shape": "rem_train", "mode": "pop", "dtype": "bfloat16", "direction": BOTH},
        THEIRS,
    ),
    (
        "POP alone at that shape, forward + backward, float32",
        {"op": "pop", "shape": "rem_train", "dtype": "float32", "direction": BOTH},
        THEIRS,
    ),
    (
        "retention, 4096 tokens, chunkwise, forward",
        {"op": "retention", "shape": "long", "mode": "chunkwise", "dtype": "float32", "direction": FORWARD},
        THEIRS,
    ),
    (
        "retention, 4096 tokens, chunkwise, forward + backward",
        {"op": "retention", "shape": "long", "mode": "chunkwise", "dtype": "float32", "direction": BOTH},
        THEIRS,
    ),
    (
        "the same beside causal attention",
        {"op": "retention", "shape": "long", "mode": "chunkwise", "dtype": "float32", "direction": BOTH},
        "attention",
    ),
    (
        "retention of one token from a state, batch 1",
        {"op": "retention", "shape": "token", "size": 1, "mode": "recurrent"},
        THEIRS,
    ),
    (
        "imagination step of REM's decoder, batch 64, float32",
        {"op": "imagination", "shape": "rem_64", "dtype": "float32"},
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
"""The main questions, the rows that answer them, and the rivals."""

IN_README = (0, 4, 8, 9)


def _answers(results: Results, questions: Iterable[tuple[str, dict[str, Any], str]]) -> str:
    body = []
    for name, wanted, other in questions:
        ours, theirs = results.ours(computes="", **wanted), results.theirs(other, **wanted)
        if ours is not None and theirs is not None:
            body.append([name, _time(ours), f"{_time(theirs)}, {theirs.backend}", str(ratio(theirs, ours))])
    return markdown_table(["", "retpop", "other", "other / retpop"], body) if body else ""


def _measured_on(results: Results) -> str:
    commits = ", ".join(sorted({m.commit for m in results.rows}))
    machine = results.rows[0].machine
    return f"`python -m benchmarks run` on {machine}, commit {commits}; medians and quartiles."


def _overview(results: Results) -> str:
    table = _answers(results, QUESTIONS)
    return table and f"{table}\n\n{_measured_on(results)}"


def _summary(results: Results) -> str:
    """The README's."""
    table = _answers(results, [QUESTIONS[i] for i in IN_README])
    pictures = _pictures("docs/performance", "imagination")
    return table and f"{table}\n\n{_measured_on(results)}\n\n{pictures}".rstrip()


ALTERNATIVES = {
    "training": "Bars: time of a training pass of each implementation",
    "imagination": "Lines: time of an imagined observation over its tokens",
    "scaling": "Lines: time and memory over the length of a sequence",
    "decoding": "Lines: time of a token over its position",
    "modes": "Bars: how many times as long yet-another-retnet takes, by mode",
}
"""The pictures in the order of the page, with their alternative texts."""


def _pictures(folder: str, *names: str) -> str:
    """Links to the pictures that could be drawn."""
    there = [name for name in names if (PICTURES / f"{name}.svg").exists()]
    return "\n\n".join(f"![{ALTERNATIVES[name]}]({folder}/{name}.svg)" for name in there)


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
    verdicts = [
        {j.target.name: f"{j.figure.text}, {j.verdict}" for j in judge(other) if j.figure}
        for other in results.others
    ]
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
    machines = [x.rows[0].machine for x in (results, *results.others) if x.rows]
    files = ", ".join(f"`benchmarks/results/{x.name}`" for x in results.others)
    return f"{markdown_table(['what', 'wanted', *machines], body)}\n\nFrom {files}." if body else ""


def _table(measurements: Iterable[Measurement], share: str = "of the matrix rate") -> str:
    """A line a row; times are compared with ours of the same group."""
    body = []
    for group in by_group(measurements).values():
        for m in _best_chunks(group):
            ours = next((r for r in group if r.backend == "torch" and r.direction == m.direction), None)
            body.append(
                [
                    _name(m),
                    m.dtype,
                    _who(m),
                    m.direction,
                    _time(m),
                    "" if m.peak_bytes is None else size_of(m.peak_bytes),
                    "" if m.fraction is None else f"{m.fraction:.0%}",
                    _against(m, ours),
                ]
            )
    heading = ["what", "dtype", "by", "pass", "time", "memory", share, "times ours"]
    return markdown_table(heading, body) if body else ""


def _best_chunks(group: list[Measurement]) -> list[Measurement]:
    """A group without the rows whose chunk size is beaten by another size in the same pass."""
    chunked = [m for m in group if m.backend.startswith(f"{THEIRS}, chunks")]
    best = [fastest(m for m in chunked if m.direction == direction) for direction in (FORWARD, BOTH)]
    return [m for m in group if m not in chunked or m in best]


def _name(m: Measurement) -> str:
    return f"{m.mode}, {m.sizes}" if m.sizes else m.mode


def _who(m: Measurement) -> str:
    return f"**retpop**, {m.backend}" if m.is_ours else m.backend


def _time(m: Measurement) -> str:
    if not m.samples:
        return ""
    low, high = m.spread
    return f"{duration(m.seconds)} ({duration(low)} to {duration(high)})"


def _against(m: Measurement, ours: Measurement | None) -> str:
    wrong = next((each for each in (m, ours) if each is not None and each.verdict != RIGHT), None)
    if wrong is not None:
        return f"no ratio: {'ours is ' if wrong is ours else ''}{wrong.verdict} ({wrong.note})"
    return "" if ours is None or m is ours else f"{ratio(m, ours).middle:.2f}x"


def _training(results: Results) -> str:
    return _table(m for m in results.rows if has(m, op="decoder", shape="rem_train"))


def _operations(results: Results) -> str:
    wanted = (m for m in results.rows if m.op in ("retention", "pop") and not is_series(m))
    return _table(m for m in wanted if m.shape != "tiny")


def _scaling(results: Results) -> str:
    body = []
    for direction in (FORWARD, BOTH):
        for what, value in VALUES.items():
            for backend in ("torch", f"{THEIRS}, chunks of 128", "attention"):
                wanted = {"op": "retention", "direction": direction}
                length = series(results, backend, value, shape="length", **wanted)
                length = [(x, y) for x, y in length if x <= LONGEST_FIT]
                batch = series(results, backend, value, shape="batch", **wanted)
                if len(length) > 2:
                    name = "**retpop**, torch" if backend == "torch" else backend
                    slopes = [f"{slope(x):.2f}" if len(x) > 2 else "" for x in (length, batch)]
                    body.append([name, direction, what, *slopes])
    heading = ["by", "pass", "", "slope over 1k to 16k tokens", "slope over the batch, 1 to 32"]
    return markdown_table(heading, body) if body else ""


def _series_table(results: Results, op: str, shape: str, along: str) -> str:
    rows = [m for m in results.rows if has(m, op=op, shape=shape)]
    sizes = sorted({m.size for m in rows})
    body = []
    for backend in dict.fromkeys(m.backend for m in rows):
        own = {m.size: m for m in rows if m.backend == backend}
        cells = [
            "" if size not in own else _time(own[size]) if own[size].verdict == RIGHT else own[size].verdict
            for size in sizes
        ]
        body.append([_who(next(iter(own.values()))), *cells])
    return markdown_table([along, *(f"{size:,}" for size in sizes)], body) if body else ""


def _imagination(results: Results) -> str:
    table = _series_table(results, "imagination", "tokens", "tokens of an observation")
    if not table:
        return ""
    steps = (m for m in results.rows if m.op == "imagination" and not m.size and m.shape != "tiny")
    calls = _table(m for m in results.rows if m.op == "agent" and m.shape != "tiny")
    parts = [table, "A step of REM's decoder (129 tokens a row):", _table(steps)]
    if calls:
        parts += ["In the whole agent, heads, controller and draws included:", calls]
    return "\n\n".join(parts)


def _losses(results: Results) -> str:
    """Rows in which a rival takes less time than our fastest equal contender, beyond the spread."""
    lines = []
    for group in by_group(m for m in results.rows if m.shape != "tiny" and m.verdict == RIGHT).values():
        for direction in dict.fromkeys(m.direction for m in group):
            sides = [m for m in group if m.direction == direction]
            ours = fastest(m for m in sides if m.is_ours and not m.computes)
            for other in (m for m in sides if not m.is_ours):
                if ours is None or (found := ratio(other, ours)).high >= 1:
                    continue
                size = f" {other.size:,}" if other.size else ""
                what = f"{other.op}, {other.shape}{size}, {_name(other)}, {other.dtype}, {direction}"
                computes = f" ({other.computes})" if other.computes else ""
                lines.append(f"- {what}: {other.backend}{computes} takes {found} our time.")
    return "\n".join(lines) or "Nowhere, in these results."


def _gpu(results: Results) -> str:
    """The GPU's report, if there is one."""
    rows = [m for m in results.gpu if m.samples and m.op != "tests"]
    if not rows:
        return (
            "No GPU was measured: nothing here says how fast the kernels are. `benchmarks/gpu_report.sh` "
            "measures them in 8 minutes."
        )
    said = f"{rows[0].machine}, commit {rows[0].commit}, torch {rows[0].torch}."
    return f"{said}\n\n{_table(rows, share='of its floor')}"


PARTS: dict[str, Callable[[Results], str]] = {
    "source": _source,
    "pictures": lambda results: _pictures("performance", *ALTERNATIVES),
    "overview": _overview,
    "summary": _summary,
    "targets": _targets,
    "others": _others,
    "training": _training,
    "operations": _operations,
    "scaling": _scaling,
    "decoding": lambda results: _series_table(results, "step", "position", "position"),
    "imagination": _imagination,
    "losses": _losses,
    "gpu": _gpu,
}
"""Each generated part of a page, by the name that marks it there."""

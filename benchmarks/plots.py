"""The pictures of the performance page, drawn from results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.page import PICTURES
from benchmarks.peers.yet_another_retnet import NAME as THEIRS
from benchmarks.records import RIGHT, Record, ratio
from benchmarks.targets import OURS, Results, is_ours, series
from benchmarks.text import duration, size_of
from benchmarks.work import BOTH, FORWARD

BLUE, ORANGE, GREEN, GREY = "#2a6f97", "#c7741b", "#5b8c5a", "#8a8a8a"
LIGHT = {BLUE: "#9fc3d8", ORANGE: "#e6c49d", GREEN: "#b5ceb4", GREY: "#cfcfcf"}

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.hashsalt": "retpop",
}

Draw = Callable[[Results], Figure | None]


def training(results: Results) -> Figure | None:
    """Bars: forward and backward of REM's decoder, by who computes it and in which dtype."""
    wanted = {"op": "decoder", "shape": "rem_train", "mode": "pop", "direction": BOTH}
    found = [r for dtype in ("float32", "bfloat16") for r in results.of(dtype=dtype, **wanted)]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(7.4, 0.36 * len(found) + 1.1), layout="constrained")
    labels = [f"{_who(record)}, {record.dtype}" for record in found]
    for place, record in enumerate(found):
        _bar(axes, place, record)
    axes.set_yticks(range(len(found)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds; in brackets: share of the matrix rate of the same run")
    axes.set_xlim(0, 1.25e3 * max(record.seconds for record in found))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_title("POP of REM's decoder, forward and backward")
    return figure


def _bar(axes: Axes, place: int, record: Record) -> None:
    low, high = record.spread
    color = BLUE if is_ours(record) else GREY if record.computes else ORANGE
    axes.barh(place, 1e3 * record.seconds, color=color, height=0.66)
    axes.plot([1e3 * low, 1e3 * high], [place, place], color="#333", linewidth=1.2)
    share = "" if record.fraction is None else f"  ({record.fraction:.0%})"
    axes.text(1e3 * high, place, f"  {1e3 * record.seconds:.0f} ms{share}", va="center", fontsize=9)


def modes(results: Results) -> Figure | None:
    """Bars: how many times as long yet-another-retnet's best takes as ours, by mode, shape and pass."""
    names = []
    for shape in ("rem_train", "long"):
        for mode in ("chunkwise", "parallel", "recurrent"):
            for direction in (FORWARD, BOTH):
                wanted = {"op": "retention", "shape": shape, "mode": mode, "direction": direction}
                ours, theirs = (side(dtype="float32", **wanted) for side in (results.ours, results.theirs))
                if ours is not None and theirs is not None:
                    name = f"{mode}, T {_tokens(ours)}, {direction}"
                    names.append((name, ratio(theirs, ours).middle))
    if not names:
        return None
    figure, axes = plt.subplots(figsize=(7.4, 0.34 * len(names) + 1.1), layout="constrained")
    for place, (_, value) in enumerate(names):
        axes.barh(place, value, color=BLUE if value >= 1 else ORANGE, height=0.66)
        axes.text(value, place, f"  {value:.2f}x", va="center", fontsize=9)
    axes.axvline(1, color="#333", linewidth=1)
    axes.set_yticks(range(len(names)), [name for name, _ in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=f"time of {THEIRS} over ours; its fastest chunk size")
    axes.set_xlim(0, 1.14 * max(value for _, value in names))
    axes.set_title("Retention, float32: above 1 we are faster")
    return figure


def _tokens(record: Record) -> str:
    return next(part[1:] for part in record.sizes.split() if part.startswith("T"))


def scaling(results: Results) -> Figure | None:
    """Time and memory of a forward pass over the length of a sequence."""
    wanted = {"op": "retention", "shape": "length", "direction": FORWARD}
    lines = [
        ("retpop, chunkwise", "torch", BLUE, "o"),
        (f"{THEIRS}, chunks of 128", f"{THEIRS}, chunks of 128", ORANGE, "s"),
        ("causal attention (torch)", "attention", GREY, "^"),
    ]
    figure, pair = plt.subplots(1, 2, figsize=(7.8, 3.4), layout="constrained")
    drawn = False
    for axes, value, title, text in (
        (pair[0], lambda r: r.seconds, "time", duration),
        (pair[1], lambda r: r.peak_bytes, "memory beyond the inputs", size_of),
    ):
        for label, backend, color, marker in lines:
            points = series(results, backend, value, **wanted)
            if len(points) > 1:
                drawn = True
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label)
        _logarithmic(axes, text)
        axes.set(xlabel="tokens")
        axes.set_title(title)
    if not drawn:
        plt.close(figure)
        return None
    pair[1].legend(loc="upper left", fontsize=9)
    return figure


def decoding(results: Results) -> Figure | None:
    """Time of one token over its position."""
    wanted = {"op": "step", "shape": "position"}
    return _series_figure(
        results,
        [
            ("retpop: a state of constant size", "torch", BLUE, "o"),
            (THEIRS, THEIRS, ORANGE, "s"),
            ("transformer: a cache of keys and values", "transformer", GREY, "^"),
        ],
        "position of the token",
        "One token of a decoder of REM's size",
        wanted,
    )


def imagination(results: Results) -> Figure | None:
    """Time of one imagined observation over its number of tokens."""
    wanted = {"op": "imagination", "shape": "tokens"}
    return _series_figure(
        results,
        [
            ("retpop: POP, one pass", "torch", BLUE, "o"),
            (f"{THEIRS}: two passes", THEIRS, ORANGE, "s"),
            ("retpop, token by token", "retnet, token by token", GREEN, "D"),
            ("transformer, token by token", "transformer, token by token", GREY, "^"),
        ],
        "tokens of an observation",
        "Imagining one observation in each of 8 episodes",
        wanted,
    )


def _series_figure(
    results: Results,
    lines: Sequence[tuple[str, str, str, str]],
    along: str,
    title: str,
    wanted: dict[str, object],
) -> Figure | None:
    figure, axes = plt.subplots(figsize=(7.4, 3.6), layout="constrained")
    drawn = False
    for label, backend, color, marker in lines:
        points = series(results, backend, lambda r: r.seconds, **wanted)
        if len(points) > 1:
            drawn = True
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label)
    if not drawn:
        plt.close(figure)
        return None
    _logarithmic(axes, duration)
    axes.set(xlabel=along)
    axes.set_title(title)
    axes.legend(fontsize=9)
    return figure


def _logarithmic(axes: Axes, text: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({float(x) for line in axes.get_lines() for x in line.get_xdata()})
    axes.set_xticks(sizes, [_short(x) for x in sizes])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _short(count: float) -> str:
    return f"{count / 1024:.0f}k" if count >= 1024 else f"{count:.0f}"


def _who(record: Record) -> str:
    if record.backend in OURS:
        return f"retpop, {record.backend}"
    return f"retpop, {record.backend.partition(', ')[2]}" if is_ours(record) else record.backend


PLOTS: dict[str, Draw] = {
    "training": training,
    "modes": modes,
    "scaling": scaling,
    "decoding": decoding,
    "imagination": imagination,
}
"""By the names of their files."""


def digest(results: Results) -> str:
    """Of all times and bytes that a picture may show: it stands in the picture."""
    shown = [(r.key, r.samples, r.peak_bytes, r.matrix_rate) for r in results.records if r.verdict == RIGHT]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def write(results: Results, folder: Path = PICTURES, formats: Sequence[str] = ("svg",)) -> list[Path]:
    """Draw what there are results for; returns the files. What cannot be drawn any more is deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for name, draw in PLOTS.items():
            figure = draw(results)
            if figure is None:
                for kind in formats:
                    (folder / f"{name}.{kind}").unlink(missing_ok=True)
                continue
            for kind in formats:
                path = folder / f"{name}.{kind}"
                metadata = {"Date": None, "Description": digest(results)} if kind == "svg" else {}
                figure.savefig(path, metadata=metadata, dpi=160)
                written.append(path)
            plt.close(figure)
    return written

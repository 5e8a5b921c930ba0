"""The pictures of the performance page, drawn from results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.measurements import RIGHT, Measurement, ratio
from benchmarks.page import PICTURES
from benchmarks.peers.yet_another_retnet import NAME as THEIRS
from benchmarks.targets import VALUES, Results, Value, series
from benchmarks.text import duration, size_of
from benchmarks.work import BACKENDS, BOTH, FORWARD

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
    """Bars: forward and backward of REM's decoder, by implementation and dtype."""
    wanted = {"op": "decoder", "shape": "rem_train", "mode": "pop", "direction": BOTH}
    found = [r for dtype in ("float32", "bfloat16") for r in results.of(dtype=dtype, **wanted)]
    if not found:
        return None
    figure, axes = _bars([f"{_who(m)}, {m.dtype}" for m in found], 0.36)
    for place, m in enumerate(found):
        low, high = m.spread
        color = BLUE if m.is_ours else GREY if m.computes else ORANGE
        axes.barh(place, 1e3 * m.seconds, color=color, height=0.66)
        axes.plot([1e3 * low, 1e3 * high], [place, place], color="#333", linewidth=1.2)
        share = "" if m.fraction is None else f"  ({m.fraction:.0%})"
        axes.text(1e3 * high, place, f"  {1e3 * m.seconds:.0f} ms{share}", va="center", fontsize=9)
    axes.set(xlabel="milliseconds; in brackets: share of the matrix rate of the same run")
    axes.set_xlim(0, 1.25e3 * max(m.seconds for m in found))
    axes.set_title("POP of REM's decoder, forward and backward")
    return figure


def modes(results: Results) -> Figure | None:
    """Bars: how many times as long yet-another-retnet's best takes as ours, by mode, shape and pass."""
    found = []
    for shape, mode, direction in product(
        ("rem_train", "long"), ("chunkwise", "parallel", "recurrent"), (FORWARD, BOTH)
    ):
        wanted = {"op": "retention", "shape": shape, "mode": mode, "direction": direction}
        ours, theirs = (side(dtype="float32", **wanted) for side in (results.ours, results.theirs))
        if ours is not None and theirs is not None:
            tokens = next(part[1:] for part in ours.sizes.split() if part.startswith("T"))
            found.append((f"{mode}, T {tokens}, {direction}", ratio(theirs, ours).middle))
    if not found:
        return None
    figure, axes = _bars([name for name, _ in found], 0.34)
    for place, (_, value) in enumerate(found):
        axes.barh(place, value, color=BLUE if value >= 1 else ORANGE, height=0.66)
        axes.text(value, place, f"  {value:.2f}x", va="center", fontsize=9)
    axes.axvline(1, color="#333", linewidth=1)
    axes.set(xlabel=f"time of {THEIRS} over ours; its fastest chunk size")
    axes.set_xlim(0, 1.14 * max(value for _, value in found))
    axes.set_title("Retention, float32: above 1 we are faster")
    return figure


def _bars(labels: Sequence[str], height: float) -> tuple[Figure, Axes]:
    """Room for a horizontal bar a label, from top to bottom."""
    figure, axes = plt.subplots(figsize=(7.4, height * len(labels) + 1.1), layout="constrained")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure, axes


def scaling(results: Results) -> Figure | None:
    """Time and memory of a forward pass over the length of a sequence."""
    lines = [
        ("retpop, chunkwise", "torch", BLUE, "o"),
        (f"{THEIRS}, chunks of 128", f"{THEIRS}, chunks of 128", ORANGE, "s"),
        ("causal attention (torch)", "attention", GREY, "^"),
    ]
    figure, pair = plt.subplots(1, 2, figsize=(7.8, 3.4), layout="constrained")
    drawn = [
        _lines(axes, results, lines, value, text, op="retention", shape="length", direction=FORWARD)
        for axes, value, text in ((pair[0], _seconds, duration), (pair[1], VALUES["memory"], size_of))
    ]
    for axes, title in zip(pair, ("time", "memory beyond the inputs"), strict=True):
        axes.set(xlabel="tokens", title=title)
    return _with_legend(figure, pair[1], any(drawn), loc="upper left")


def decoding(results: Results) -> Figure | None:
    """Time of one token over its position."""
    lines = [
        ("retpop: a state of constant size", "torch", BLUE, "o"),
        (THEIRS, THEIRS, ORANGE, "s"),
        ("transformer: a cache of keys and values", "transformer", GREY, "^"),
    ]
    figure, axes = plt.subplots(figsize=(7.4, 3.6), layout="constrained")
    drawn = _lines(axes, results, lines, _seconds, duration, op="step", shape="position")
    axes.set(xlabel="position of the token", title="One token of a decoder of REM's size")
    return _with_legend(figure, axes, drawn)


def imagination(results: Results) -> Figure | None:
    """Time of one imagined observation over its number of tokens."""
    lines = [
        ("retpop: POP, one pass", "torch", BLUE, "o"),
        (f"{THEIRS}: two passes", THEIRS, ORANGE, "s"),
        ("retpop, token by token", "retnet, token by token", GREEN, "D"),
        ("transformer, token by token", "transformer, token by token", GREY, "^"),
    ]
    figure, axes = plt.subplots(figsize=(7.4, 3.6), layout="constrained")
    drawn = _lines(axes, results, lines, _seconds, duration, op="imagination", shape="tokens")
    axes.set(xlabel="tokens of an observation", title="Imagining one observation in each of 8 episodes")
    return _with_legend(figure, axes, drawn)


def _seconds(m: Measurement) -> float:
    return m.seconds


def _lines(
    axes: Axes,
    results: Results,
    lines: Sequence[tuple[str, str, str, str]],
    value: Value,
    text: Callable[[float], str],
    **wanted: object,
) -> bool:
    """A line for each (label, backend, color, marker) that has points; whether there is one."""
    for label, backend, color, marker in lines:
        points = series(results, backend, value, **wanted)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label)
    if axes.get_lines():
        _logarithmic(axes, text)
    return bool(axes.get_lines())


def _with_legend(figure: Figure, axes: Axes, drawn: bool, loc: str = "best") -> Figure | None:
    """The figure with a legend; None if nothing was drawn."""
    if not drawn:
        plt.close(figure)
        return None
    axes.legend(loc=loc, fontsize=9)
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


def _who(m: Measurement) -> str:
    if m.backend in BACKENDS:
        return f"retpop, {m.backend}"
    return f"retpop, {m.backend.partition(', ')[2]}" if m.is_ours else m.backend


PLOTS: dict[str, Draw] = {
    "training": training,
    "modes": modes,
    "scaling": scaling,
    "decoding": decoding,
    "imagination": imagination,
}
"""Each plot, by the name of its file."""


def digest(results: Results) -> str:
    """A hash of all times and bytes that a picture may show. It is written into the picture and shows when
    one is out of date."""
    shown = [(r.key, r.samples, r.peak_bytes, r.matrix_rate) for r in results.rows if r.verdict == RIGHT]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def write(results: Results, folder: Path = PICTURES, formats: Sequence[str] = ("svg",)) -> list[Path]:
    """Draw the pictures that there are results for and delete the others; returns the files."""
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

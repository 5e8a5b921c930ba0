"""The report's curves, drawn as inline SVG in the page's colours."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rem_atari.report.history import MetricLine, Series, returns_of, values_of
from rem_atari.runs.durable import replace_file
from rem_atari.runs.reading import is_number

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 10, 34
MAX_MARKED_POINTS = 40
LOG_RATIO = 50.0
"""A chart of positive values whose largest is this many times the smallest gets a logarithmic axis."""

COLOURS = ("#2f6fb0", "#c8641b", "#3f8f5f")


FLAT = 1e-9
"""Values that differ by less than this share of the largest are drawn as one height."""

LARGEST, SMALLEST = 1e290, 1e-290
"""Sizes that can be drawn without an overflow: larger values are drawn at the edge, smaller ones as 0."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A small chart.

    Attributes:
        title: what is drawn, with its unit.
        x_label: what x is.
        series: the curves; points that are not finite are not drawn, nor curves without another point.
        level: name and height of a horizontal line to compare with, or None.
    """

    title: str
    x_label: str
    series: list[Series]
    level: tuple[str, float] | None = None

    @property
    def drawn(self) -> list[Series]:
        """The drawable parts of the curves that have any."""
        return [series for series in map(_drawable, self.series) if series.x]

    @property
    def heights(self) -> list[float]:
        """All heights that the y axis must span."""
        level = [] if self.level is None or not math.isfinite(self.level[1]) else [_in_reach(self.level[1])]
        bands = [bound for series in self.drawn for bound in (series.low or []) + (series.high or [])]
        return [y for series in self.drawn for y in series.y] + bands + level


def _drawable(series: Series) -> Series:
    """The finite points of a series, clamped to the drawable range; a bound of the band that is not finite
    becomes the curve."""
    low, high = series.low or series.y, series.high or series.y
    rows = [
        tuple(_in_reach(value if math.isfinite(value) else y) for value in (x, y, bottom, top))
        for x, y, bottom, top in zip(series.x, series.y, low, high, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    x, y, bottom, top = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    has_band = series.low is not None and series.high is not None
    return Series(series.name, x, y, low=bottom if has_band else None, high=top if has_band else None)


def _in_reach(value: float) -> float:
    return 0.0 if abs(value) < SMALLEST else min(max(value, -LARGEST), LARGEST)


LOSS_CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("tokenizer", "Tokenizer loss", (("loss", "all terms, weighted"),)),
    (
        "tokenizer",
        "Tokenizer: squared error of pixels in [−1, 1]",
        (("reconstruction", "all pixels"), ("foreground_error", "foreground")),
    ),
    ("tokenizer", "Tokenizer: codes used in a batch", (("codes_used", "codes"),)),
    ("tokenizer", "Tokenizer: patches that have a code", (("codes", "codes"),)),
    (
        "world_model",
        "World model: cross-entropy, nats",
        (("tokens", "next tokens"), ("reward", "reward"), ("end", "end")),
    ),
    (
        "world_model",
        "World model: accuracy in training",
        (("token_accuracy", "next tokens"), ("reward_accuracy", "reward"), ("end_accuracy", "end")),
    ),
    ("controller", "Controller: imagined rewards up to the end", (("imagined_return", "undiscounted sum"),)),
    ("controller", "Controller: imagined bonus for what is new, a step", (("imagined_bonus", "mean"),)),
    ("controller", "Controller: loss of the value", (("value", "squared error"),)),
    ("controller", "Controller: entropy of the policy, nats", (("entropy", "entropy"),)),
)
"""Phase, title, and metric with its legend, of every chart over epochs."""


def charts_of(lines: Sequence[MetricLine]) -> list[Chart]:
    """Every chart with at least one point in the run's metrics, returns first."""
    charts = [_returns_chart(lines)]
    for phase, title, metrics in LOSS_CHARTS:
        series = [
            Series(legend, [epoch + 1 for epoch in curve.x], curve.y)  # epochs are shown from 1
            for metric, legend in metrics
            for curve in [values_of(lines, phase, metric)]
        ]
        charts.append(Chart(title=title, x_label="epoch", series=series))
    return [chart for chart in charts if chart.drawn]


def _returns_chart(lines: Sequence[MetricLine]) -> Chart:
    """Mean returns while collecting and evaluating over environment steps, beside random play's."""
    random = returns_of(lines, "random")
    collected = values_of(lines, "collect", "mean_game_return", x="env_steps")
    evaluated = [
        line
        for line in lines
        if line.get("phase") == "evaluate"
        and all(
            is_number(line.get(name)) for name in ("env_steps", "mean_return", "min_return", "max_return")
        )
    ]
    evaluation = Series(
        "evaluation, with its range",
        [float(line["env_steps"]) for line in evaluated],
        [float(line["mean_return"]) for line in evaluated],
        low=[float(line["min_return"]) for line in evaluated],
        high=[float(line["max_return"]) for line in evaluated],
    )
    return Chart(
        title="Return of a game",
        x_label="environment steps",
        series=[evaluation, Series("while collecting", collected.x, collected.y)],
        level=None if random is None else ("random play", random.mean),
    )


@dataclass(frozen=True)
class Axis:
    """One axis: the values at its ends, its ticks, whether it is logarithmic, and the pixels it spans."""

    low: float
    high: float
    ticks: list[float]
    log: bool
    start: float
    stop: float

    def place(self, value: float) -> float:
        """Pixel position of `value`."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.stop - self.start)


def make_axis(
    values: Sequence[float], *, start: float, stop: float, may_log: bool = False, smallest_step: float = 0.0
) -> Axis:
    """An axis over `values` (at least one) with ticks at round numbers, at least `smallest_step` apart."""
    low, high = _in_reach(min(values)), _in_reach(max(values))
    if may_log and low > 0 and high / low > LOG_RATIO:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = max(1, math.ceil((last - first) / 4))
        ticks = [10.0**power for power in range(first, last + 1, step)]
        return Axis(10.0**first, 10.0**last, ticks, True, start, stop)
    largest = max(abs(low), abs(high))
    if high - low <= FLAT * largest:
        low, high = (low - 0.1 * largest, high + 0.1 * largest) if largest > 0 else (-1.0, 1.0)
    step = max(_round_step((high - low) / 4), smallest_step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 12 - math.floor(math.log10(step))
    ticks = [round(index * step, digits) for index in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks, False, start, stop)


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(
        factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9)
    )


def tick_text(value: float) -> str:
    """A tick's number, short: 12k, 0.05, 1e-4, 2e+9."""
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        exact = f"{value:.0e}" if float(f"{value:.0e}") == value else f"{value:.3g}"
        return exact.replace("e-0", "e-").replace("e+0", "e+").replace("-", "−")
    text = f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
    return text.replace("-", "−")


def chart_svg(chart: Chart) -> str:
    """The chart as an inline SVG element; colours come from the page's style sheet."""
    xs = [x for series in chart.drawn for x in series.x]
    x_axis = make_axis(xs, start=LEFT, stop=WIDTH - RIGHT, smallest_step=1.0)
    y_axis = make_axis(chart.heights, start=HEIGHT - BOTTOM, stop=TOP, may_log=chart.level is None)
    parts = [*_grid(x_axis, y_axis, chart.x_label)]
    if chart.level is not None and math.isfinite(chart.level[1]):
        y = y_axis.place(_in_reach(chart.level[1]))
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for index, series in enumerate(chart.drawn):
        parts.extend(_curve(series, x_axis, y_axis, index))
    label = escape(f"{chart.title} over {chart.x_label}")
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _grid(x_axis: Axis, y_axis: Axis, x_label: str) -> list[str]:
    """Horizontal grid lines with their numbers, and the numbers below the x axis."""
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{tick_text(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _curve(series: Series, x_axis: Axis, y_axis: Axis, index: int) -> list[str]:
    """A series: its band, its line, and dots with tooltips where they are few enough to tell apart."""
    points = [(x_axis.place(x), y_axis.place(y)) for x, y in zip(series.x, series.y, strict=True)]
    parts = []
    if series.low is not None and series.high is not None:
        for x, low, high in zip(series.x, series.low, series.high, strict=True):
            at, top, bottom = x_axis.place(x), y_axis.place(high), y_axis.place(low)
            parts.append(
                f'<line class="range s{index}" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline class="curve s{index}" points="{path}"/>')
    if len(points) <= MAX_MARKED_POINTS:
        for (x, y), real_x, real_y in zip(points, series.x, series.y, strict=True):
            tip = escape(f"{series.name}: {real_y:.4g} at {real_x:g}")
            dot = f'class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"'
            parts.append(f"<circle {dot}><title>{tip}</title></circle>")
    return parts


def save_curves(path: Path, charts: Sequence[Chart]) -> None:
    """Save the charts, three a row, as a PNG."""
    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure = Figure(figsize=(4.4 * columns, 2.9 * rows), dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    # Margins in inches: the constrained layout would measure every text twice, which takes seconds.
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.6 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.35 / height,
        wspace=0.25,
        hspace=0.4,
    )
    for axes, chart in zip(grid, charts, strict=False):
        _draw_chart(axes, chart)
    for axes in grid[len(charts) :]:
        axes.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_file(path, buffer.getvalue())


def _draw_chart(axes: Axes, chart: Chart) -> None:
    for colour, series in zip(COLOURS, chart.drawn, strict=False):
        if series.low is not None and series.high is not None:
            axes.vlines(series.x, series.low, series.high, color=colour, alpha=0.3, linewidth=3)
        axes.plot(series.x, series.y, marker="o", markersize=3, color=colour, label=series.name)
    if chart.level is not None and math.isfinite(chart.level[1]):
        name, height = chart.level
        axes.axhline(_in_reach(height), color="#777777", linestyle="--", linewidth=1, label=name)
    lowest, highest = min(chart.heights), max(chart.heights)
    if chart.level is None and lowest > 0 and highest / lowest > LOG_RATIO:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_title(chart.title, fontsize=10)
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)

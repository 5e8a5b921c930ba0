"""Aggregates with their intervals, and performance profiles, as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rem_atari.runs.durable import replace_file
from rem_atari.scores.aggregates import METRICS, THRESHOLDS, Aggregates

COLOURS = ("#2f6fb0", "#3f8f5f", "#8a5fb0", "#b0892f", "#4fa3a8", "#a8557a", "#777777", "#555588")
HIGHLIGHT = "#c8641b"


def plot_scores(path: Path, results: Sequence[Aggregates], *, highlight: str | None) -> None:
    """Draw the aggregates above and the profiles below, as a PNG.

    Args:
        path: the file; an earlier one is replaced.
        results: the agents, drawn in this order from top to bottom.
        highlight: the agent that stands out, or None.

    Raises:
        OSError: it cannot be written.
    """
    colours = {
        result.agent: HIGHLIGHT if result.agent == highlight else COLOURS[place % len(COLOURS)]
        for place, result in enumerate(results)
    }
    figure = Figure(figsize=(12.0, 3.6 + 0.32 * len(results) + 3.6), dpi=110)
    above, below = figure.subfigures(2, 1, height_ratios=[1.0 + 0.32 * len(results), 4.0])
    axes = above.subplots(1, len(METRICS), sharey=True)
    above.subplots_adjust(left=0.11, right=0.98, top=0.82, bottom=0.1, wspace=0.12)
    for place, (name, each) in enumerate(zip(METRICS, axes, strict=True)):
        _draw_metric(each, name, results, colours, is_first=place == 0)
    games = results[0].games
    above.suptitle(f"Human-normalised scores on {games} Atari game{'s' if games > 1 else ''}", fontsize=12)
    _draw_profiles(below.subplots(), results, colours, highlight)
    below.subplots_adjust(left=0.11, right=0.86, top=0.9, bottom=0.14)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_file(path, buffer.getvalue())


def _draw_metric(
    axes: Axes, name: str, results: Sequence[Aggregates], colours: dict[str, str], *, is_first: bool
) -> None:
    """A bar for each agent's interval with its value as a line; a dot where there is no interval."""
    for place, result in enumerate(results):
        estimate, colour = result.metrics[name], colours[result.agent]
        if estimate.interval is None:
            axes.plot(estimate.value, place, marker="o", color=colour)
            continue
        low, high = estimate.interval
        axes.barh(place, high - low, left=low, height=0.6, color=colour, alpha=0.75)
        axes.vlines(estimate.value, place - 0.3, place + 0.3, color="black", linewidth=1.2)
    # By default the axis ends at the bars' ends, where a line would be cut off.
    axes.use_sticky_edges = False
    axes.set_title(f"{name} ({'lower' if name == METRICS[-1] else 'higher'} is better)", fontsize=10)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_yticks(range(len(results)), [result.agent for result in results] if is_first else None)
    axes.tick_params(labelsize=9, left=False)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_profiles(
    axes: Axes, results: Sequence[Aggregates], colours: dict[str, str], highlight: str | None
) -> None:
    """Draw the share of scores above each threshold."""
    for result in results:
        colour, stands_out = colours[result.agent], result.agent == highlight
        width = 2.4 if stands_out else 1.3
        axes.step(THRESHOLDS, result.profile, where="post", color=colour, label=result.agent, linewidth=width)
        if result.profile_interval is not None:
            low, high = result.profile_interval
            axes.fill_between(THRESHOLDS, low, high, step="post", color=colour, alpha=0.12, linewidth=0)
    highest = max(float(np.max(THRESHOLDS[result.profile > 0], initial=1.0)) for result in results)
    axes.set_xlim(0, min(highest * 1.05, float(THRESHOLDS[-1])))
    axes.set_ylim(0, 1)
    axes.set_title("Performance profiles: share of runs with a score above τ", fontsize=10)
    axes.set_xlabel("human-normalised score τ", fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

"""A run's history: the lines of its metrics.jsonl, and numbers computed from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rem_atari.evaluation import standard_error
from rem_atari.runs.reading import is_number, read_json_lines
from rem_atari.training.schedule import UNITS

LINES_NAMED = 5
"""Most damaged lines that are named."""

COLLECTIONS = ("collect_random", "collect")
"""The phases that collect experience."""

MetricLine = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class Series:
    """A named curve: `y` over `x`; `low` and `high`, where given, bound a band around it."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseThroughput:
    """Work of one phase over the whole run.

    Attributes:
        phase: its name.
        seconds: wall time.
        share: share of the run's wall time.
        amount: units of work done, or None where the phase counts none.
        unit: the unit of work.
        rate: units a second over the phase's whole time, or None.
        frames_per_second: imagined frames a second (controller) over its whole time, or None.
        imagined_per_env_step: imagined frames for a step of the real game (controller), or None.
    """

    phase: str
    seconds: float
    share: float
    amount: float | None
    unit: str
    rate: float | None
    frames_per_second: float | None = None
    imagined_per_env_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Returns:
    """Returns of one policy.

    Attributes:
        mean: mean over episodes.
        standard_error: of that mean; None where single returns are unknown or too few.
        episodes: number of episodes.
        unfinished: how many of them were cut off by the evaluation's time limit.
    """

    mean: float
    standard_error: float | None
    episodes: int
    unfinished: int = 0


def values_of(lines: Sequence[MetricLine], phase: str, name: str, *, x: str = "epoch") -> Series:
    """The curve of metric `name` of `phase` over `x`; lines without a finite value are left out."""
    points = [
        (float(line[x]), float(line[name]))
        for line in lines
        if line.get("phase") == phase and is_number(line.get(name)) and is_number(line.get(x))
    ]
    return Series(name, [point[0] for point in points], [point[1] for point in points])


def late(series: Series) -> float:
    """Mean of the last quarter of a curve's values, of the last one at least."""
    return statistics.fmean(series.y[-max(1, len(series.y) // 4) :])


def was_trained(lines: Sequence[MetricLine], phase: str) -> bool:
    """Whether `phase` made at least one update."""
    return any(updates > 0 for updates in values_of(lines, phase, "updates").y)


def returns_of(lines: Sequence[MetricLine], phase: str) -> Returns | None:
    """Returns of the last line of `phase` ("evaluate" or "random"), or None if it never ran."""
    found = [line for line in lines if line.get("phase") == phase and is_number(line.get("mean_return"))]
    if not found:
        return None
    last = found[-1]
    listed = last.get("returns")
    returns = [float(value) for value in (listed if isinstance(listed, list) else ()) if is_number(value)]
    episodes = last.get("episodes")
    return Returns(
        mean=float(last["mean_return"]),
        standard_error=standard_error(returns),
        episodes=int(episodes) if is_number(episodes) else len(returns),
        unfinished=int(last["unfinished"]) if is_number(last.get("unfinished")) else 0,
    )


def reward_sizes(lines: Sequence[MetricLine]) -> tuple[float, float] | None:
    """The smallest and the largest absolute reward collected other than 0; None if none is known."""
    smallest = [size for phase in COLLECTIONS for size in values_of(lines, phase, "smallest_reward").y]
    largest = [size for phase in COLLECTIONS for size in values_of(lines, phase, "largest_reward").y]
    return (min(smallest), max(largest)) if smallest and largest else None


def verdict(agent: Returns, random: Returns) -> str:
    """Whether the agent's mean return differs from random play's by more than two standard errors of the gap.

    Returns:
        "above", "below" or "unclear" (also where a standard error is unknown).
    """
    if agent.standard_error is None or random.standard_error is None:
        return "unclear"
    gap = agent.mean - random.mean
    if abs(gap) <= 2.0 * math.hypot(agent.standard_error, random.standard_error):
        return "unclear"
    return "above" if gap > 0 else "below"


def throughput(lines: Sequence[MetricLine]) -> list[PhaseThroughput]:
    """Work, time and rate of every phase that ran, and the time between phases as "other"."""
    spent = {phase: sum(values_of(lines, phase, "phase_seconds").y) for phase in UNITS}
    total = max(total_seconds(lines), sum(spent.values()))
    rows = []
    for phase, unit in UNITS.items():
        if spent[phase] == 0:
            continue
        amount = sum(values_of(lines, phase, unit).y) or None
        per_step = values_of(lines, phase, "imagined_per_env_step").y
        rows.append(
            PhaseThroughput(
                phase=phase,
                seconds=spent[phase],
                share=spent[phase] / total,
                amount=amount,
                unit=unit,
                rate=None if amount is None else amount / spent[phase],
                frames_per_second=_rate(lines, phase, "frames_per_second"),
                imagined_per_env_step=next(iter(per_step[-1:]), None),
            )
        )
    rest = total - sum(spent.values())
    if rows and rest > 0.005 * total:
        other = PhaseThroughput(
            phase="other", seconds=rest, share=rest / total, amount=None, unit="", rate=None
        )
        rows.append(other)
    return rows


def _rate(lines: Sequence[MetricLine], phase: str, name: str) -> float | None:
    """The rate `name` of a phase over all its lines, as work over time; None without any."""
    rates = values_of(lines, phase, name, x="phase_seconds")
    seconds = sum(rates.x)
    return (
        sum(each * rate for each, rate in zip(rates.x, rates.y, strict=True)) / seconds if seconds else None
    )


def total_seconds(lines: Sequence[MetricLine]) -> float:
    """Wall time from the start of the run to its last line; 0 without lines."""
    return max((float(line["seconds"]) for line in lines if is_number(line.get("seconds"))), default=0.0)


def last_value(lines: Sequence[MetricLine], name: str) -> float | None:
    """The largest value that a counter such as `epoch` or `env_steps` reached, or None."""
    return max((float(line[name]) for line in lines if is_number(line.get(name))), default=None)


def read_lines(path: Path, notes: list[str]) -> list[MetricLine]:
    """The lines of a metrics file that can be read; a note is added for what is left out."""
    if not path.is_file():
        notes.append(f"There is no {path.name}: the run ended before it measured anything.")
        return []
    lines, unreadable = read_json_lines(path)
    if unreadable:
        named = ", ".join(map(str, unreadable[:LINES_NAMED]))
        named += " ..." if len(unreadable) > LINES_NAMED else ""
        total = len(lines) + len(unreadable)
        notes.append(f"{len(unreadable)} of {total} lines of {path.name} cannot be read: line {named}.")
    return lines

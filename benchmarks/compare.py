"""Two sets of measurements side by side: which rows became faster or slower, beyond noise and a limit.

One machine differs from day to day. So a second ratio divides each time by that of a matrix product timed in
turn with it. Slow moments of the machine cancel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.measurements import Measurement, Ratio, RefusedError, ratio
from benchmarks.text import duration, print_table

LIMIT = 1.05
"""Largest allowed ratio of a row's time to its time before."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row, before and after.

    Attributes:
        before, after: the two measurements.
        time: ratio of its time now to its time before.
        at_equal_rate: the same, each time in units of its run's matrix product.
        refused: the reason for a missing ratio, or "".
    """

    before: Measurement
    after: Measurement
    time: Ratio | None = None
    at_equal_rate: Ratio | None = None
    refused: str = ""

    def verdict(self, limit: float = LIMIT) -> str:
        """Faster, slower or equal by the quartiles; SLOWER if the median exceeds the limit too."""
        found = self.at_equal_rate
        if found is None:
            return f"refused: {self.refused}"
        if found.low > 1:
            return "SLOWER" if found.middle > limit else "slower"
        return "faster" if found.high < 1 else "equal"


def compare(before: Iterable[Measurement], after: Iterable[Measurement]) -> list[Change]:
    """The changes of the rows that both have, in the order of the first."""
    now = {m.key: m for m in after}
    return [change(m, now[m.key]) for m in before if m.key in now]


def change(before: Measurement, after: Measurement, *, in_turn: bool = False) -> Change:
    """The change of one row; with ``in_turn`` samples were taken in turn and are compared one by one."""
    factor = after.matrix_rate / before.matrix_rate if before.matrix_rate and after.matrix_rate else 1.0
    old = replace(before, date=after.date if in_turn else "")
    try:
        time, equal = ratio(after, old), ratio(after, old, factor)
    except RefusedError as refused:
        return Change(before=before, after=after, refused=str(refused))
    return Change(before=before, after=after, time=time, at_equal_rate=equal)


def line(change: Change, limit: float = LIMIT) -> list[str]:
    """A change as cells under `HEADING`."""
    m = change.before
    name = f"{m.op}, {m.mode}, {m.shape}" + (f" {m.size}" if m.size else "")
    times = [duration(x.seconds) if x.samples else "" for x in (m, change.after)]
    ratios = ["", ""] if change.time is None else [str(change.time), str(change.at_equal_rate)]
    return [name, m.dtype, m.backend, m.direction, *times, *ratios, change.verdict(limit)]


HEADING = ["what", "dtype", "backend", "pass", "A", "B", "B / A", "at equal matrix rate", ""]


def report(changes: Sequence[Change], limit: float = LIMIT) -> int:
    """Print a line each and a sum; returns 1 if a row became slower by more than the limit, or wrong."""
    print_table(HEADING, [line(change, limit) for change in changes])
    verdicts = [change.verdict(limit) for change in changes]
    broken = [c for c in changes if c.refused and c.before.verdict == "right"]
    print(
        f"\nB is faster in {verdicts.count('faster')} of {len(changes)}, slower in "
        f"{verdicts.count('slower') + verdicts.count('SLOWER')}, by more than {limit - 1:.0%} in "
        f"{verdicts.count('SLOWER')}; not right any more: {len(broken)}"
    )
    return int(bool(broken) or "SLOWER" in verdicts)

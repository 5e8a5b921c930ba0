"""Two sets of results side by side: what became faster, what slower, and whether more than the noise.

Runs of two days see two machines even on one: besides the ratio of times stands that of the times in units of
the matrix product that was timed in turn with each, which a machine's mood divides out of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.kernel_audit import print_table
from benchmarks.records import Ratio, Record, RefusedError, ratio
from benchmarks.text import duration


@dataclass(frozen=True, kw_only=True)
class Change:
    """One measurement, before and after.

    Attributes:
        before, after: the two.
        time: how many times as long it takes now.
        at_equal_rate: the same with each in units of its run's matrix product.
        refused: why there is no ratio, or "".
    """

    before: Record
    after: Record
    time: Ratio | None = None
    at_equal_rate: Ratio | None = None
    refused: str = ""

    @property
    def verdict(self) -> str:
        """What the quartiles at equal rate say."""
        found = self.at_equal_rate
        if found is None:
            return ""
        return "faster" if found.high < 1 else "slower" if found.low > 1 else "equal"


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """The changes of what both have, in the order of the first."""
    now = {record.key: record for record in after}
    return [_change(record, now[record.key]) for record in before if record.key in now]


def _change(before: Record, after: Record) -> Change:
    # Of two runs, even of one commit: never sample by sample.
    old = replace(before, date="")
    try:
        time = ratio(after, old)
    except RefusedError as refused:
        return Change(before=before, after=after, refused=str(refused))
    factor = after.matrix_rate / before.matrix_rate
    equal = Ratio(low=time.low * factor, middle=time.middle * factor, high=time.high * factor)
    return Change(before=before, after=after, time=time, at_equal_rate=equal)


def print_changes(changes: Sequence[Change]) -> None:
    """A line each, and how many became faster and slower."""
    body = []
    for change in changes:
        record = change.before
        name = f"{record.op}, {record.mode}, {record.shape}" + (f" {record.size}" if record.size else "")
        times = [duration(x.seconds) if x.samples else "" for x in (record, change.after)]
        ratios = ["", ""] if change.time is None else [str(change.time), str(change.at_equal_rate)]
        body.append(
            [
                name,
                record.dtype,
                record.backend,
                record.direction,
                *times,
                *ratios,
                change.verdict or f"refused: {change.refused}",
            ]
        )
    print_table(["what", "dtype", "backend", "pass", "A", "B", "B / A", "at equal matrix rate", ""], body)
    verdicts = [change.verdict for change in changes]
    print(
        f"\nB is faster in {verdicts.count('faster')} of {len(changes)}, slower in {verdicts.count('slower')}"
    )

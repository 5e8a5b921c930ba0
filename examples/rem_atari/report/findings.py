"""What a check of a run found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check.

    Attributes:
        check: its name, for scripts.
        title: what it checks.
        sign: whether the sign is there; None if there is nothing (yet) that shows it.
        says: the figures in a sentence.
        advice: what to try; empty without a sign.
        figures: the same figures by name.
    """

    check: str
    title: str
    sign: bool | None
    says: str
    advice: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


def findings_of(check: str, title: str) -> Callable[..., Finding]:
    """Returns a function that makes the findings of one check; advice is only given with a sign."""

    def make(
        sign: bool | None, says: str, advice: str = "", figures: Mapping[str, float] | None = None
    ) -> Finding:
        return Finding(
            check=check,
            title=title,
            sign=sign,
            says=says,
            advice=advice if sign else "",
            figures=figures or {},
        )

    return make


def first_sign(findings: Sequence[Finding]) -> Finding | None:
    """The first check that found its sign; begin there."""
    return next((finding for finding in findings if finding.sign), None)

"""``rem-atari diagnose RUN``: signs of why a run does not learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rem_atari.arguments import DiagnoseArguments
from rem_atari.commands.counting import tell
from rem_atari.errors import RunError
from rem_atari.evaluation import describe_mean
from rem_atari.report.diagnosis import diagnose
from rem_atari.report.findings import Finding, first_sign
from rem_atari.report.heldout_signs import is_of_now
from rem_atari.report.history import MetricLine, Returns, last_value, read_lines, returns_of
from rem_atari.report.quality import QUALITY_FILE
from rem_atari.runs.folder import open_run_folder
from rem_atari.runs.reading import read_json

SCHEMA = 2
"""Version of the --json output; docs/does_not_learn.md describes it."""

WORDS = {True: "SIGN", False: "fine", None: "unknown"}


def diagnose_run(arguments: DiagnoseArguments) -> None:
    """Print the signs of why a run does not learn; the run may still train.

    Raises:
        UsageError: there is no run, or its configuration cannot be read.
        RunError: it has no metrics yet.
    """
    run = open_run_folder(arguments.run)
    config, notes = run.load_config(), []
    lines = read_lines(run.metrics, notes)
    if not lines:
        raise RunError(f"{run.metrics} has no line yet: there is nothing to diagnose")
    quality = read_json(run.path / QUALITY_FILE)
    if quality is not None and not is_of_now(quality, lines):
        notes.append(
            f"the run has gone on since {QUALITY_FILE} was measured, so it is not heeded; rem-atari report"
            " measures again"
        )
        quality = None
    for note in notes:
        tell(f"note: {note}")
    findings = diagnose(lines, config, quality)
    if arguments.json:
        print(json.dumps(as_data(str(run.path), lines, findings), indent=2, allow_nan=False))
    else:
        print(as_text(str(run.path), lines, findings))


def as_data(run: str, lines: Sequence[MetricLine], findings: Sequence[Finding]) -> dict[str, Any]:
    """The diagnosis as JSON data."""
    first = first_sign(findings)
    returns = {
        name: returns_of(lines, phase) for name, phase in (("agent", "evaluate"), ("random", "random"))
    }
    return {
        "schema": SCHEMA,
        "run": run,
        "epoch": _whole(last_value(lines, "epoch")),
        "env_steps": _whole(last_value(lines, "env_steps")),
        "returns": {name: None if found is None else asdict(found) for name, found in returns.items()},
        "first_sign": None if first is None else first.check,
        "checks": [asdict(finding) for finding in findings],
    }


def as_text(run: str, lines: Sequence[MetricLine], findings: Sequence[Finding]) -> str:
    """The diagnosis for a reader."""
    epoch, steps = last_value(lines, "epoch"), last_value(lines, "env_steps")
    agent, random = (_returns(returns_of(lines, phase)) for phase in ("evaluate", "random"))
    parts = [
        f"{run}: epoch {0 if epoch is None else epoch + 1:.0f}, {steps or 0:,.0f} environment steps",
        f"mean return: agent {agent}, random play {random}",
        "",
    ]
    for place, finding in enumerate(findings, start=1):
        parts.append(f"{place}. {finding.title}: {WORDS[finding.sign]}")
        parts.append(f"   {finding.says}")
        if finding.advice:
            parts.append(f"   Try: {finding.advice}")
    first = first_sign(findings)
    parts.append("")
    if first is None:
        parts.append("No sign is seen; docs/does_not_learn.md tells where to look next.")
    else:
        parts.append(f"Begin with the first sign: {first.title.lower()}. Those after it may follow from it.")
    return "\n".join(parts)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _returns(found: Returns | None) -> str:
    if found is None:
        return "not measured yet"
    return f"{describe_mean(found.mean, found.standard_error)} ({found.episodes} episodes)"

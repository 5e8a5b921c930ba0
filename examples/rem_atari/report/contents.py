"""What the report's page shows, gathered in one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rem_atari.config import Config
from rem_atari.report.comparisons import Comparison
from rem_atari.report.films import Scene
from rem_atari.report.history import MetricLine
from rem_atari.report.quality import Quality


@dataclass(frozen=True)
class RunFile:
    """A file or folder of the run: its name, what it is, and its size in bytes."""

    name: str
    purpose: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows.

    Attributes:
        game: name of the game.
        config: the run's configuration.
        versions: names and versions of the software.
        lines: lines of metrics.jsonl.
        sessions: lines of sessions.jsonl.
        command: the command that starts such a run again.
        notes: sentences on what is missing or unusual, shown at the top.
        step: number of the checkpoint whose weights were looked at, or None.
        quality: what was measured on held-out frames.
        scenes: imagined films; empty where none could be made.
        edits: settings that were edited by hand after the run had begun: what each was, and what it is.
        evaluation: what `rem-atari evaluate` found out, see `evaluations.newest_summary`, or None.
    """

    game: str
    config: Config
    versions: dict[str, str]
    lines: list[MetricLine]
    command: str
    notes: list[str]
    step: int | None
    quality: Quality
    scenes: list[Scene]
    edits: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    sessions: Sequence[Mapping[str, Any]] = ()

    @property
    def comparisons(self) -> list[Comparison]:
        """The agent beside its rivals on held-out frames; empty where nothing could be measured."""
        return self.quality.comparisons

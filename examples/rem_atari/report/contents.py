"""What the report's page shows, gathered in one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rem_atari.config import Config
from rem_atari.report.analysis import CodebookUse, Comparison
from rem_atari.report.films import Scene
from rem_atari.report.history import MetricLine


@dataclass(frozen=True)
class Redrawn:
    """Held-out frames, uint8 (N, S, S, 3), beside their reconstructions, and the PSNR of each in dB, (N,)."""

    frames: NDArray[np.uint8]
    reconstructions: NDArray[np.uint8]
    psnr: list[float]


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
        command: the command that starts such a run again.
        notes: sentences on what is missing or unusual, shown at the top.
        redrawn: frames beside their reconstructions; None without held-out frames.
        comparisons: the agent beside its rivals on held-out frames; empty where nothing could be measured.
        codebook: use of the codes on held-out frames, or None.
        scenes: imagined films; empty where none could be made.
        heldout_frames: number of held-out frames measured.
        evaluation: what `rem-atari evaluate` found out, see `evaluation_files.newest_summary`, or None.
    """

    game: str
    config: Config
    versions: dict[str, str]
    lines: list[MetricLine]
    command: str
    notes: list[str]
    redrawn: Redrawn | None
    comparisons: list[Comparison]
    codebook: CodebookUse | None
    scenes: list[Scene]
    heldout_frames: int
    evaluation: Mapping[str, Any] | None = None

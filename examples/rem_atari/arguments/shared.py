"""What the arguments of several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

DEFAULT_PRESET = "tiny"

Debug = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Step = int | Literal["newest", "best"]
Device = str | None
Settings = Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE")]
RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

"""The arguments of each command as dataclasses: tyro makes flags, help and checks of them."""

from __future__ import annotations

from rem_atari.arguments.shared import DEFAULT_PRESET
from rem_atari.arguments.trained import (
    BlindArguments,
    DiagnoseArguments,
    EvaluateArguments,
    ExportArguments,
    PlayArguments,
    RecordArguments,
    ReportArguments,
    RetrainArguments,
    ScoresArguments,
)
from rem_atari.arguments.training import (
    BenchmarkArguments,
    ListArguments,
    ResumeArguments,
    SweepArguments,
    TrainArguments,
    WeightsArguments,
)

__all__ = [
    "DEFAULT_PRESET",
    "Arguments",
    "BenchmarkArguments",
    "BlindArguments",
    "DiagnoseArguments",
    "EvaluateArguments",
    "ExportArguments",
    "ListArguments",
    "PlayArguments",
    "RecordArguments",
    "ReportArguments",
    "ResumeArguments",
    "RetrainArguments",
    "ScoresArguments",
    "SweepArguments",
    "TrainArguments",
    "WeightsArguments",
]

Arguments = (
    TrainArguments
    | ResumeArguments
    | EvaluateArguments
    | BlindArguments
    | RecordArguments
    | PlayArguments
    | ReportArguments
    | DiagnoseArguments
    | RetrainArguments
    | ExportArguments
    | ScoresArguments
    | SweepArguments
    | BenchmarkArguments
    | WeightsArguments
    | ListArguments
)

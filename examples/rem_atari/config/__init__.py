"""The settings of a run, how they are read from its files, and the presets."""

from __future__ import annotations

from rem_atari.config.settings import (
    Config,
    ControllerConfig,
    EnvConfig,
    EvaluationConfig,
    MinAtarConfig,
    OptimConfig,
    ScheduleConfig,
    TokenizerConfig,
    WorldModelConfig,
)

__all__ = [
    "Config",
    "ControllerConfig",
    "EnvConfig",
    "EvaluationConfig",
    "MinAtarConfig",
    "OptimConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "WorldModelConfig",
]

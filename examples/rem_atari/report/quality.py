"""How good the tokenizer and the world model are on held-out steps: the numbers, also as JSON data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rem_atari.report.analysis import CodebookUse, EventScores, FrameErrors, TokenScores
from rem_atari.report.comparisons import (
    Comparison,
    compare_frames,
    compare_horizon,
    compare_rewards,
    compare_tokens,
)
from rem_atari.report.horizon import HorizonErrors, StepErrors

QUALITY_FILE = "quality.json"

SCHEMA = 1
"""Version of the file; docs/rem_atari.md tells what is in it."""


@dataclass(frozen=True)
class Redrawn:
    """Held-out frames, uint8 (N, S, S, 3), beside their reconstructions, and the PSNR of each in dB, (N,)."""

    frames: NDArray[np.uint8]
    reconstructions: NDArray[np.uint8]
    psnr: list[float]


@dataclass(frozen=True, kw_only=True)
class FrameQuality:
    """What the tokenizer does to held-out frames.

    Attributes:
        redrawn: some of them beside their reconstructions.
        count: frames measured.
        ours: errors of the reconstructions.
        mean_frame: errors of the mean training frame, shown whatever the game does.
        codebook: use of the codes.
    """

    redrawn: Redrawn
    count: int
    ours: FrameErrors
    mean_frame: FrameErrors
    codebook: CodebookUse

    @property
    def comparisons(self) -> list[Comparison]:
        """Reconstructions beside the mean frame."""
        return compare_frames(self.ours, self.mean_frame)


@dataclass(frozen=True, kw_only=True)
class PredictionQuality:
    """What the world model says of held-out steps, given the real past.

    Attributes:
        tokens: how good its next-frame tokens are.
        unigram, place_unigram, copy: how good those of predictors are that count.
        copy_weight: the weight to copy of the last of them.
        rewards: how good its reward signs are.
        base_rate: how good it would be to know only how often each sign occurs.
        reward_events, end_events: how it does on rewards that are not 0, and on ends.
    """

    tokens: TokenScores
    unigram: TokenScores
    place_unigram: TokenScores
    copy: TokenScores
    copy_weight: float
    rewards: TokenScores
    base_rate: TokenScores
    reward_events: EventScores
    end_events: EventScores

    @property
    def comparisons(self) -> list[Comparison]:
        """The world model beside the predictors that count."""
        return [
            *compare_tokens(
                self.tokens,
                unigram=self.unigram,
                place_unigram=self.place_unigram,
                copy=self.copy,
                copy_weight=self.copy_weight,
            ),
            *compare_rewards(self.rewards, self.base_rate),
        ]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What could be measured on held-out steps; None for what could not.

    Attributes:
        steps: held-out steps there are.
        frames: how well the tokenizer keeps them.
        predictions: how well the world model predicts them.
        horizon: how far imagination drifts from them.
    """

    steps: int = 0
    frames: FrameQuality | None = None
    predictions: PredictionQuality | None = None
    horizon: HorizonErrors | None = None

    @property
    def comparisons(self) -> list[Comparison]:
        """The agent beside rivals that need no learning."""
        return [
            *(self.frames.comparisons if self.frames is not None else []),
            *(self.predictions.comparisons if self.predictions is not None else []),
            *(compare_horizon(self.horizon) if self.horizon is not None else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON data, without the frames themselves."""
        return {
            "schema": SCHEMA,
            "heldout_steps": self.steps,
            "frames": None if self.frames is None else _frames(self.frames),
            "tokens": None if self.predictions is None else _tokens(self.predictions),
            "rewards": None if self.predictions is None else _rewards(self.predictions),
            "ends": None if self.predictions is None else asdict(self.predictions.end_events),
            "horizon": None if self.horizon is None else _horizon(self.horizon),
        }


def _frames(quality: FrameQuality) -> dict[str, Any]:
    named = {"tokenizer": quality.ours, "mean_frame": quality.mean_frame}
    return {
        "count": quality.count,
        "mse": {name: errors.mse for name, errors in named.items()},
        "psnr": {name: _finite(errors.psnr) for name, errors in named.items()},
        "foreground_mse": {name: errors.foreground_mse for name, errors in named.items()},
        "moving_mse": {name: errors.moving_mse for name, errors in named.items()},
        "codebook": asdict(quality.codebook),
    }


def _tokens(quality: PredictionQuality) -> dict[str, Any]:
    named = {
        "world_model": quality.tokens,
        "unigram": quality.unigram,
        "unigram_per_place": quality.place_unigram,
        "copy_last_frame": quality.copy,
    }
    return {
        "count": quality.tokens.count,
        "changed_share": quality.tokens.changed_share,
        "copy_weight": quality.copy_weight,
        "cross_entropy": {name: scores.cross_entropy for name, scores in named.items()},
        "accuracy": {name: scores.accuracy for name, scores in named.items()},
        "changed_accuracy": {name: scores.changed_accuracy for name, scores in named.items()},
    }


def _rewards(quality: PredictionQuality) -> dict[str, Any]:
    return {
        **asdict(quality.reward_events),
        "cross_entropy": {
            "world_model": quality.rewards.cross_entropy,
            "base_rate": quality.base_rate.cross_entropy,
        },
    }


def _horizon(errors: HorizonErrors) -> dict[str, Any]:
    return {"starts": errors.starts, "steps": [_step(step) for step in errors.steps]}


def _step(errors: StepErrors) -> dict[str, Any]:
    return {
        "step": errors.step,
        "count": errors.count,
        "psnr": {
            "imagined": _finite(errors.psnr("imagined")),
            "copy_last_frame": _finite(errors.psnr("copied")),
            "tokenizer": _finite(errors.psnr("redrawn")),
        },
        "moving_mse": {"imagined": errors.imagined_moving, "copy_last_frame": errors.copied_moving},
    }


def _finite(value: float) -> float | None:
    """None for the PSNR of a perfect copy, which JSON cannot say."""
    return value if math.isfinite(value) else None

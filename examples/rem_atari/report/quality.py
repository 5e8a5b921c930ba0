"""The quality of tokenizer and world model on held-out steps, beside rivals that need no learning."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rem_atari.report.analysis import (
    CodebookUse,
    EventScores,
    FrameErrors,
    HorizonErrors,
    StepErrors,
    TokenScores,
    psnr,
)
from rem_atari.report.drift import Drift, StepDrift

QUALITY_FILE = "quality.json"

SCHEMA = 1
"""Version of the file; docs/rem_atari.md describes it."""

FRAME_MEASURES = {
    "mse": (
        "Reconstruction error (MSE)",
        "Mean squared error over all pixels of frames scaled to [−1, 1]; the mean frame is the average of the"
        " training frames, shown whatever the game does.",
    ),
    "foreground_mse": (
        "Foreground error (MSE)",
        "The error on pixels that differ from the median frame alone: the ball, the paddle, the enemies,"
        " which the error over all pixels hardly sees.",
    ),
    "moving_mse": (
        "Error on moving pixels (MSE)",
        "The error on pixels that changed since the frame before alone.",
    ),
}
"""Name and explanation of each of the errors of `FrameErrors` that are compared. The PSNR is not: it is the
first of them on another scale."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measure of the agent beside a rival that needs no learning, and whether the agent wins.

    Attributes:
        measure: its name.
        ours: the agent's value.
        rival: name of the rival.
        theirs: the rival's value.
        higher_is_better: direction of the measure.
        explanation: one sentence on what the measure means.
        percent: the values are shares, shown in percent.
    """

    measure: str
    ours: float
    rival: str
    theirs: float
    higher_is_better: bool
    explanation: str
    percent: bool = False

    @property
    def passed(self) -> bool:
        """Whether the agent is strictly better; False where a value is not a number."""
        return self.ours > self.theirs if self.higher_is_better else self.ours < self.theirs


def compare_frames(ours: FrameErrors, mean_frame: FrameErrors) -> list[Comparison]:
    """Reconstructions beside the mean training frame, by the errors that both have."""
    return [
        Comparison(
            measure=measure,
            ours=getattr(ours, name),
            rival="mean frame",
            theirs=getattr(mean_frame, name),
            higher_is_better=False,
            explanation=explanation,
        )
        for name, (measure, explanation) in FRAME_MEASURES.items()
        if None not in (getattr(ours, name), getattr(mean_frame, name))
    ]


def compare_tokens(
    ours: TokenScores,
    *,
    unigram: TokenScores,
    place_unigram: TokenScores,
    copy: TokenScores,
    copy_weight: float,
) -> list[Comparison]:
    """The world model's next-frame tokens beside three predictors that only count."""
    rivals = [
        ("unigram", unigram, "how often each code occurs in training, whatever its place"),
        ("unigram per place", place_unigram, "how often each code occurs at its place in training"),
        (
            "copy the last frame",
            copy,
            "the token of the frame before, mixed with the unigram by a weight fitted on training frames so"
            f" that a change is never impossible (here {copy_weight:.2f} to copy)",
        ),
    ]
    rows = [
        Comparison(
            measure="Token cross-entropy, nats",
            ours=ours.cross_entropy,
            rival=name,
            theirs=scores.cross_entropy,
            higher_is_better=False,
            explanation="Mean −ln of the chance given to each token of the real next frame; the rival knows"
            f" {knows}.",
        )
        for name, scores, knows in rivals
    ]
    return rows + _compare_accuracies(ours, place_unigram, copy)


def _compare_accuracies(ours: TokenScores, place_unigram: TokenScores, copy: TokenScores) -> list[Comparison]:
    """Accuracy of all tokens, and of those that changed if any did."""
    rows = [
        Comparison(
            measure="Token accuracy",
            ours=ours.accuracy,
            rival="copy the last frame",
            theirs=copy.accuracy,
            higher_is_better=True,
            percent=True,
            explanation="Share of all tokens of the next frame that the most likely guess hits.",
        )
    ]
    if ours.changed_accuracy is not None and place_unigram.changed_accuracy is not None:
        changed = Comparison(
            measure="Accuracy where tokens changed",
            ours=ours.changed_accuracy,
            rival="unigram per place",
            theirs=place_unigram.changed_accuracy,
            higher_is_better=True,
            percent=True,
            explanation=f"The same over the {ours.changed_share:.1%} of tokens that differ from the frame"
            " before, where copying is always wrong: motion, and the flicker of the tokenizer.",
        )
        rows.append(changed)
    return rows


def compare_rewards(ours: TokenScores, base_rate: TokenScores) -> list[Comparison]:
    """The world model's reward signs beside how often each sign occurs."""
    return [
        Comparison(
            measure="Reward cross-entropy, nats",
            ours=ours.cross_entropy,
            rival="base rate",
            theirs=base_rate.cross_entropy,
            higher_is_better=False,
            explanation="Mean −ln of the chance given to the sign of each real reward; the rival knows how"
            f" often each sign occurs in training, and {ours.changed_share:.1%} of these rewards are not 0.",
        )
    ]


def compare_horizon(errors: HorizonErrors) -> list[Comparison]:
    """Imagined frames beside the frame from which imagination began, over all steps at once."""
    return [
        Comparison(
            measure="PSNR of imagined frames, dB",
            ours=psnr(errors.mean("imagined")),
            rival="copy the last frame",
            theirs=psnr(errors.mean("copied")),
            higher_is_better=True,
            explanation=f"Of the mean error over the {len(errors.steps)} steps of the controller's horizon,"
            " under the actions that were really taken; the rival shows the last real frame, unchanged.",
        )
    ]


@dataclass(frozen=True)
class Redrawn:
    """Held-out frames, uint8 (N, S, S, 3), beside their reconstructions, and the PSNR of each in dB, (N,)."""

    frames: NDArray[np.uint8]
    reconstructions: NDArray[np.uint8]
    psnr: list[float]


@dataclass(frozen=True, kw_only=True)
class FrameQuality:
    """The tokenizer's quality on held-out frames.

    Attributes:
        redrawn: some of them beside their reconstructions.
        count: frames measured.
        ours: errors of the reconstructions.
        mean_frame: errors of the mean training frame as a constant reconstruction.
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
    """The world model's quality on held-out steps, given the real past.

    Attributes:
        tokens: scores of its next-frame tokens.
        unigram, place_unigram, copy: scores of the counting predictors.
        copy_weight: the weight of copying in the last of them.
        rewards: scores of its reward signs.
        base_rate: scores of a predictor that knows only how often each sign occurs.
        reward_events, end_events: its scores on rewards that are not 0, and on ends.
        one_outcome: the rewards carry no information beyond the ends, see `analysis.has_one_outcome`.
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
    one_outcome: bool

    @property
    def comparisons(self) -> list[Comparison]:
        """The world model beside the counting predictors; rewards are compared only if they vary."""
        return [
            *compare_tokens(
                self.tokens,
                unigram=self.unigram,
                place_unigram=self.place_unigram,
                copy=self.copy,
                copy_weight=self.copy_weight,
            ),
            *([] if self.one_outcome else compare_rewards(self.rewards, self.base_rate)),
        ]


@dataclass(frozen=True, kw_only=True)
class DreamReturns:
    """Rewards that the controller collects in its dreams beside those that it collected in the game.

    Both are mean undiscounted sums from the same held-out states over the same number of steps, up to the
    end of an episode; rewards are signs unless the world model learns their sizes.

    Attributes:
        steps: steps from a state on.
        imagined, real: the sums.
        standard_error: of their difference; NaN for a single state.
        size: the sum of the real rewards without their signs.
    """

    steps: int
    imagined: float
    real: float
    standard_error: float
    size: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The measurements on held-out steps; None for missing ones.

    Attributes:
        steps: number of held-out steps.
        frames: the tokenizer's quality.
        predictions: the world model's quality.
        horizon: the errors of imagination over the horizon.
        drift: how far dreams show more or less than the game.
        returns: what the controller earns in dreams and in the game.
    """

    steps: int = 0
    frames: FrameQuality | None = None
    predictions: PredictionQuality | None = None
    horizon: HorizonErrors | None = None
    drift: Drift | None = None
    returns: DreamReturns | None = None

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
            "drift": None if self.drift is None else _drift(self.drift),
            "returns": None if self.returns is None else asdict(self.returns),
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
        "one_outcome": quality.one_outcome,
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


def _drift(drift: Drift) -> dict[str, Any]:
    return {"starts": drift.starts, "steps": [_step_drift(step) for step in drift.steps]}


def _step_drift(drift: StepDrift) -> dict[str, Any]:
    return {
        **{name: getattr(drift, name) for name in ("step", "count", "distance", "chance", "colour")},
        "pixels": {"imagined": drift.imagined_pixels, "real": drift.real_pixels},
        "without": {"imagined": drift.imagined_without, "real": drift.real_without},
    }


def _finite(value: float) -> float | None:
    """None for the infinite PSNR of a perfect copy, which JSON cannot express."""
    return value if math.isfinite(value) else None

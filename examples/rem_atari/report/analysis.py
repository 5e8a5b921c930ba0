"""The report's measurements on held-out frames: arrays in, numbers out.

This module reads no file and runs no network. Frames are uint8 and are scaled to [-1, 1] before an error is
taken, as the tokenizer sees them, so that errors compare with the training curves. N frames, K tokens a
frame, V codes, S pixels a side. Cross-entropies are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PEAK = 2.0
"""Distance between black and white in frames scaled to [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class FrameErrors:
    """Errors of N frames against their reconstructions.

    Attributes:
        mse: mean squared error over all pixels and channels.
        psnr: peak signal-to-noise ratio of that mean error, in dB; infinite for a perfect copy.
        foreground_mse: mean squared error over foreground pixels alone; None if there are none.
        moving_mse: the same over pixels that changed since the frame before; None if there are none.
        per_frame: mean squared error of each frame, (N,).
    """

    mse: float
    psnr: float
    foreground_mse: float | None
    moving_mse: float | None
    per_frame: NDArray[np.float64]


@dataclass(frozen=True)
class TokenPredictions:
    """A predictor's predictions of N frames.

    Attributes:
        log_prob: log-probability of the true token, (N, K).
        choice: its most likely token, (N, K).
    """

    log_prob: NDArray[np.float64]
    choice: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Scores of a predictor of tokens.

    Attributes:
        cross_entropy: mean negative log-probability of the true token, in nats.
        accuracy: share of tokens that its choice hits.
        changed_accuracy: the same over tokens that differ from the frame before; None if none does.
        changed_share: share of tokens that differ from the frame before.
        count: number of tokens scored.
    """

    cross_entropy: float
    accuracy: float
    changed_accuracy: float | None
    changed_share: float
    count: int


@dataclass(frozen=True, kw_only=True)
class EventScores:
    """Scores of a predictor on rare classes: rewards that are not 0, ends.

    Attributes:
        steps: steps scored.
        events: number of steps with an event, that is, any class but the usual one.
        predicted: number of steps whose most likely class is an event.
        recall: share of events whose class is the most likely one; None without an event.
        precision: share of predicted events that are right; None if there are none.
        chance: mean probability of the events that came, the rate at which imagination would draw them; None
            without an event.
        calibration: sum of all probabilities of events over the number that came: at 1 imagination shows as
            many as the game, at 2 twice as many; None without an event.
    """

    steps: int
    events: int
    predicted: int
    recall: float | None
    precision: float | None
    chance: float | None
    calibration: float | None

    @property
    def base_rate(self) -> float | None:
        """Share of the steps with an event: the precision of predicting one at every step."""
        return self.events / self.steps if self.steps else None


@dataclass(frozen=True, kw_only=True)
class CodebookUse:
    """Use of the codes in the frames.

    Attributes:
        used: codes that appear.
        size: number of codes.
        perplexity: exp of the entropy of their use: the number of equally used codes with the same entropy.
    """

    used: int
    size: int
    perplexity: float


@dataclass(frozen=True)
class TokenBaselines:
    """Predictors fitted by counting tokens, for the world model to beat.

    Attributes:
        unigram: chance of each code anywhere in a frame, (V,).
        place_unigram: chance of each code at each place of the frame, (K, V).
        copy_weight: weight of "the same as in the frame before" in the mixture with `unigram`.
    """

    unigram: NDArray[np.float64]
    place_unigram: NDArray[np.float64]
    copy_weight: float

    def predict_unigram(self, target: NDArray[np.int64]) -> TokenPredictions:
        """Score `target` (N, K) by how often each code occurs."""
        choice = np.full_like(target, int(self.unigram.argmax()))
        return TokenPredictions(np.log(self.unigram[target]), choice)

    def predict_place_unigram(self, target: NDArray[np.int64]) -> TokenPredictions:
        """Score `target` (N, K) by how often each code occurs at its place."""
        places = np.arange(target.shape[1])
        choice = np.broadcast_to(self.place_unigram.argmax(axis=1), target.shape)
        return TokenPredictions(np.log(self.place_unigram[places, target]), choice)

    def predict_copy(self, target: NDArray[np.int64], previous: NDArray[np.int64]) -> TokenPredictions:
        """Score `target` (N, K) by the frame before it, `previous` (N, K), smoothed with the unigram."""
        same = (target == previous).astype(np.float64)
        chance = self.copy_weight * same + (1.0 - self.copy_weight) * self.unigram[target]
        return TokenPredictions(np.log(chance), previous)


def to_signed(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Frames scaled from 0..255 to [-1, 1]."""
    return frames.astype(np.float32) / 127.5 - 1.0


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of frames in [-1, 1]: 10 log10(2² / mse)."""
    return math.inf if mse == 0 else 10.0 * math.log10(PEAK**2 / mse)


def frame_errors(
    frames: NDArray[np.uint8],
    redrawn: NDArray[np.uint8],
    *,
    foreground: NDArray[np.bool_],
    moving: NDArray[np.bool_],
) -> FrameErrors:
    """Errors of `redrawn` against `frames`.

    Args:
        frames: real frames, (N, S, S, 3).
        redrawn: their reconstructions, (N, S, S, 3), or one frame for all, (S, S, 3).
        foreground: pixels that count as foreground, (N, S, S).
        moving: pixels that changed since the frame before, (N, S, S).
    """
    squared = (to_signed(frames) - to_signed(redrawn)) ** 2
    mse = float(squared.mean(dtype=np.float64))
    return FrameErrors(
        mse=mse,
        psnr=psnr(mse),
        foreground_mse=mean_over(squared, foreground),
        moving_mse=mean_over(squared, moving),
        per_frame=squared.mean(axis=(1, 2, 3), dtype=np.float64),
    )


def mean_over(squared: NDArray[np.float32], pixels: NDArray[np.bool_]) -> float | None:
    """Mean of squared errors (N, S, S, 3) over some of the pixels, (N, S, S); None if there are none."""
    return float(squared[pixels].mean(dtype=np.float64)) if pixels.any() else None


def codebook_use(tokens: NDArray[np.int64], codebook_size: int) -> CodebookUse:
    """How many of the codes 0..codebook_size-1 the `tokens`, of any shape, use."""
    counts = np.bincount(tokens.ravel(), minlength=codebook_size)
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    return CodebookUse(used=len(shares), size=codebook_size, perplexity=math.exp(entropy))


def fit_baselines(
    tokens: NDArray[np.int64], previous: NDArray[np.int64], codebook_size: int
) -> TokenBaselines:
    """Fit the counting predictors on training frames.

    The unigram adds one to each count, so that an unseen code keeps a probability above 0; the unigram per
    place adds the unigram itself as one pseudo-count.

    Args:
        tokens: tokens of frames, (N, K).
        previous: tokens of the frame before each, (N, K).
        codebook_size: number of codes V.
    """
    num_frames, num_places = tokens.shape
    places = np.zeros((num_places, codebook_size))
    np.add.at(places, (np.broadcast_to(np.arange(num_places), tokens.shape), tokens), 1.0)
    unigram = (places.sum(axis=0) + 1.0) / (tokens.size + codebook_size)
    return TokenBaselines(
        unigram=unigram,
        place_unigram=(places + unigram) / (num_frames + 1.0),
        copy_weight=_fit_copy_weight(tokens == previous, unigram[tokens]),
    )


def _fit_copy_weight(same: NDArray[np.bool_], chance: NDArray[np.float64], rounds: int = 50) -> float:
    """The weight w with the highest likelihood of w * same + (1 - w) * chance, by expectation maximisation.

    One pseudo-count for "not a copy" keeps w below 1, so that changes stay possible if training shows none.
    """
    weight = 0.5
    for _ in range(rounds):
        copied = same * weight / (same * weight + (1.0 - weight) * chance)
        weight = float(copied.sum() / (same.size + 1))
    return weight


def score_tokens(
    predictions: TokenPredictions, target: NDArray[np.int64], previous: NDArray[np.int64]
) -> TokenScores:
    """Score predictions of `target` (N, K), where `previous` (N, K) are the tokens of the frame before.

    Raises:
        ValueError: there is no token to score.
    """
    if target.size == 0:
        raise ValueError(f"score_tokens(): target has shape {target.shape}; at least one token is needed.")
    hit = predictions.choice == target
    changed = target != previous
    return TokenScores(
        cross_entropy=float(-predictions.log_prob.mean()),
        accuracy=float(hit.mean()),
        changed_accuracy=float(hit[changed].mean()) if changed.any() else None,
        changed_share=float(changed.mean()),
        count=target.size,
    )


def score_events(
    predictions: TokenPredictions,
    target: NDArray[np.int64],
    usual: int,
    usual_chance: NDArray[np.float64],
) -> EventScores:
    """Score predictions of classes.

    Args:
        predictions: the predictions, (N, 1).
        target: the classes that came, (N, 1).
        usual: the class that is no event.
        usual_chance: its predicted probability, (N, 1).
    """
    happened, said = target != usual, predictions.choice != usual
    hit = happened & (predictions.choice == target)
    return EventScores(
        steps=target.size,
        events=int(happened.sum()),
        predicted=int(said.sum()),
        recall=float(hit.sum() / happened.sum()) if happened.any() else None,
        precision=float(hit.sum() / said.sum()) if said.any() else None,
        chance=float(np.exp(predictions.log_prob[happened]).mean()) if happened.any() else None,
        calibration=float((1 - usual_chance).sum() / happened.sum()) if happened.any() else None,
    )


def has_one_outcome(signs: NDArray[np.int64], ended: NDArray[np.bool_]) -> bool:
    """Whether rewards carry no information beyond the ends of episodes.

    This holds if they are the same at every step, or if one sign comes with every end and no other sign
    occurs: the games of a perfect player of Catch all end with +1.

    Args:
        signs: of the rewards, (N,).
        ended: whether an episode ended with the step, (N,).
    """
    rewarded = signs != 0
    if len(np.unique(signs)) < 2:
        return True
    return len(np.unique(signs[rewarded])) == 1 and bool((rewarded == ended).all())


Drawn = Literal["imagined", "copied", "redrawn"]
"""The frames compared with the real one, by their names in `StepErrors`."""


@dataclass(frozen=True, kw_only=True)
class StepErrors:
    """Mean squared errors against the real frames, frames in [-1, 1], after one number of imagined steps.

    Attributes:
        step: steps imagined, from 1.
        count: number of real frames to compare with; an ended episode has no more.
        imagined: of the imagined frames.
        copied: of the real frame from which imagination began, shown unchanged.
        redrawn: of the real frame's reconstruction: the error of the tokenizer alone.
        imagined_moving, copied_moving: the same over the pixels that differ from the frame from which
            imagination began; None if there are none.
    """

    step: int
    count: int
    imagined: float
    copied: float
    redrawn: float
    imagined_moving: float | None
    copied_moving: float | None

    @property
    def passed(self) -> bool:
        """Whether the imagined frames are nearer to the real ones than the start frame is."""
        return self.imagined < self.copied

    def psnr(self, what: Drawn) -> float:
        """One of the three errors as a peak signal-to-noise ratio in dB."""
        return psnr(getattr(self, what))


@dataclass(frozen=True)
class HorizonErrors:
    """Errors of imagination over the controller's horizon.

    Attributes:
        starts: held-out frames from which it began.
        steps: the errors after 1, 2, ... steps, as far as real frames exist.
    """

    starts: int
    steps: list[StepErrors]

    def mean(self, what: Drawn) -> float:
        """One of the errors over the frames of all steps."""
        total = sum(step.count for step in self.steps)
        return sum(getattr(step, what) * step.count for step in self.steps) / total

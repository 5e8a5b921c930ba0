"""Drift of dreams: whether imagined frames show as much of everything as the game's.

What is counted is the pixels of each colour in a frame. Where tokens are drawn independently of each other, a
thing can vanish from a frame or show in it twice, while the tokens of every place are as frequent as in the
game: histograms of tokens do not see that, counts within a frame do. The game need not be known, nor the kind
of tokenizer. This module reads no file and runs no network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COLOUR_BITS = 2
"""Leading bits of each channel that tell colours apart: 64 colours."""

SWAPS = 200
"""Random exchanges of imagined and real frames, which show what chance does."""

CHANCE_QUANTILE = 0.95
"""The distance that chance reaches in one of twenty comparisons counts as what chance does."""


@dataclass(frozen=True, kw_only=True)
class StepDrift:
    """Imagined frames beside the game's after one number of imagined steps.

    Attributes:
        step: steps imagined, from 1.
        count: frames compared, of each kind.
        distance: the largest distance of any colour, from 0 to 1. The distance of a colour is the largest gap
            between the cumulative distributions of the number of its pixels in a frame (Kolmogorov-Smirnov):
            at least this share of the imagined frames shows too much or too little of it.
        chance: the distance that dreams which do not drift reach in one of twenty comparisons.
        colour: the colour with that distance, "#rrggbb", the mean of its pixels.
        imagined_pixels, real_pixels: mean number of its pixels in a frame.
        imagined_without, real_without: share of the frames without any.
    """

    step: int
    count: int
    distance: float
    chance: float
    colour: str
    imagined_pixels: float
    real_pixels: float
    imagined_without: float
    real_without: float


@dataclass(frozen=True)
class Drift:
    """Drift over the imagined steps.

    Attributes:
        starts: held-out frames from which imagination began.
        steps: after 1, 2, 4, ... steps and at the horizon, as far as there are frames; at least one.
    """

    starts: int
    steps: list[StepDrift]

    @property
    def worst(self) -> StepDrift:
        """The step with the largest distance."""
        return max(self.steps, key=lambda step: step.distance)


def compare_colours(
    imagined: NDArray[np.uint8], real: NDArray[np.uint8], *, step: int, seed: int = 0
) -> StepDrift:
    """Compare imagined frames with those that the game showed after as many steps.

    If dreams do not drift, each imagined frame and the real one of the same start can be exchanged; `chance`
    is the distance that remains where random ones are (a permutation test of pairs).

    Args:
        imagined: (N, S, S, 3).
        real: from the same starts, in the same order, through the tokenizer, (N, S, S, 3).
        step: steps imagined.
        seed: seed of the exchanges.
    """
    imagined_colours, real_colours = _colours(imagined), _colours(real)
    ours, theirs = _count(imagined_colours), _count(real_colours)
    gaps, owners = _cumulative_gaps(ours, theirs)
    distances = np.abs(gaps.mean(axis=0))
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.float32), (SWAPS, len(gaps)))
    by_chance = np.abs(signs @ gaps / len(gaps)).max(axis=1)
    colour = owners[distances.argmax()]
    shown = np.concatenate([imagined[imagined_colours == colour], real[real_colours == colour]])
    return StepDrift(
        step=step,
        count=len(imagined),
        distance=float(distances.max()),
        chance=float(np.quantile(by_chance, CHANCE_QUANTILE)),
        colour="#" + "".join(f"{round(channel):02x}" for channel in shown.mean(axis=0)),
        imagined_pixels=float(ours[:, colour].mean()),
        real_pixels=float(theirs[:, colour].mean()),
        imagined_without=float((ours[:, colour] == 0).mean()),
        real_without=float((theirs[:, colour] == 0).mean()),
    )


def _colours(frames: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The number of each pixel's colour, (N, S, S), of frames (N, S, S, 3)."""
    red, green, blue = np.moveaxis(frames.astype(np.int64) >> (8 - COLOUR_BITS), -1, 0)
    return (red << 2 * COLOUR_BITS) + (green << COLOUR_BITS) + blue


def _count(colours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pixels of each colour in a frame, (N, C), of colours (N, S, S)."""
    num_frames, num_colours = len(colours), 1 << 3 * COLOUR_BITS
    cells = colours.reshape(num_frames, -1) + num_colours * np.arange(num_frames)[:, None]
    return np.bincount(cells.ravel(), minlength=num_frames * num_colours).reshape(num_frames, num_colours)


def _cumulative_gaps(
    ours: NDArray[np.int64], theirs: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For each pair of frames, colour and number of pixels n: [ours has at most n] - [theirs has].

    Of counts (N, C) both. The mean over the pairs is the gap between the cumulative distributions at n. Only
    colours and numbers that occur have a column: (N, M), with the colour of each, (M,), the rarest first.
    """
    gaps, owners = [], []
    shown = (ours + theirs).sum(axis=0)
    # A thing before its background, where one vanishes as often as the other shows.
    rarest_first = shown.argsort(kind="stable")
    for colour in rarest_first[shown[rarest_first] > 0]:
        one, other = ours[:, colour, None], theirs[:, colour, None]
        numbers = np.unique(np.concatenate([one, other]))
        gaps.append((one <= numbers).astype(np.float32) - (other <= numbers))
        owners.append(np.full(len(numbers), colour))
    return np.concatenate(gaps, axis=1), np.concatenate(owners)

"""Drift: what vanishes from imagined frames or shows twice in them is seen, and what chance does is not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rem_atari.report.drift import compare_colours

SIDE, BLUE = 8, (80, 160, 255)


def frames_with(left: NDArray[np.bool_], right: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Black frames with a blue square of four pixels on the left, on the right, on both sides or on none."""
    frames = np.zeros((len(left), SIDE, SIDE, 3), dtype=np.uint8)
    frames[left, 2:4, 1:3] = BLUE
    frames[right, 2:4, 5:7] = BLUE
    return frames


def test_things_that_vanish_and_double_are_seen_though_every_place_is_as_it_should_be() -> None:
    """The square is on one side. Drawn for each side by itself, it is on none or both in half the frames."""
    left = np.arange(200) % 2 == 0
    real = frames_with(left, ~left)
    apart = frames_with(left, np.arange(200) % 4 < 2)
    assert (real.mean(axis=0) == apart.mean(axis=0)).all()
    found = compare_colours(apart, real, step=3)
    assert (found.step, found.count) == (3, 200)
    assert found.distance == 0.25
    assert found.chance < 0.15
    assert (found.imagined_without, found.real_without) == (0.25, 0.0)
    assert found.colour == "#50a0ff"
    assert (found.imagined_pixels, found.real_pixels) == (4.0, 4.0)


def test_the_rarest_of_the_colours_with_the_largest_gap_is_named() -> None:
    nowhere = np.zeros(40, dtype=bool)
    real = frames_with(~nowhere, nowhere)
    real[:, 0, 0] = (255, 0, 0)
    imagined = real.copy()
    imagined[:10, 0, 0] = (255, 255, 255)
    imagined[:30, 2, 1:3] = (84, 164, 251)  # the same colour to the eye, another to a computer
    found = compare_colours(imagined, real, step=1)
    assert found.distance == 0.25
    assert found.colour == "#ffffff"
    assert (found.imagined_without, found.real_without) == (0.75, 1.0)


def test_equal_frames_have_no_distance() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (30, SIDE, SIDE, 3), dtype=np.uint8)
    found = compare_colours(frames, frames, step=1)
    assert (found.distance, found.chance) == (0.0, 0.0)


def test_dreams_that_do_not_drift_seldom_exceed_what_chance_does() -> None:
    """The start tells where the square is likely, and game and dream draw it, each for itself."""
    above = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        likely = generator.random(80)
        real, imagined = (
            frames_with(generator.random(80) < likely, generator.random(80) < likely) for _ in range(2)
        )
        found = compare_colours(imagined, real, step=1, seed=seed)
        above += found.distance > found.chance
    assert above <= 6

"""Frames side by side with a title above and two lines below each: a picture of a film."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rem_atari.films.pictures import FAINT, FONT, GAP, INK, PAPER
from rem_atari.films.video import enlarge

PANEL_PIXELS = 256
"""Side of a frame at least."""

HEADING, CAPTION = 24, 44


@dataclass(frozen=True)
class Panel:
    """A frame, uint8 (S, S, 3), with its title, the two lines below it, and whether it is faded."""

    frame: np.ndarray
    title: str
    first: str = ""
    second: str = ""
    faded: bool = False


def draw_panels(panels: Sequence[Panel]) -> np.ndarray:
    """The panels, whose frames have one size, as one picture (H, W, 3)."""
    frames = [enlarge(_fade(panel.frame) if panel.faded else panel.frame, PANEL_PIXELS) for panel in panels]
    side = frames[0].shape[0]
    picture = Image.new("RGB", (len(panels) * (side + GAP) + GAP, HEADING + side + CAPTION), PAPER)
    pen = ImageDraw.Draw(picture)
    title, small = ImageFont.truetype(FONT, 13), ImageFont.truetype(FONT, 12)
    for place, (panel, frame) in enumerate(zip(panels, frames, strict=True)):
        left = GAP + place * (side + GAP)
        pen.text((left, 5), panel.title, fill=INK, font=title)
        picture.paste(Image.fromarray(frame), (left, HEADING))
        pen.text((left, HEADING + side + 4), panel.first.replace("-", "−"), fill=INK, font=small)
        pen.text((left, HEADING + side + 22), panel.second.replace("-", "−"), fill=FAINT, font=small)
    return np.asarray(picture)


def _fade(frame: np.ndarray) -> np.ndarray:
    return ((frame.astype(np.uint16) + 3 * np.array(PAPER)) // 4).astype(np.uint8)

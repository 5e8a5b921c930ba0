"""Films and pictures: their content, PNG and GIF files, and images for the page as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rem_atari.runs.durable import replace_file

DIFFERENCE_CEILING = 64
"""Levels (of 255) of difference that are drawn at full brightness."""

STEP_MILLISECONDS = 450

LAST_STEP_MILLISECONDS = 1_800

FRAME_PIXELS = 192
"""Side of a frame in the GIF, about; frames grow by whole factors so that their pixels stay square."""

GAP, CAPTION, HEADING = 8, 38, 22

FONT = get_data_path() + "/fonts/ttf/DejaVuSans.ttf"
"""Comes with matplotlib, and has the minus sign and the Greek that Pillow's own font lacks."""

PAPER, INK, FAINT = (255, 255, 255), (28, 30, 33), (120, 124, 130)


@dataclass(frozen=True, kw_only=True)
class FilmStep:
    """One step of a film.

    Attributes:
        action: name of the action taken.
        reward: its reward; of an imagined step only the sign, -1, 0 or 1.
        ended: the episode ended with this step.
        reward_chances: the world model's chances of the signs -1, 0, 1; None where the step is real.
        end_chance: the world model's chance of the end; None where the step is real.
        cut: the episode was truncated after this step by a limit, not ended by the game.
    """

    action: str
    reward: float
    ended: bool
    reward_chances: tuple[float, float, float] | None = None
    end_chance: float | None = None
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class Film:
    """Frames and the steps between them.

    Attributes:
        title: what the film shows.
        frames: uint8 (F, S, S, 3): the start, then the frame after each step.
        steps: F - 1 steps; one more if the episode ended or was cut with it, since no frame follows then.
    """

    title: str
    frames: NDArray[np.uint8]
    steps: list[FilmStep]

    def caption(self, step: int) -> tuple[str, str]:
        """Two short lines on the frame after `step` steps: the step that led to it, and its probability.

        Beyond the film's last step the caption stays at that step.
        """
        if step == 0 or not self.steps:
            return "start", ""
        number = min(step, len(self.steps))
        done = self.steps[number - 1]
        happened = f"{number}: {done.action}" + (f", reward {done.reward:+g}" if done.reward else "")
        if done.ended or done.cut:
            happened += ", episode over" if done.ended else ", cut off here"
        if done.reward_chances is None or done.end_chance is None:
            return happened.replace("-", "−"), ""
        minus, _, plus = done.reward_chances
        return happened.replace("-", "−"), f"reward −1 {minus:.0%}, +1 {plus:.0%}; end {done.end_chance:.0%}"


@dataclass(frozen=True)
class Scene:
    """Films that share one held-out start: the real continuation first, then the imagined ones."""

    films: list[Film]

    @property
    def length(self) -> int:
        """Number of steps of the longest film."""
        return max(len(film.steps) for film in self.films)


def difference_image(frame: NDArray[np.uint8], redrawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Where two frames (S, S, 3) differ, as a heat map: the largest difference of the three channels."""
    levels = np.abs(frame.astype(np.int16) - redrawn.astype(np.int16)).max(axis=-1)
    heat = colormaps["inferno"](np.minimum(levels / DIFFERENCE_CEILING, 1.0))
    return (heat[..., :3] * 255).astype(np.uint8)


def data_uri(image: NDArray[np.uint8]) -> str:
    """An image (height, width, 3) as a PNG in a data URI, at its own size."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def filmstrip(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames (F, S, S, 3) side by side, (S, F * S, 3)."""
    return np.concatenate(list(frames), axis=1)


def save_reconstructions(path: Path, frames: NDArray[np.uint8], redrawn: NDArray[np.uint8]) -> None:
    """Save real frames (N, S, S, 3), their reconstructions and the difference, three rows of N, as a PNG."""
    differences = np.stack([difference_image(*pair) for pair in zip(frames, redrawn, strict=True)])
    rows = {"held-out frames": frames, "reconstructions": redrawn, "differences": differences}
    side = _scaled(frames[0]).width
    size = (len(frames) * (side + GAP) + GAP, len(rows) * (side + HEADING) + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for row, (label, images) in enumerate(rows.items()):
        top = row * (side + HEADING)
        draw.text((GAP, top + 5), label, fill=INK, font=ImageFont.truetype(FONT, 12))
        for column, image in enumerate(images):
            picture.paste(_scaled(image), (GAP + column * (side + GAP), top + HEADING))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    replace_file(path, buffer.getvalue())


def save_imagination(path: Path, scenes: Sequence[Scene]) -> None:
    """Save the scenes as an animated GIF: a row for each, its films side by side, captions below them."""
    length = max(scene.length for scene in scenes)
    pictures = [_draw_moment(scenes, step) for step in range(length + 1)]
    durations = [STEP_MILLISECONDS] * length + [LAST_STEP_MILLISECONDS]
    quantized = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    buffer = io.BytesIO()
    quantized[0].save(
        buffer, format="GIF", save_all=True, append_images=quantized[1:], duration=durations, loop=0
    )
    replace_file(path, buffer.getvalue())


def _draw_moment(scenes: Sequence[Scene], step: int) -> Image.Image:
    """All films of all scenes after `step` steps."""
    columns = max(len(scene.films) for scene in scenes)
    side = _scaled(scenes[0].films[0].frames[0]).width
    cell_width, cell_height = side + GAP, side + CAPTION + GAP
    size = (columns * cell_width + GAP, len(scenes) * cell_height + HEADING + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for row, scene in enumerate(scenes):
        for column, film in enumerate(scene.films):
            left, top = GAP + column * cell_width, HEADING + GAP + row * cell_height
            if row == 0:
                draw.text((left, GAP), film.title, fill=INK, font=ImageFont.truetype(FONT, 11))
            _draw_film(picture, film, step, (left, top))
    return picture


def _draw_film(picture: Image.Image, film: Film, step: int, corner: tuple[int, int]) -> None:
    """One film's frame after `step` steps and its caption, at `corner` (left, top)."""
    shown = _scaled(film.frames[min(step, len(film.frames) - 1)])
    if step >= len(film.frames):
        shown = Image.blend(shown, Image.new("RGB", shown.size, PAPER), 0.75)
    picture.paste(shown, corner)
    lines = film.caption(step)
    draw = ImageDraw.Draw(picture)
    left, top = corner[0], corner[1] + shown.height + 3
    draw.text((left, top), lines[0], fill=INK, font=ImageFont.truetype(FONT, 11))
    draw.text((left, top + 16), lines[1], fill=FAINT, font=ImageFont.truetype(FONT, 10))


def _scaled(frame: NDArray[np.uint8]) -> Image.Image:
    """A frame enlarged by a whole factor to about FRAME_PIXELS a side."""
    side = frame.shape[0] * max(1, round(FRAME_PIXELS / frame.shape[0]))
    return Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)

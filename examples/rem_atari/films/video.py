"""Films as files: MP4 by ffmpeg, which the package imageio-ffmpeg brings along, and GIF by Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from rem_atari.errors import RunError, UsageError
from rem_atari.runs.durable import publish_file

MP4, GIF = ".mp4", ".gif"

CONSTANT_QUALITY = "18"
"""x264's rate factor: at 18 a film hardly differs from the frames."""

COLOURS = 128
"""Colours of a GIF's palette; each picture has its own."""


def check_video_path(path: Path) -> None:
    """Check that a film can be written to `path`.

    Raises:
        UsageError: its name has another ending than .mp4 or .gif.
        ModuleNotFoundError: an MP4 is wanted and imageio-ffmpeg is not installed.
    """
    if path.suffix.lower() not in (MP4, GIF):
        raise UsageError(f"the film {path} has the ending {path.suffix!r}; wanted {MP4} or {GIF}")
    if path.suffix.lower() == MP4:
        import imageio_ffmpeg  # noqa: F401


def save_video(path: Path, pictures: Iterable[np.ndarray], fps: float) -> None:
    """Write a film; an earlier one at `path` is replaced when the new one is whole, and not before.

    Args:
        path: its ending, .mp4 or .gif, sets the format; the folder is made if it is missing.
        pictures: uint8 (H, W, 3), all of one size, at least one; drawn as they are written, so that a film is
            never in memory as a whole.
        fps: pictures a second.

    Raises:
        ValueError: there is no picture, or their sizes differ.
        RunError: the film cannot be written.
    """
    stream = iter(pictures)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"save_video(): there are no pictures for {path}.")
    write = _write_gif if path.suffix.lower() == GIF else _write_mp4
    with _replacing(path) as temporary:
        write(temporary, _same_size(chain([first], stream), first.shape), fps)


def enlarge(frame: np.ndarray, least: int) -> np.ndarray:
    """A frame (S, S, 3) magnified by a whole factor to at least `least` pixels a side."""
    factor = max(1, -(-least // frame.shape[0]))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of the same ending, that takes its place at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
        try:
            temporary.touch()  # the system's error message is clearer than ffmpeg's
            yield temporary
            publish_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # ffmpeg's last line gives the reason.
        lines = [line.strip() for line in str(error.strerror or error).splitlines() if line.strip()]
        raise RunError(f"the film {path} cannot be written: {lines[-1] if lines else error}") from error


def _same_size(pictures: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    for number, picture in enumerate(pictures):
        if picture.shape != shape:
            raise ValueError(f"save_video(): picture {number} is {picture.shape}, the first one {shape}.")
        yield picture


def _write_mp4(path: Path, pictures: Iterator[np.ndarray], fps: float) -> None:
    import imageio_ffmpeg

    writer, count = None, 0
    try:
        for picture in pictures:
            count += 1
            even = _evened(picture)
            if writer is None:
                height, width = even.shape[:2]
                writer = imageio_ffmpeg.write_frames(
                    str(path),
                    (width, height),
                    fps=fps,
                    codec="libx264",
                    quality=None,
                    macro_block_size=1,
                    output_params=["-crf", CONSTANT_QUALITY, "-movflags", "+faststart"],
                )
                writer.send(None)
            writer.send(np.ascontiguousarray(even))
    finally:
        if writer is not None:
            writer.close()
    # If a full disk stops ffmpeg, half a film is left, and the package reports no error.
    try:
        whole = imageio_ffmpeg.count_frames_and_secs(str(path))[0] == count
    except RuntimeError:
        whole = False
    if not whole:
        raise OSError("ffmpeg stopped before its end; is there room on the disk?")


def _evened(picture: np.ndarray) -> np.ndarray:
    """The picture with an even height and width, which H.264's halved colours need; edges are repeated."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _write_gif(path: Path, pictures: Iterator[np.ndarray], fps: float) -> None:
    images = (Image.fromarray(picture).quantize(COLOURS, dither=Image.Dither.NONE) for picture in pictures)
    first = next(images)
    # Hundredths of a second are a GIF's clock, and most viewers slow down below two of them.
    duration = max(20, round(100 / fps) * 10)
    first.save(path, format="GIF", save_all=True, append_images=images, duration=duration, loop=0)

"""Recorded episodes, from a folder of .npz files or a Minari dataset, for training without collecting.

A file ``*.npz`` is an episode, with arrays of the names and shapes that Minari's episodes have:

================  ==========================================  ==========================================
array             shape                                       content
================  ==========================================  ==========================================
``observations``  uint8 (T or T + 1, H, W) or (..., H, W, C)  images of 1, 3 or 4 channels
``actions``       integers (T,)                               the action taken on each, from 0
``rewards``       numbers (T,)                                the raw reward that followed
``terminations``  bool (T,)                                   whether the episode ended of itself there
================  ==========================================  ==========================================

An episode whose last step is not a termination was truncated.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rem_atari.config.settings import MINARI
from rem_atari.envs.frames import resize_frame, to_rgb
from rem_atari.errors import EnvironmentAnswerError, UsageError

ARRAYS = ("observations", "actions", "rewards", "terminations")


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode of T steps.

    Attributes:
        frames: the frames that were acted on, uint8 (T, S, S, 3).
        actions: int64 (T,).
        rewards: float32 (T,).
        terminated: it ended by itself; otherwise it was truncated after its last step.
    """

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def count_recorded(source: str) -> int:
    """Steps of all recorded episodes.

    Raises:
        UsageError: there are no episodes, or they cannot be read.
    """
    if source.startswith(MINARI):
        return int(_open_minari(source).total_steps)
    return sum(len(_read(path, ("actions",))["actions"]) for path in _files(source))


def read_recorded(source: str, *, frame_size: int, num_actions: int) -> Iterator[RecordedEpisode]:
    """The recorded episodes, one after another.

    Args:
        source: a folder of .npz files, taken in the order of their names, or "minari:" and the id of a
            dataset that lies on this machine.
        frame_size: S; images of another size are resized as the game's own are.
        num_actions: actions of the game.

    Raises:
        UsageError: there are no episodes, or one has another format; the message names it.
    """
    if source.startswith(MINARI):
        for episode in _open_minari(source).iterate_episodes():
            arrays = {name: np.asarray(getattr(episode, name)) for name in ARRAYS}
            yield _checked(arrays, f"episode {episode.id} of {source}", frame_size, num_actions)
        return
    for path in _files(source):
        yield _checked(_read(path, ARRAYS), str(path), frame_size, num_actions)


def _files(source: str) -> list[Path]:
    files = sorted(Path(source).glob("*.npz"))
    if not files:
        raise UsageError(f"{source} holds no recorded episodes; wanted .npz files, one an episode")
    return files


def _read(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"the recorded episode {path} cannot be read: {error}") from error


def _open_minari(source: str) -> Any:
    name = source.removeprefix(MINARI)
    try:
        import minari

        return minari.load_dataset(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{source} needs the package {error.name}: pip install 'minari[hdf5]'") from error
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"the Minari dataset {name} cannot be read: {error}") from error


def _checked(
    arrays: Mapping[str, np.ndarray], source: str, frame_size: int, num_actions: int
) -> RecordedEpisode:
    images, actions, rewards, ends = (arrays[name] for name in ARRAYS)
    steps = len(actions) if actions.ndim == 1 else 0
    is_whole = (
        steps > 0
        and actions.dtype.kind in "iu"
        and rewards.shape == ends.shape == (steps,)
        and rewards.dtype.kind in "iuf"
        and ends.dtype == bool
        and images.ndim in (3, 4)
        and len(images) in (steps, steps + 1)
    )
    if not is_whole:
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise UsageError(
            f"{source} holds {found}; wanted observations (T or T + 1, height, width, channels), integer"
            " actions (T,), rewards (T,) and bool terminations (T,)"
        )
    if actions.min() < 0 or actions.max() >= num_actions:
        raise UsageError(
            f"{source} holds actions from {actions.min()} to {actions.max()}; the game has {num_actions}"
        )
    if ends[:-1].any() or not np.isfinite(rewards).all():
        raise UsageError(f"{source} goes on after its end, or holds a reward that is not finite")
    try:
        frames = np.stack([_resized(to_rgb(image, source), frame_size) for image in images[:steps]])
    except EnvironmentAnswerError as error:
        raise UsageError(str(error)) from error
    return RecordedEpisode(frames, actions.astype(np.int64), rewards.astype(np.float32), bool(ends[-1]))


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    return image if image.shape[:2] == (size, size) else resize_frame(image, size)

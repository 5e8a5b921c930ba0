"""The best and the worst game of an evaluation, kept while they are played."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rem_atari.envs.vector import GameReturn, VectorStep

FASTEST = 1
"""zlib's fastest level: frames take a tenth of their size at little cost, and a long game has thousands."""


@dataclass(frozen=True)
class GameFilm:
    """A game and its compressed frames: those acted on, and the final one."""

    game: GameReturn
    frames: list[bytes]
    frame_shape: tuple[int, ...]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, uint8 (S, S, 3), one after another."""
        for frame in self.frames:
            yield np.frombuffer(zlib.decompress(frame), dtype=np.uint8).reshape(self.frame_shape)


class BestAndWorst:
    """A `GameWatcher` that keeps the film of the best and of the worst game that counts, and no others.

    Of several games with the same return the first is the best one and the last the worst, so that the two
    differ where there are two games.
    """

    def __init__(self) -> None:
        self.best: GameFilm | None = None
        self.worst: GameFilm | None = None
        self._open: dict[int, list[bytes]] = {}
        self._ended: dict[int, list[bytes]] = {}
        self._frame_shape: tuple[int, ...] = ()

    def see(self, frames: np.ndarray, step: VectorStep) -> None:
        """Keep the frames acted on; an ended game is held until `count` is or is not called for it."""
        self._frame_shape = frames.shape[1:]
        self._ended.clear()
        for index, frame in enumerate(frames):
            self._open.setdefault(index, []).append(_compress(frame))
            if step.lost[index]:
                # The game was dropped with its environment; another one has begun.
                del self._open[index]
        for game in step.game_returns:
            frames_of_game = self._open.pop(game.env_index, [])
            last = step.last_frames.get(game.env_index)
            self._ended[game.env_index] = frames_of_game + ([] if last is None else [_compress(last)])

    def count(self, game: GameReturn) -> None:
        """Take a game that counts, an open one up to its latest frame."""
        frames = self._ended.pop(game.env_index, None)
        if frames is None:
            frames = self._open.pop(game.env_index, [])
        film = GameFilm(game, frames, self._frame_shape)
        if self.best is None or game.raw_return > self.best.game.raw_return:
            self.best = film
        if self.worst is None or game.raw_return <= self.worst.game.raw_return:
            self.worst = film


def _compress(frame: np.ndarray) -> bytes:
    return zlib.compress(frame.tobytes(), FASTEST)

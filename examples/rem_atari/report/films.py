"""Films: what happened, or was imagined, step by step from one held-out start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class FilmStep:
    """One step of a film.

    Attributes:
        action: name of the action taken.
        reward: the reward that came of it; of an imagined one only the sign, -1, 0 or 1.
        ended: the episode came to an end with this step.
        reward_chances: the world model's chances of the signs -1, 0, 1; None where the step is real.
        end_chance: the world model's chance of the end; None where the step is real.
        cut: nothing is known beyond this step: a limit, and not the game, cut the episode.
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
        """Two short lines on the frame after `step` steps: what led to it, and what chance it had.

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
    """Films that share one held-out start: the real continuation first, then what was imagined."""

    films: list[Film]

    @property
    def length(self) -> int:
        """Number of steps of the longest film."""
        return max(len(film.steps) for film in self.films)

"""How far imagined frames drift from real ones, step by step, under the actions that were really taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rem_atari.agent import Agent
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.models.tokenizer import foreground_of
from rem_atari.report.analysis import mean_over, psnr, to_signed
from rem_atari.report.dreams import dream_along

Drawn = Literal["imagined", "copied", "redrawn"]
"""What is compared with the real frame, as `StepErrors` names it."""


@dataclass(frozen=True, kw_only=True)
class StepErrors:
    """Mean squared errors against the real frames, frames in [-1, 1], after one number of imagined steps.

    Attributes:
        step: steps imagined, from 1.
        count: real frames that there were to compare with; where an episode ends there are no more.
        imagined: of the imagined frames.
        copied: of the real frame from which imagination began, shown unchanged.
        redrawn: of the real frame seen through the tokenizer: what the tokenizer alone costs.
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
        """Whether the imagined frames are nearer to the real ones than the last frame."""
        return self.imagined < self.copied

    def psnr(self, what: Drawn) -> float:
        """One of the three errors as a peak signal-to-noise ratio in dB."""
        return psnr(getattr(self, what))


@dataclass(frozen=True)
class HorizonErrors:
    """Errors of imagination over the controller's horizon.

    Attributes:
        starts: held-out frames from which it began.
        steps: the errors after 1, 2, ... steps, as far as there were real frames.
    """

    starts: int
    steps: list[StepErrors]

    def mean(self, what: Drawn) -> float:
        """One of the errors over the frames of all steps."""
        total = sum(step.count for step in self.steps)
        return sum(getattr(step, what) * step.count for step in self.steps) / total


@torch.no_grad()
def look_ahead(
    agent: Agent, frames: Tensor, batch: SequenceTokens, *, context: int, seed: int
) -> HorizonErrors:
    """Imagine on from held-out starts with the actions that were really taken, and compare.

    Args:
        agent: in eval mode.
        frames: held-out frames, uint8 (B, T, S, S, 3).
        batch: the same as tokens; the first `context` + 2 steps of each row are real.
        context: real steps that the world model takes in before the start.
        seed: seed of what imagination draws.
    """
    generator = torch.Generator(batch.tokens.device).manual_seed(seed)
    dream = dream_along(agent, batch, context, generator)
    errors = _errors(
        agent, frames[:, context:], batch.tokens[:, context:], batch.mask[:, context:], dream.tokens
    )
    return HorizonErrors(frames.shape[0], list(errors))


def _errors(
    agent: Agent, frames: Tensor, tokens: Tensor, real: Tensor, imagined: Tensor
) -> Iterator[StepErrors]:
    """Errors after each step that has real frames; all arguments begin with the start, (B, T, ...)."""
    for step in range(1, frames.shape[1]):
        rows = real[:, step]
        if not rows.any():
            return
        start, wanted = frames[rows, 0], frames[rows, step]
        moving = foreground_of(wanted, start).numpy()
        imagined_errors = _squared(agent.tokenizer.decode(imagined[rows, step]), wanted)
        copied_errors = _squared(start, wanted)
        yield StepErrors(
            step=step,
            count=int(rows.sum()),
            imagined=float(imagined_errors.mean(dtype=np.float64)),
            copied=float(copied_errors.mean(dtype=np.float64)),
            redrawn=float(
                _squared(agent.tokenizer.decode(tokens[rows, step]), wanted).mean(dtype=np.float64)
            ),
            imagined_moving=mean_over(imagined_errors, moving),
            copied_moving=mean_over(copied_errors, moving),
        )


def _squared(frames: Tensor, wanted: Tensor) -> np.ndarray:
    """Squared errors of uint8 frames (N, S, S, 3) in [-1, 1]."""
    return (to_signed(frames.cpu().numpy()) - to_signed(wanted.cpu().numpy())) ** 2

"""The phase of a patch tokenizer: add the patches that the game has shown since the last phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from rem_atari.models.base_tokenizer import foreground_of, to_floats
from rem_atari.models.patches import PatchTokenizer
from rem_atari.replay.buffer import Replay
from rem_atari.training.component import Component
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.updates import Metrics

FRAMES_AT_ONCE = 256
"""Frames processed together; bounds the memory."""

FRAMES_FOR_MEANS = 8_192
"""Frames whose patches give the first codes, with `patch_means`."""


class PatchPhase(TrainingPhase[torch.Tensor]):
    """Gives the patches of new frames codes. Nothing is trained, so no epoch has updates.

    Cached tokens stay valid: frames come here before anything encodes them, and the token of an added patch
    never changes.

    Args:
        tokenizer: the tokenizer that grows.
        component: an optimiser without parameters.
        replay: the source of frames.
        generator: source of the draws of a tokenizer that starts from means, on its device.
        warn: called once, when the codebook is full.
    """

    def __init__(
        self,
        tokenizer: PatchTokenizer,
        component: Component,
        replay: Replay,
        generator: torch.Generator,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(component, warn)
        self._tokenizer = tokenizer
        self._replay = replay
        self._generator = generator
        self._taken_in = 0
        self._metrics: dict[str, float] = {}

    @property
    def is_over(self) -> bool:
        """True: it never makes an update."""
        return True

    def prepare(self, epoch: int) -> bool:
        """Add codes for the frames collected since the last phase; False: there is nothing to train."""
        new = self._replay.stored_frames(self._taken_in)
        self._taken_in = self._replay.num_steps
        self._metrics = {"codes_added": 0.0}
        if len(new) > 0:
            self._metrics = self._take_in(new)
        self._metrics["codes"] = float(self._tokenizer.num_codes)
        return False

    def _take_in(self, new: torch.Tensor) -> dict[str, float]:
        """Add codes for frames; returns the metrics."""
        added, covered = 0, 0.0
        starts_from_means = self._tokenizer.cfg.patch_means
        if starts_from_means and self._tokenizer.num_codes == 0:
            frames = _spread(new, FRAMES_FOR_MEANS).to(self._tokenizer.codes.device)
            self._tokenizer.fit(frames, self._generator)
            added = int(self._tokenizer.num_codes)
        was_full = self._is_full()
        for frames in new.split(FRAMES_AT_ONCE):
            frames = frames.to(self._tokenizer.codes.device)
            added += self._tokenizer.grow(frames)
            covered += self._tokenizer.coverage(frames) * len(frames) / len(new)
        if self._is_full() and not was_full:
            self.warn(
                f"warning: all {self._tokenizer.codebook_size} codes of tokenizer.codebook_size are taken;"
                " new patches get the codes that are nearest"
            )
        metrics = {"codes_added": float(added), "covered": covered}
        return metrics | (self._look_at_means(new) if starts_from_means else {})

    def _look_at_means(self, new: torch.Tensor) -> dict[str, float]:
        """What codes that are means make of new frames, as `ConvTokenizer.loss` measures it.

        The number of codes used, and the mean squared error on foreground pixels, frames in [-1, 1]; without
        the latter where there are none.
        """
        device = self._tokenizer.codes.device
        frames = _spread(new, FRAMES_AT_ONCE).to(device)
        tokens = self._tokenizer.encode(frames)
        metrics = {"codes_used": float(len(tokens.unique()))}
        errors = (to_floats(self._tokenizer.decode(tokens)) - to_floats(frames)).square().mean(dim=-1)
        foreground = foreground_of(frames, self._replay.median_frame().to(device))
        if foreground.any():
            metrics["foreground_error"] = float(errors[foreground].mean())
        return metrics

    def draw(self) -> NoReturn:
        """Never called."""
        raise NotImplementedError("a tokenizer of patches makes no updates")

    def loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """Never called."""
        raise NotImplementedError("a tokenizer of patches makes no updates")

    def more_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """frozen (1: nothing trains), codes (in all), codes_added, and covered: the share of the new patches
        that some code is good for; without it where there were none. With `patch_means` foreground_error
        and codes_used too, of new frames, see `ConvTokenizer.loss`."""
        return {"frozen": 1.0, **self._metrics}

    def state(self) -> dict[str, Any]:
        """The number of frames processed."""
        return {"taken_in": self._taken_in}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._taken_in = int(state["taken_in"])

    def _is_full(self) -> bool:
        return int(self._tokenizer.num_codes) == self._tokenizer.codebook_size


def _spread(frames: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the frames, evenly from first to last."""
    return frames[:: -(-len(frames) // most)]

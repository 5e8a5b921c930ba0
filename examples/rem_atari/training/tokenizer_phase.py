"""The tokenizer's phase: learn to reconstruct frames, and freeze once it is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rem_atari.config import TokenizerConfig
from rem_atari.models.conv_tokenizer import ConvTokenizer
from rem_atari.models.lpips import Lpips
from rem_atari.models.tokenizer import Tokenizer
from rem_atari.replay.buffer import Replay
from rem_atari.training.component import Component
from rem_atari.training.phase import TrainingPhase
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.updates import Metrics

RESTART_EVERY = 20
"""Updates between two restarts of dead codes."""

ERROR_MOMENTUM = 0.9
"""Share of the running foreground error that an update keeps."""


class TokenizerPhase(TrainingPhase[torch.Tensor]):
    """Trains the tokenizer on frames drawn from the replay.

    If configured, the tokenizer freezes: world model and controller learn faster on tokens that keep their
    meaning. A tokenizer frozen before it shows small moving objects would hide them from the other two for
    good, so it freezes only at a low error on foreground pixels.

    Args:
        tokenizer: the tokenizer that `component` trains.
        component: its optimiser.
        replay: where frames come from.
        tokens: cleared at every update.
        config: when it freezes, and how codes start and restart.
        generator: source of draws, on the tokenizer's device.
        warn: called once, when a freeze that is due is postponed.
        perceptual: the network of the perceptual loss, if the configuration asks for it.
    """

    def __init__(
        self,
        tokenizer: ConvTokenizer,
        component: Component,
        replay: Replay,
        tokens: TokenCache,
        config: TokenizerConfig,
        generator: torch.Generator,
        warn: Callable[[str], None],
        perceptual: Lpips | None = None,
    ) -> None:
        super().__init__(component, warn)
        self.frozen = False
        self.foreground_error: float | None = None
        """Running mean of the foreground error; None before an update that saw foreground."""
        self._has_warned = False
        self._tokenizer = tokenizer
        # The only kind with learned codes, which must start and restart.
        self._learned_codes = tokenizer if isinstance(tokenizer, Tokenizer) else None
        self._replay = replay
        self._tokens = tokens
        self._config = config
        self._generator = generator
        self._perceptual = perceptual
        self._background: torch.Tensor | None = None

    @property
    def is_over(self) -> bool:
        """Whether the tokenizer is frozen."""
        return self.frozen

    def prepare(self, epoch: int) -> bool:
        """Freeze if it is time, else compute the background; False once frozen."""
        due = self._config.freeze_epoch is not None and epoch >= self._config.freeze_epoch
        if due and not self.frozen and self.component.updates > 0:
            self._freeze_if_it_may()
        if self.frozen:
            return False
        self.go_on()
        return True

    def go_on(self) -> None:
        """Compute the background, which is the same while nothing new is collected."""
        self._background = self._replay.median_frame().to(self._tokenizer.codes.device)

    def draw(self) -> torch.Tensor:
        """Frames (B, S, S, 3); codes start or restart from them when due."""
        batch_size = self._config.optim.batch_size
        frames = self._replay.sample_frames(batch_size).to(self._tokenizer.codes.device)
        if self._learned_codes is not None:
            self._care_for_codes(self._learned_codes, frames)
        return frames

    def loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """See `ConvTokenizer.loss`."""
        return self._tokenizer.loss(batch, background=self._background, perceptual=self._perceptual)

    def after_update(self, metrics: Metrics) -> None:
        """Clear the cached tokens, which are outdated; track the foreground error."""
        self._tokens.clear()
        if self._config.freeze_epoch is not None:
            self._track(float(metrics["foreground_error"]))

    def more_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Whether it is frozen, 0 or 1."""
        return {"frozen": float(self.frozen)}

    def state(self) -> dict[str, Any]:
        """Whether it is frozen, the error that decides it, and whether the warning was given."""
        return {
            "frozen": self.frozen,
            "foreground_error": self.foreground_error,
            "has_warned": self._has_warned,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.frozen = bool(state["frozen"])
        error = state["foreground_error"]
        self.foreground_error = None if error is None else float(error)
        self._has_warned = bool(state.get("has_warned", False))  # not in checkpoints of earlier versions

    def changed_on_the_way(self) -> list[torch.Tensor]:
        """The codebook and the counts of its codes: new and restarted codes are set before the step."""
        codes = self._learned_codes
        return [] if codes is None else [codes.codebook.weight, codes.uses]

    def _care_for_codes(self, tokenizer: Tokenizer, frames: torch.Tensor) -> None:
        """Start the codes from frames at the first update, and dead ones anew at every so many."""
        updates = self.component.updates
        if updates == 0 and self._config.init_from_data:
            tokenizer.initialize_codebook(frames, self._generator)
        elif updates > 0 and updates % RESTART_EVERY == 0 and self._config.restart_dead_codes:
            tokenizer.restart_dead_codes(frames, self._generator)

    def _freeze_if_it_may(self) -> None:
        """Freeze if the foreground error is known to be low enough, else warn."""
        limit = self._config.freeze_foreground_error
        self.frozen = self.foreground_error is not None and self.foreground_error <= limit
        if self.frozen or self._has_warned:
            return
        self._has_warned = True
        if self.foreground_error is None:
            reason = "none of the pixels that it trained on differed from the median frame"
        else:
            reason = (
                f"its error on foreground pixels is {self.foreground_error:.4f}, above"
                f" tokenizer.freeze_foreground_error = {limit}"
            )
        self.warn(f"warning: the tokenizer is due to freeze, but {reason}; it trains on until that is so")

    def _track(self, error: float) -> None:
        """Add an update's foreground error to the running mean; NaN (no foreground) is skipped."""
        if math.isnan(error):
            return
        before = error if self.foreground_error is None else self.foreground_error
        self.foreground_error = ERROR_MOMENTUM * before + (1 - ERROR_MOMENTUM) * error

"""The tokenizer without a learned codebook: finite scalar quantisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rem_atari.config import TokenizerConfig
from rem_atari.models.conv_tokenizer import ConvTokenizer, Quantized

SLACK = 1e-3
"""How far a number may reach beyond its outermost levels, so that these are reached in finite weights."""


class FsqTokenizer(ConvTokenizer):
    """A convolutional encoder and decoder, with each number of a code rounded to one of a few levels.

    No codebook is learned, so none can collapse, and codes have no loss: every combination of levels is a
    code. Gradients pass straight through the rounding.

    Args:
        cfg: sizes, `fsq_levels` and weights of the losses; `codebook_size` and `code_dim` are not read.
        frame_size: S, the side of a frame in pixels.

    Raises:
        ValueError: as `ConvTokenizer`, or there are no levels.

    Source: finite scalar quantisation, arXiv 2309.15505, section 3.1 and appendix A.
    """

    code_table: Tensor

    def __init__(self, cfg: TokenizerConfig, frame_size: int) -> None:
        if not cfg.fsq_levels:
            raise ValueError("tokenizer.fsq_levels is empty; wanted the number of levels of each number.")
        super().__init__(
            cfg, frame_size, code_dim=len(cfg.fsq_levels), codebook_size=math.prod(cfg.fsq_levels)
        )

    def _add_codes(self) -> None:
        levels = torch.tensor(self.cfg.fsq_levels)
        # The first number of a code varies fastest from one code to the next.
        strides = torch.cat((levels.new_ones(1), levels.cumprod(0)[:-1]))
        digits = torch.arange(self.codebook_size)[:, None] // strides % levels
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("code_table", self._scaled(digits - levels // 2), persistent=False)

    @property
    def codes(self) -> Tensor:
        """Every combination of levels, numbers in [-1, 1], (V, E)."""
        return self.code_table

    def _nearest(self, outputs: Tensor) -> Tensor:
        rounded = self._bounded(outputs).round().long()
        return ((rounded + self.levels // 2) * self.strides).sum(dim=-1)

    def _quantize(self, outputs: Tensor) -> Quantized:
        bounded = self._bounded(outputs)
        rounded = bounded + (bounded.round() - bounded).detach()
        return Quantized(
            self._nearest(outputs.detach()), self._scaled(rounded), loss=outputs.new_zeros(()), metrics={}
        )

    def _bounded(self, outputs: Tensor) -> Tensor:
        """Numbers (..., E) squashed so that rounding gives -(L // 2) .. (L - 1) // 2 for L levels."""
        half = (self.levels - 1) * (1 + SLACK) / 2
        # An even number of levels lies half a step off centre.
        offset = (self.levels + 1) % 2 / 2
        return torch.tanh(outputs + torch.atanh(offset / half)) * half - offset

    def _scaled(self, levels: Tensor) -> Tensor:
        """Levels about 0 to numbers in [-1, 1]."""
        return levels / (self.levels // 2)

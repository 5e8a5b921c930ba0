"""The surroundings of each place in the last frames, from which predictions of the next frame start."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from rem_atari.models.grid import side_of


class LocalPast(nn.Module):
    """A short causal convolution over frames, then one over neighbouring places.

    Retention adds up all tokens of all frames; to recall one place of one frame, it must learn to match
    positions. Most of the next frame follows from the present surroundings of a place and their last change,
    which this module reads directly. (Mamba, arXiv 2312.00752, and other linear models use short convolutions
    in the same way.)

    Args:
        width: of the embeddings.
        frames: F, the number of frames read, the present one included.
        num_tokens: K, places of a frame, a square.

    Raises:
        ValueError: K is no square.
    """

    def __init__(self, width: int, frames: int, num_tokens: int) -> None:
        super().__init__()
        self.frames = frames
        self.grid = side_of(num_tokens)
        self.over_time = nn.Linear(frames * width, width)
        self.over_places = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, shown: Tensor) -> Tensor:
        """A summary of the last F frames: (B, F - 1 + N, K, width) to (B, N, K, width).

        Args:
            shown: embeddings of N frames and of the F - 1 frames before them, 0 for missing ones.
        """
        blocks = shown.shape[1] - self.frames + 1
        windows = torch.cat([shown[:, first : first + blocks] for first in range(self.frames)], dim=-1)
        past = functional.silu(self.over_time(windows))
        squares = rearrange(past, "b n (h w) e -> (b n) e h w", h=self.grid)
        around = rearrange(self.over_places(squares), "(b n) e h w -> b n (h w) e", n=blocks)
        return shown[:, self.frames - 1 :] + around

"""What the last frames show around each place: where predictions of the next one start from."""

from __future__ import annotations

from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


class LocalPast(nn.Module):
    """A short causal convolution over frames, then one over neighbouring places.

    Retention adds up all tokens of all frames; to find one place in one of them again, it must learn to match
    positions. What stands beside a place now, and when that last changed, are what most of a next frame
    follows from, and here they are read directly. (Short convolutions serve linear attention likewise in
    Mamba, arXiv 2312.00752, and in its kin.)

    Args:
        width: of the embeddings.
        frames: F, how many frames are read, the present one included.
        num_tokens: K, places of a frame, a square.
    """

    def __init__(self, width: int, frames: int, num_tokens: int) -> None:
        super().__init__()
        self.frames = frames
        self.grid = isqrt(num_tokens)
        self.over_time = nn.Linear(frames * width, width)
        self.over_places = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, shown: Tensor) -> Tensor:
        """What the last F frames show: (B, F - 1 + N, K, width) to (B, N, K, width).

        Args:
            shown: embeddings of N frames and of the F - 1 before them, 0 for those that there were not.
        """
        blocks = shown.shape[1] - self.frames + 1
        windows = torch.cat([shown[:, first : first + blocks] for first in range(self.frames)], dim=-1)
        past = functional.silu(self.over_time(windows))
        squares = rearrange(past, "b n (h w) e -> (b n) e h w", h=self.grid)
        around = rearrange(self.over_places(squares), "(b n) e h w -> b n (h w) e", n=blocks)
        return shown[:, self.frames - 1 :] + around

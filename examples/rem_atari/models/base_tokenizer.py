"""The interface of every tokenizer: frames to squares of tokens, and tokens to frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from einops import pack, rearrange, unpack
from torch import Tensor, nn
from torch.nn import functional

from rem_atari.config import TokenizerConfig

FOREGROUND_THRESHOLD = 10
"""A pixel is foreground where a channel is more than so many levels (of 255) from the background."""

FRAMES_AT_ONCE = 256
"""Frames encoded or decoded in one pass; bounds the memory of the first, widest layers."""

FRAMES_AT_ONCE_ON_A_CPU = 16
"""The same on a CPU, where a few frames are faster than many, because their layers stay in the cache."""


class BaseTokenizer(nn.Module, ABC):
    """A frame of S x S pixels as grid x grid tokens, row by row, each the index of a code.

    A token stands for a square patch of the frame; its side is the number of times that the configured
    channels halve the frame, as a power of two.

    Args:
        cfg: the configuration.
        frame_size: S, the side of a frame in pixels.
        code_dim: E, dimension of a code.
        codebook_size: V, number of codes.

    Raises:
        ValueError: the frame is no multiple of a patch.
    """

    def __init__(self, cfg: TokenizerConfig, frame_size: int, *, code_dim: int, codebook_size: int) -> None:
        super().__init__()
        stride = 2 ** (len(cfg.channels) - 1)
        if frame_size % stride != 0:
            raise ValueError(
                f"env.frame_size is {frame_size}; tokenizer.channels {cfg.channels} halve a frame "
                f"{len(cfg.channels) - 1} times, so it must be a multiple of {stride}."
            )
        self.cfg = cfg
        self.frame_size = frame_size
        self.grid = frame_size // stride
        self.num_tokens = self.grid**2
        self.code_dim = code_dim
        self.codebook_size = codebook_size

    @property
    def code_parts(self) -> int:
        """The number of parts that a code consists of: it is their concatenation, and they are of a kind."""
        return 1

    @property
    @abstractmethod
    def codes(self) -> Tensor:
        """The codes as a table without gradient, (V, E)."""

    @abstractmethod
    def _tokenize(self, frames: Tensor) -> Tensor:
        """Tokens of frames: uint8 (B, S, S, 3) to int64 (B, K)."""

    @abstractmethod
    def _draw(self, tokens: Tensor) -> Tensor:
        """Frames of tokens: int64 (B, K) to float32 (B, S, S, 3) about [-1, 1]."""

    def compile_networks(self) -> None:
        """Compile the networks that take most of the time with torch.compile, if there are any."""
        return

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Tokens of frames: uint8 (..., S, S, 3) to int64 (..., K), without gradient."""
        self._check_frames("encode", frames, leading="...")
        rows, leading = pack([frames], "* height width channel")
        return unpack(_in_parts(self._tokenize, rows), leading, "* token")[0]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Frames of tokens: int64 (..., K) to uint8 (..., S, S, 3), without gradient."""
        rows, leading = pack([tokens], "* token")
        frames = _in_parts(lambda part: to_bytes(self._draw(part)), rows)
        return unpack(frames, leading, "* height width channel")[0]

    @torch.no_grad()
    def images(self, tokens: Tensor) -> Tensor:
        """Images of tokens: int64 (..., K) to float32 (..., 3, S, S) about [-1, 1], without gradient."""
        rows, leading = pack([tokens], "* token")
        images = _in_parts(lambda part: rearrange(self._draw(part), "b h w c -> b c h w"), rows)
        return unpack(images, leading, "* channel height width")[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes of tokens: int64 (..., K) to (..., K, E), without gradient into the codes."""
        return functional.embedding(tokens, self.codes)

    def _check_frames(self, caller: str, frames: Tensor, *, leading: str) -> None:
        """Check type and shape of frames with any leading dimensions ("...") or a single one ("B")."""
        wanted = (self.frame_size, self.frame_size, 3)
        fits = frames.shape[-3:] == wanted and (leading == "..." or frames.dim() == 4)
        if not fits or frames.dtype != torch.uint8:
            raise ValueError(
                f"{type(self).__name__}.{caller}(): frames is {frames.dtype} {tuple(frames.shape)}; "
                f"wanted torch.uint8 ({leading}, {', '.join(map(str, wanted))})."
            )


def foreground_of(frames: Tensor, background: Tensor) -> Tensor:
    """Pixels that differ from the background, bool (..., S, S).

    Args:
        frames: uint8 (..., S, S, 3).
        background: uint8 (S, S, 3).
    """
    differences = (frames.to(torch.int16) - background.to(torch.int16)).abs()
    return (differences > FOREGROUND_THRESHOLD).any(dim=-1)


def to_floats(frames: Tensor) -> Tensor:
    """Bytes 0..255 to [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to bytes, what lies outside clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _in_parts(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The function of all rows, some rows at a time."""
    at_once = FRAMES_AT_ONCE_ON_A_CPU if rows.device.type == "cpu" else FRAMES_AT_ONCE
    return torch.cat([function(part) for part in rows.split(at_once)])

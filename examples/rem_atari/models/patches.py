"""Tokens that are patches of pixels: the codebook only grows, and nothing is trained by gradients."""

from __future__ import annotations

from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn

from rem_atari.config import TokenizerConfig
from rem_atari.models.base_tokenizer import BaseTokenizer, to_floats
from rem_atari.models.patch_means import patch_means


class PatchTokenizer(BaseTokenizer):
    """Each code is a patch of pixels that the game has shown, or the mean of some; it never changes.

    A token is the first code whose patch lies within `patch_threshold`, or, where none does, the nearest.
    New codes come after the existing ones, so the token of a patch that was added never changes. Where
    the world is made of cells that keep to the grid, a threshold of 0 makes tokens exact: one for each kind
    of patch, from the first frame on. Where sprites move by single pixels and there are more patches than
    codes, `fit` makes the first codes means of many.

    Controller and world model see a code as the pixels in [0, 1] of its four quarters, each under the same
    fixed random projection, so a new code looks like the codes that it resembles.

    Args:
        cfg: `channels` give the size of a patch, `codebook_size` bounds the number of codes,
            `patch_threshold` is the largest error at which a code stands for a patch, `code_dim` the size of
            a code as other networks see it.
        frame_size: S, the side of a frame in pixels.

    Raises:
        ValueError: as `BaseTokenizer`.

    Source: the nearest-neighbour tokenizer of arXiv 2502.01591.
    """

    patches: Tensor
    """Pixels of the codes, (V, 3 P²) uint8 for patches of P x P pixels; 0 for codes still to come."""
    num_codes: Tensor
    """Number of codes so far, () int64."""

    def __init__(self, cfg: TokenizerConfig, frame_size: int) -> None:
        super().__init__(cfg, frame_size, code_dim=cfg.code_dim, codebook_size=cfg.codebook_size)
        size = 3 * (frame_size // self.grid) ** 2
        self.register_buffer("patches", torch.zeros(cfg.codebook_size, size, dtype=torch.uint8))
        self.register_buffer("num_codes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("projection", self._draw_projection())
        self.register_buffer("code_table", torch.zeros(cfg.codebook_size, cfg.code_dim))
        self._size = 0  # `num_codes`, for which a GPU need not be waited for
        self.register_load_state_dict_post_hook(_count_codes)

    def _draw_projection(self) -> Tensor:
        """Random columns (3 P², E), each of which reads one part of a patch."""
        parts, side = self.code_parts, self.frame_size // self.grid
        rows, columns = 3 * side**2 // parts, self.code_dim // parts
        one = nn.init.orthogonal_(torch.empty(rows, columns))
        # A patch of one colour then has codes of about the size of its pixels.
        one = one * (rows / columns) ** 0.5
        halves = isqrt(parts)
        whole = rearrange(
            torch.block_diag(*[one] * parts),
            "(y x p q c) e -> (y p x q c) e",
            y=halves,
            x=halves,
            p=side // halves,
            q=side // halves,
        )
        return whole.contiguous()

    @property
    def code_parts(self) -> int:
        """Four, the quarters of a patch; 1 where patch or code cannot be divided."""
        can_be_divided = (self.frame_size // self.grid) % 2 == 0 and self.code_dim % 4 == 0
        return 4 if can_be_divided else 1

    @property
    def codes(self) -> Tensor:
        """The existing codes as other networks see them, (V, E); one row of zeros if there are none."""
        return self.code_table[: max(self._size, 1)]

    @torch.no_grad()
    def fit(self, frames: Tensor, generator: torch.Generator) -> None:
        """Make the first codes means of patches, so that similar patches share a code; see `patch_means`.

        Args:
            frames: uint8 (B, S, S, 3).
            generator: source of its draws, on the frames' device.

        Raises:
            RuntimeError: there are codes already, which never change.
        """
        self._check_frames("fit", frames, leading="B")
        if self._size > 0:
            raise RuntimeError(f"PatchTokenizer.fit(): there are {self._size} codes already; wanted none.")
        means = patch_means(self._split(frames).flatten(0, 1), self.codebook_size, generator)
        self.patches[: len(means)] = means
        self._count(len(means))

    @torch.no_grad()
    def grow(self, frames: Tensor) -> int:
        """Add codes for the patches that no code covers, as far as there is room.

        Common patches come first, so that a full codebook contains them.

        Args:
            frames: uint8 (B, S, S, 3).

        Returns:
            The number of codes added.
        """
        self._check_frames("grow", frames, leading="B")
        if self._size == self.codebook_size:
            return 0
        patches, counts = self._split(frames).flatten(0, 1).unique(dim=0, return_counts=True)
        left = patches[counts.argsort(descending=True, stable=True)]
        before = size = self._size
        left = left[~self._is_covered(left, self.patches[:size])]
        while len(left) > 0 and size < self.codebook_size:
            self.patches[size] = left[0]
            left = left[~self._is_covered(left, self.patches[size : size + 1])]
            size += 1
        self._count(size)
        return size - before

    def _count(self, size: int) -> None:
        """Set the number of codes to `size`, and compute the new ones as other networks see them."""
        before, self._size = self._size, size
        self.num_codes.fill_(size)
        self.code_table[before:size] = (self.patches[before:size].float() / 255) @ self.projection

    @torch.no_grad()
    def coverage(self, frames: Tensor) -> float:
        """Share of the patches of frames, uint8 (B, S, S, 3), that some code covers."""
        patches = self._split(frames).flatten(0, 1)
        return float(self._is_covered(patches, self.patches[: self._size]).float().mean())

    def _tokenize(self, frames: Tensor) -> Tensor:
        errors = self._errors(self._split(frames).flatten(0, 1), self.patches[: max(self._size, 1)])
        good = errors <= self.cfg.patch_threshold
        # `max` gives the first of equals.
        found, first = good.max(dim=-1)
        return torch.where(found, first, errors.argmin(dim=-1)).unflatten(0, (len(frames), self.num_tokens))

    def _draw(self, tokens: Tensor) -> Tensor:
        side = self.frame_size // self.grid
        return rearrange(
            to_floats(self.patches[tokens]),
            "b (h w) (p q c) -> b (h p) (w q) c",
            h=self.grid,
            p=side,
            q=side,
        )

    def _split(self, frames: Tensor) -> Tensor:
        """The patches of frames: uint8 (B, S, S, 3) to (B, K, 3 P²)."""
        return rearrange(frames, "b (h p) (w q) c -> b (h w) (p q c)", h=self.grid, w=self.grid)

    def _is_covered(self, patches: Tensor, codes: Tensor) -> Tensor:
        """Patches (n, 3 P²) that one of the codes (m, 3 P²) covers, (n,) bool."""
        return (self._errors(patches, codes) <= self.cfg.patch_threshold).any(dim=-1)

    def _errors(self, patches: Tensor, codes: Tensor) -> Tensor:
        """Mean squared error, pixels in [-1, 1], of each patch (n, 3 P²) as each code (m, 3 P²): (n, m)."""
        # Sums of whole numbers, which float64 holds exactly: equal patches have an error of exactly 0.
        patches, codes = patches.double(), codes.double()
        squares = patches.square().sum(dim=-1, keepdim=True) + codes.square().sum(dim=-1)
        return torch.addmm(squares, patches, codes.T, alpha=-2) / (127.5**2 * patches.shape[-1])


def _count_codes(tokenizer: PatchTokenizer, keys: object) -> None:
    """After new values have been loaded: how many codes they are."""
    tokenizer._size = int(tokenizer.num_codes)

"""A codebook for a game that shows more patches than there are codes: the k-means of its patches."""

from __future__ import annotations

import torch
from torch import Tensor

PASSES = 12
"""Passes of Lloyd's algorithm."""

MOST_PATCHES = 20_000
"""Most distinct patches used; if there are more, a random choice of them."""

ROWS_AT_ONCE = 4_096
"""Patches compared with all means together; bounds the memory."""


def distinct_patches(patches: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of patches (n, D) uint8, and how often each occurs, (m,) int64."""
    # Sorting one random hash per row takes a fraction of the time of sorting rows.
    mix = torch.randint(-(2**62), 2**62, patches.shape[1:], generator=torch.Generator().manual_seed(0))
    mix = mix.to(patches.device)
    keys = torch.cat([(part * mix).sum(dim=-1) for part in patches.split(ROWS_AT_ONCE)])
    _, kinds, counts = keys.unique(return_inverse=True, return_counts=True)
    examples = torch.empty_like(counts).scatter_(0, kinds, torch.arange(len(kinds), device=kinds.device))
    return patches[examples], counts


def patch_means(patches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Means of clusters of patches, for codes: (count, D) uint8, or all distinct patches if they are fewer.

    A patch has the square root of its count as weight. With the count itself, the few patches of a still
    background would take the codes; with equal weights, the many patches that were seen only once would.

    Args:
        patches: uint8 (n, D).
        count: the most codes.
        generator: source of the choice of the first means, on the patches' device.

    Source: k-means++, Arthur and Vassilvitskii 2007, then Lloyd's algorithm.
    """
    examples, counts = distinct_patches(patches)
    if len(examples) <= count:
        return examples
    weights = counts.float().sqrt()
    if len(examples) > MOST_PATCHES:
        chosen = torch.multinomial(weights, MOST_PATCHES, generator=generator)
        examples, weights = examples[chosen], weights[chosen]
    rows = examples.float()
    means = _first_means(rows, weights, count, generator)
    for _ in range(PASSES):
        nearest = _nearest(rows, means)
        total = weights.new_zeros(count).index_add_(0, nearest, weights)
        sums = torch.zeros_like(means).index_add_(0, nearest, rows * weights[:, None])
        means = torch.where(total[:, None] > 0, sums / total[:, None], means)
    return means.round().to(torch.uint8)


def _first_means(rows: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows (count, D) that lie far from each other, drawn by weight times squared distance."""
    chosen: list[Tensor] = []
    chances = weights
    nearest = torch.full_like(weights, torch.inf)
    for _ in range(count):
        # The tiny constant keeps the draw possible where every row is chosen.
        index = torch.multinomial(chances + 1e-12, 1, generator=generator)
        chosen.append(rows[index])
        nearest = torch.minimum(nearest, (rows - rows[index]).square().sum(dim=-1))
        chances = weights * nearest
    return torch.cat(chosen)


def _nearest(rows: Tensor, means: Tensor) -> Tensor:
    """The nearest of the means (m, D) to each row (n, D), (n,) int64."""
    squares = means.square().sum(dim=-1)
    parts = rows.split(ROWS_AT_ONCE)
    return torch.cat([torch.addmm(squares, part, means.T, alpha=-2).argmin(dim=-1) for part in parts])

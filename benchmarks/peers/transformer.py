"""A transformer of the decoder's size on torch's attention: the alternative to a world model with POP.

It is trained on a sequence with causal attention, and writes one token after another with a cache of keys
and values, as IRIS (arXiv 2209.00588) imagines.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Transformer(nn.Module):
    """Pre-norm layers of causal attention and feed-forward; positions are learned and the caller's."""

    def __init__(self, *, embed_dim: int, num_heads: int, num_layers: int, ffn_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(embed_dim, num_heads, ffn_dim) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, E) to the same, each token from those up to it."""
        for layer in self.layers:
            x = layer(x)
        return x

    def step(self, x: Tensor, cache: Tensor, position: int) -> Tensor:
        """Map (B, n, E), the tokens at ``position`` and after it, writing their keys and values.

        Args:
            x: n = 1, or position = 0.
            cache: (layers, 2, B, H, places, D) keys and values of the tokens before.
            position: of the first token.
        """
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer(x, kept, position)
        return x

    def make_cache(self, rows: int, places: int) -> Tensor:
        """A cache of random keys and values, as if its places had been seen."""
        first = self.layers[0]
        shape = (len(self.layers), 2, rows, first.num_heads, places, first.head_dim)
        weight = first.out_proj.weight
        return torch.randn(shape, device=weight.device, dtype=weight.dtype)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.ffn = nn.Sequential(nn.Linear(embed_dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, embed_dim))

    def forward(self, x: Tensor, kept: Tensor | None = None, position: int = 0) -> Tensor:
        """See `Transformer`; ``kept`` (2, B, H, places, D) is written where the tokens are."""
        qkv = self.qkv_proj(self.norm1(x)).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if kept is not None:
            end = position + x.shape[1]
            kept[0, :, :, position:end], kept[1, :, :, position:end] = k, v
            k, v = (each[:, :, :end].to(q.dtype) for each in kept)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.out_proj(out.transpose(1, 2).flatten(-2))
        return x + self.ffn(self.norm2(x))

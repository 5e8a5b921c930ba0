"""The least that a call must move and multiply, and how fast the device moves and multiplies.

Bytes: every input read once, every output written once. Products: those of the tokens as they are, in chunks
of 64; 9.4 GFLOP for POP at REM's training shape, B 64. Both rates are measured on random numbers, because a
product of zeros draws less power and runs faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 64

BACKWARD_FLOPS = 2.5
"""Products of a backward pass, in those of the forward: scores twice, four more products of their size
instead of two, and five with a state instead of two."""

SIDES = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices whose product gives the matrix rate."""

COPIED = {"cpu": 2**13, "cuda": 2**30}
"""Bytes whose copy is the copy rate; only a GPU's counts, because a CPU's caches hold most of what a call
moves."""

ARITHMETICS = ("bfloat16", "float16", "tf32", "float32")


def floor_bytes(tensors: Sequence[Tensor | None]) -> int:
    """The bytes of tensors that are read or written once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def chunk_flops(tokens: int, key_dim: int, value_dim: int, *, takes_in: bool = True) -> int:
    """Products of a head's tokens: scores, values, reading the state and, with ``takes_in``, updating it."""
    full, rest = divmod(tokens, CHUNK)
    scored = full * CHUNK**2 + rest**2
    last = rest or min(tokens, CHUNK)
    updated = tokens if takes_in else tokens - last
    return 2 * scored * (key_dim + value_dim) + 2 * (tokens + updated) * key_dim * value_dim


def matrix_product(
    dtype: torch.dtype, device: torch.device, side: int | None = None
) -> tuple[Callable[[], object], int]:
    """A product of square matrices, and its operations."""
    side = side or SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy, and the bytes that it reads and writes."""
    source = torch.randn(COPIED[device.type] // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * floor_bytes([source])

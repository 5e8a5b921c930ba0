"""The kernels as the layers call them: the only private names of the library in the benchmarks.

They are imported when they are called: the library may be another checkout's (`benchmarks.against`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-6


def pop_rows(
    row: Sequence[Tensor],
    log_decay: Tensor,
    state: Tensor | None,
    predictions: tuple[int, int],
    block_size: int,
    offset: int,
) -> tuple[Tensor, ...]:
    """POP of rows: queries, keys and values (B, T + P·M, H, D), a sequence with its predictions behind it.

    ``predictions`` is (P, M). Returns a row of outputs and the final state.
    """
    from retpop.ops import triton_backend
    from retpop.ops.powers import DecayPowers
    from retpop.ops.rows import PopSpec

    powers = DecayPowers(log_decay, row[0].shape[-1] ** -0.5, torch.float32)
    return triton_backend.pop(row, state, PopSpec(powers, predictions, block_size, offset, None))


def gated_norm(x: Tensor, gate: Tensor) -> Tensor:
    """silu(gate) times the norm of each head's features, (B, T, H, D)."""
    from retpop.ops import triton_backend

    return triton_backend.gated_norm(x, gate, None, None, kind="groupnorm", eps=EPS, activation="silu")


def rotation_of(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotations of tokens 0, 1, ..., each (1, T, 1, D)."""
    from retpop.position import rotary_frequencies, rotation_at

    made = rotation_at(torch.arange(tokens)[None], rotary_frequencies("retnet", head_dim), "retnet")
    return made.cos.to(device), made.sin.to(device)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, T, H, D), rotated."""
    from retpop.ops import triton_backend
    from retpop.position import Rotation

    return triton_backend.rotate(q, k, Rotation(cos, sin), "retnet")

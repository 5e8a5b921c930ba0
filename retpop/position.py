"""Rotary positions: queries and keys are rotated by an angle that grows with the position.

Two conventions, named after their origin: ``"retnet"`` rotates neighbouring pairs of features, ``"rope"``
rotates pairs half a head apart. Neither scales as xPos does: like RetNet's released code, they leave that to
the decay.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from retpop._torch import transforms_are_active

KINDS = ("retnet", "rope")
BASE = 10000.0


class Rotation(NamedTuple):
    """The rotation of every token's features: cosine and sine, each (B or 1, ..., 1, Dk), float32.

    Feature x with partner y becomes x · cos + y · sin; sin carries the sign.
    """

    cos: Tensor
    sin: Tensor


class Phases(NamedTuple):
    """The rotation of every token's pairs of neighbouring features ("retnet"), by complex numbers.

    Attributes:
        pairs: cosine and sine of each pair's angle, (B or 1, ..., H or 1, Dk / 2, 2), float32.
    """

    pairs: Tensor


def rotary_frequencies(kind: str, head_dim: int) -> Tensor:
    """The angle per position of each pair of features.

    Args:
        kind: "retnet": θ = 10000^-linspace(0, 1, Dk/2); "rope": θ_i = 10000^(-2i/Dk).
        head_dim: Dk, even.

    Returns:
        θ, (Dk / 2,), float64, on the CPU.

    Source: RetNet's released code (torchscale); RoFormer, arXiv 2104.09864, section 3.2.2.
    """
    if kind not in KINDS:
        raise ValueError(f"rotary_frequencies(): kind is {kind!r}; it must be one of {KINDS}.")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rotary_frequencies(): head_dim is {head_dim}; rotary positions need an even one.")
    half = head_dim // 2
    if kind == "retnet":
        exponents = torch.linspace(0, 1, half, dtype=torch.float64, device="cpu")
    else:
        exponents = torch.arange(half, dtype=torch.float64, device="cpu") / half
    return BASE**-exponents


def rotary_turns(kind: str, head_dim: int) -> tuple[int, ...]:
    """`rotary_frequencies` in units of 2^-64 turns, as int64, for devices that have no float64.

    A product with a position wraps around after whole turns, so it keeps the angle to 2^-32 turns at any
    position below 2^32.
    """
    turns = (float(theta) / math.tau for theta in rotary_frequencies(kind, head_dim))
    return tuple((round(turn * 2**64) + 2**63) % 2**64 - 2**63 for turn in turns)


def rotation_at(positions: Tensor, frequencies: Tensor, kind: str) -> Rotation:
    """The rotation of tokens at given positions.

    The angles are computed in float64: in float32 the cosine is off by more than 1 at position 2^24.

    Args:
        positions: int64, any shape, for example (B or 1, T).
        frequencies: θ (Dk / 2,): `rotary_frequencies`, float64, or `rotary_turns`, int64.
        kind: "retnet" (neighbouring pairs) or "rope" (pairs half a head apart).

    Returns:
        cosine and signed sine, positions' shape + (1, Dk), float32; the 1 broadcasts over heads.
    """
    cos, sin = _cosines_and_sines(positions, frequencies)
    if kind == "retnet":
        return Rotation(cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2))
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def phases_at(positions: Tensor, frequencies: Tensor, num_heads: int) -> Phases:
    """`rotation_at` of kind "retnet" as phases: a third to a fifth of the time on a CPU, for each layer.

    Args:
        positions, frequencies: as there.
        num_heads: H. On a CPU each head has its own copy: a product of tensors that lie alike in memory takes
            a third of the time of one that is repeated over heads.
    """
    pairs = torch.view_as_real(torch.complex(*_cosines_and_sines(positions, frequencies)))
    if positions.is_cpu and num_heads > 1:
        pairs = pairs.expand(*positions.shape, num_heads, -1, -1).contiguous()
    return Phases(pairs)


def _cosines_and_sines(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Of the angles of each pair, positions' shape + (1, Dk / 2) both, float32."""
    if frequencies.dtype == torch.int64:
        turns = positions.unsqueeze(-1) * frequencies  # whole turns overflow, which is harmless
        angles = turns.unsqueeze(-2).float() * (math.tau * 2.0**-64)
    else:
        angles = (positions.to(torch.float64).unsqueeze(-1) * frequencies).unsqueeze(-2)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotation: Rotation | Phases, kind: str) -> Tensor:
    """Rotate queries or keys, in float32 or wider, and cast the result back.

    Args:
        x: (..., H, Dk), the leading dimensions as those of ``rotation``'s positions.
        rotation: from `rotation_at`, of the same kind, or from `phases_at`.
        kind: "retnet" or "rope".

    Returns:
        x rotated, of the same shape and dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(rotation, Phases):
        return _turned(wide, rotation.pairs).to(x.dtype)
    if kind == "retnet":
        partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = wide.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * rotation.cos, partner, rotation.sin).to(x.dtype)


def _turned(x: Tensor, phases: Tensor) -> Tensor:
    """Neighbouring pairs of (..., Dk) times complex numbers, given as (..., Dk / 2, 2)."""
    pairs = x.unflatten(-1, (-1, 2))
    # Compilers do not support complex numbers, and under vmap strides do not tell how memory lies.
    if torch.compiler.is_compiling() or transforms_are_active():
        (a, b), (cos, sin) = pairs.unbind(-1), phases.unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    even = all(step % 2 == 0 for step in (*pairs.stride()[:-1], pairs.storage_offset()))
    viewable = pairs if even and pairs.stride(-1) == 1 else pairs.clone(memory_format=torch.contiguous_format)
    product = torch.view_as_complex(viewable) * torch.view_as_complex(phases)
    return torch.view_as_real(product).flatten(-2)


def sequence_positions(start: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Positions of ``length`` tokens after ``start`` (B,) tokens (None: none): (B or 1, T), int64."""
    steps = torch.arange(length, device=device)
    return steps.unsqueeze(0) if start is None else start.unsqueeze(1) + steps


def packed_positions(
    start: Tensor | None, cu_seqlens: Tensor, length: int, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions of packed tokens, and of the token after each sequence, counted from the last reset.

    Args:
        start: (S,), int64, tokens that each sequence has seen before; None: none.
        cu_seqlens: (S + 1,), boundaries of the sequences in the row.
        length: T, tokens in the row.
        reset: (1, T), bool: the tokens at position 0; None: no token.

    Returns:
        positions (1, T) and the positions after (S,), int64.
    """
    bounds = cu_seqlens.to(torch.int64)
    first, lengths = bounds[:-1], bounds.diff()
    start = torch.zeros_like(first) if start is None else start
    tokens = torch.arange(length, device=bounds.device)
    positions = tokens + torch.repeat_interleave(start - first, lengths, output_size=length)
    if reset is None:
        return positions.unsqueeze(0), start + lengths
    last_reset = torch.where(reset[0], tokens, -1).cummax(dim=0).values
    is_own = last_reset >= torch.repeat_interleave(first, lengths, output_size=length)
    positions = torch.where(is_own, tokens - last_reset, positions)
    after = torch.nn.functional.pad(positions + 1, (1, 0))[bounds[1:]]
    return positions.unsqueeze(0), torch.where(lengths > 0, after, start)


def boundary_positions(
    start: Tensor | None, num_blocks: int, block_size: int, reset: Tensor | None, device: torch.device
) -> Tensor:
    """Positions of the first token after each boundary of N blocks, counted from the last reset.

    Args:
        start: (B,), int64, tokens seen before; None: none.
        num_blocks: N.
        block_size: L.
        reset: (B, N), bool: the blocks that start a new episode, at position 0; None: no block.
        device: of the positions.

    Returns:
        (B or 1, N + 1), int64.
    """
    blocks = torch.arange(num_blocks + 1, device=device)
    positions = sequence_positions(start, 1, device) + blocks * block_size
    if reset is None or num_blocks == 0:
        return positions
    last_reset = torch.where(reset, blocks[:-1], -1).cummax(dim=1).values
    last_reset = torch.cat((last_reset, last_reset[:, -1:]), dim=1)  # boundary N is never reset
    return torch.where(last_reset >= 0, (blocks - last_reset) * block_size, positions)

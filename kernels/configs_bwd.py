"""Tiles and schedules of the reverse sweeps of `pop_bwd` and `retention_bwd`; see `configs.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .configs import (
    BUSY_ENOUGH,
    FEWEST_SPLIT_BLOCKS,
    LARGEST_KEY_DIM,
    STEPS,
    PopConfig,
    RetentionConfig,
    busy,
    entry_of,
    may_split,
    narrowed,
    padded,
    pred_tiles,
    retention_tiles,
    schedule,
    stretch_of,
    widest_slice,
    widths,
)
from .launch import Tensors

# ---- reverse sweeps ----


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How a reverse sweep of `pop_bwd` or `retention_bwd` divides its work.

    Attributes:
        tile: tokens of a tile.
        cols_v: columns in a slice of Dv (of Dk in the sweep for dk alone, where the two change places).
        num_warps, num_stages: of a program, and of its pipeline.
        scale_v: which operand takes the powers of γ on the way into the state; see `tiles.chunk_state`.
    """

    tile: int
    cols_v: int
    num_warps: int
    num_stages: int
    scale_v: bool = False


@dataclass(frozen=True, kw_only=True)
class SweepConfigs:
    """The reverse sweeps of `pop_bwd` or `retention_bwd`.

    Attributes:
        both: the sweep for dk and dv at once, or None if each has its own.
        keys, values: the sweep for dk alone, and for dv alone.
    """

    both: SweepConfig | None
    keys: SweepConfig
    values: SweepConfig

    @property
    def states(self) -> SweepConfig:
        """The sweep for neither: that of the wider slices, which reads least."""
        wide = self.both is not None and self.both.cols_v > self.values.cols_v
        return self.both if wide else self.values


class Sweep(NamedTuple):
    """A reverse sweep: its tiles, the tensors by role, and whether roles are swapped.

    The roles are q, k, v, the outputs' gradient g, dk and dv; in POP each has a twin of predictions,
    <role>_pred. With swapped roles and transposed states the sweep for dv computes dk.
    """

    config: SweepConfig
    tokens: Tensors
    swapped: bool


_SWAPPED = {"q": "g", "k": "v", "v": "k", "g": "q", "dk": "dv", "dv": "dk"}


def sweeps_for(tokens: Tensors, configs: SweepConfigs) -> list[Sweep]:
    """One sweep for dk and dv, or one for each, as far as they are needed: a needed one has a tensor."""
    no_keys = {name: None for name in tokens if name.startswith("dk")}
    with_keys, with_values = (
        any(x is not None for name, x in tokens.items() if name.startswith(role)) for role in ("dk", "dv")
    )
    if configs.both is not None and with_keys and with_values:
        return [Sweep(configs.both, tokens, swapped=False)]
    sweeps = []
    if with_values:
        sweeps.append(Sweep(configs.values, {**tokens, **no_keys}, swapped=False))
    if with_keys:
        swapped = {}
        for name in tokens:
            role, *twin = name.split("_")
            swapped[name] = tokens["_".join([_SWAPPED[role], *twin])]
        sweeps.append(Sweep(configs.keys, {**swapped, **no_keys}, swapped=True))
    return sweeps


# (tile, warps, stages) of a sweep for both, unsliced, up to 64 x 64, found by compiling: no stack in
# use. There is none for float32 "ieee": it would need more registers than there are.
_BOTH = {
    "sm_90": (64, 4, 2),
    "sm_100": (64, 8, 2),
    "sm_": (32, 4, 2),
    "gfx": (64, 4, 2),
    "tf32": (16, 4, 2),
    "tf32x3": (16, 8, 2),
}

# The same where 64 columns are not all there: masks and narrower copies need registers too.
_BOTH_MASKED = {**_BOTH, "sm_90": (64, 8, 2), "sm_": (16, 4, 2)}


def _sweep_for_both(head_dims: tuple[int, int], kind: str) -> SweepConfig | None:
    """The sweep that finds dk and dv at once, for an architecture or a float32 precision; None: has none."""
    if padded(max(head_dims)) > 64 or kind == "ieee":
        return None
    masked = padded(max(head_dims)) == 64 and any(dim % 16 for dim in head_dims)
    tile, num_warps, num_stages = entry_of(_BOTH_MASKED if masked else _BOTH, kind)
    return SweepConfig(tile=tile, cols_v=padded(head_dims[1]), num_warps=num_warps, num_stages=num_stages)


# (tile, warps, stages) of sweeps with all of 128 columns, for 16-bit tokens, found by compiling: no stack in
# use. A program takes most of an SM's registers.
_WHOLE = {"sm_90": (32, 8, 2)}

BUSY_IN_A_SPLIT = 0.85
"""As `BUSY_ENOUGH`, which is 0.85 · 10 / 14: see `retention_bwd_config`."""


# ---- pop_bwd ----


@dataclass(frozen=True, kw_only=True)
class PopBwdConfig(SweepConfigs):
    """The reverse sweeps of `pop_bwd`.

    Attributes:
        queries: the walk for dq, a forward; None: `configs.pop_config` chooses.
        split: the gradients of the block states first, and then a program for each boundary.
    """

    queries: PopConfig | None = None
    split: bool = False


def pop_bwd_config(
    *,
    pairs: int,
    num_blocks: int,
    lengths: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    architecture: str,
    multiprocessors: int,
) -> PopBwdConfig:
    """The reverse sweeps of `pop_bwd`; arguments as those of `pop_config`.

    1. Head dims up to 64: one sweep for dk and dv, unsliced, because dk is a sum over Dv.
    2. Beyond, one each: the forward's walk with its tiles and slices, which are narrower where programs are
       few.
    3. No split, unless half of the multiprocessors have no program, and there are 4 blocks or more.
    4. Head dims up to 128, where `_WHOLE` has tiles and two of them hold a prediction: one sweep after all,
       and dq without slices, if such programs keep SMs busy (`BUSY_ENOUGH`).
    """
    if max(head_dims) > LARGEST_KEY_DIM:
        raise ValueError(
            f"pop_bwd(): (Dk, Dv) is {head_dims}; the kernels take at most {LARGEST_KEY_DIM} of each."
        )
    longest = padded(max(lengths))
    kind = precision if dtype is torch.float32 else architecture
    both = _sweep_for_both(head_dims, kind)
    if both is not None:
        # A prediction of several tiles holds a second state.
        several = kind == "sm_90" and lengths[1] > both.tile
        both = replace(both, tile=min(both.tile, longest), num_warps=8 if several else both.num_warps)

    def alone(key_dim: int, value_dim: int) -> SweepConfig:
        tile, cols_v, num_warps, num_stages = entry_of(STEPS, kind)[max(64, padded(key_dim))]
        tile = min(tile, longest)
        cols_v = min(cols_v, widest_slice(key_dim, lengths[1], tile))
        return SweepConfig(
            tile=tile,
            cols_v=narrowed(min(cols_v, padded(value_dim)), value_dim, pairs, multiprocessors),
            num_warps=num_warps,
            num_stages=min(num_stages, 2),  # a third stage would cost a stack
            scale_v=kind == "sm_90" and padded(key_dim) > 64,
        )

    values = alone(*head_dims)
    programs = pairs if both is not None else pairs * -(-head_dims[1] // values.cols_v)
    split = 2 * programs <= multiprocessors and num_blocks >= FEWEST_SPLIT_BLOCKS
    queries = None
    if both is None and kind in _WHOLE and padded(max(head_dims)) == 128:
        tile, num_warps, num_stages = _WHOLE[kind]
        tile = min(tile, longest)
        is_busy = busy(pairs * (num_blocks if split else 1), multiprocessors) >= BUSY_ENOUGH
        if is_busy and pred_tiles(lengths[1], tile) > 0:
            whole = {"tile": tile, "num_warps": num_warps, "num_stages": num_stages}
            both = SweepConfig(cols_v=padded(head_dims[1]), **whole)
            queries = PopConfig(cols_v=padded(head_dims[0]), steps=True, split=split, **whole)
    return PopBwdConfig(
        both=both, keys=alone(*reversed(head_dims)), values=values, queries=queries, split=split
    )


# ---- retention_bwd ----


@dataclass(frozen=True, kw_only=True)
class RetentionBwdConfig(SweepConfigs):
    """The launches of `retention_bwd`.

    Attributes:
        queries: the sweep for dq, a forward; None: `configs.retention_config` chooses.
        stretch: tokens that one program walks, a multiple of the tile; None: whole sequences, in one sweep.
    """

    queries: RetentionConfig | None = None
    stretch: int | None = None


def retention_bwd_config(
    *,
    tokens: int,
    sequences: int,
    num_heads: int,
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    architecture: str,
    multiprocessors: int,
) -> RetentionBwdConfig:
    """The reverse sweeps of `retention_bwd`; arguments and schedule as those of `retention_config`.

    1. Head dims up to 64: one sweep for dk and dv, unsliced, because dk is a sum over Dv.
    2. Up to 128, where `_WHOLE` has tiles: the same, and dq without slices too. Such a program has an SM for
       itself. A split has the fewest stretches that keep SMs busy (`BUSY_IN_A_SPLIT`); it moves 14 tensors
       instead of 10, so it is for what would be less than `BUSY_ENOUGH`. Short sequences then go on to 3.
    3. One sweep each, which multiply as the forward does, so with its tiles and slices.
    """
    if max(head_dims) > LARGEST_KEY_DIM:
        raise ValueError(
            f"retention_bwd(): (Dk, Dv) is {head_dims}; the kernels take at most {LARGEST_KEY_DIM} of each."
        )
    kind = precision if dtype is torch.float32 else architecture

    def tiles(key_dim: int, value_dim: int) -> RetentionConfig:
        return retention_tiles((key_dim, value_dim), dtype, precision, architecture)

    def alone(key_dim: int, value_dim: int, widest: int = LARGEST_KEY_DIM) -> SweepConfig:
        config = tiles(key_dim, value_dim)
        cols_v = min(config.cols_v, widest)
        # On sm_90 with 128 x 64, E before the stretch is a pointer more than 4 warps have registers for.
        full = kind == "sm_90" and config.cols_k * cols_v == 128 * 64
        return SweepConfig(
            tile=config.rows,
            cols_v=cols_v,
            num_warps=8 if full else config.num_warps,
            num_stages=config.num_stages,
            scale_v=config.scale_v,
        )

    keys, values = alone(*reversed(head_dims)), alone(*head_dims)
    both = _sweep_for_both(head_dims, kind)
    if both is None and kind in _WHOLE and padded(max(head_dims)) == 128:
        pairs = sequences * num_heads
        is_busy = busy(pairs, multiprocessors) >= BUSY_ENOUGH
        if is_busy or may_split(tokens, sequences):
            both, queries = _whole(head_dims, kind, tiles(*reversed(head_dims)))
            each, rows = -(-tokens // max(1, sequences)), max(both.tile, keys.tile, values.tile)
            counts = range(2, multiprocessors + 1)
            stretches = next((n for n in counts if busy(n * pairs, multiprocessors) >= BUSY_IN_A_SPLIT), 2)
            stretch = None if is_busy else stretch_of(stretches, each, rows, 128)
            queries = replace(queries, stretch=stretch)
            return RetentionBwdConfig(both=both, keys=keys, values=values, queries=queries, stretch=stretch)
    sweeps = [keys, values] if both is None else [both]
    cols_v, stretch = schedule(
        widths(values.cols_v) if both is None else [both.cols_v],
        tokens=tokens,
        sequences=sequences,
        num_heads=num_heads,
        value_dim=head_dims[1],
        rows=max(sweep.tile for sweep in sweeps),
        cols_k=padded(max(head_dims)),
        multiprocessors=multiprocessors,
    )
    if cols_v < values.cols_v:
        keys, values = alone(*reversed(head_dims), cols_v), alone(*head_dims, cols_v)
    return RetentionBwdConfig(both=both, keys=keys, values=values, stretch=stretch)


def _whole(
    head_dims: tuple[int, int], kind: str, queries: RetentionConfig
) -> tuple[SweepConfig, RetentionConfig]:
    """Without slices, the sweep for dk and dv, and that for dq; `queries`: its tiles in slices, if any."""
    tile, num_warps, num_stages = _WHOLE[kind]
    key_cols, value_cols = map(padded, head_dims)
    both = SweepConfig(tile=tile, cols_v=value_cols, num_warps=num_warps, num_stages=num_stages)
    if queries.cols_v < key_cols:
        queries = replace(queries, rows=tile, cols_v=key_cols, num_warps=num_warps, num_stages=num_stages)
    return both, queries

"""Block sizes, warps, stages and schedules; they are chosen only here and in `configs_bwd.py`.

Everything is a function of shapes, dtype and architecture (and of the number of SMs, for a schedule), so it
is tested without a GPU. `launch.architecture_of` names a device's architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch


def padded(head_dim: int) -> int:
    """The columns of a tile that holds a head dim: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


class RowConfig(NamedTuple):
    """How `norm_gate` and `rotary`, which hold whole rows of a head, divide their work.

    Attributes:
        rows: rows a program owns.
        cols: the columns of its tiles.
        num_warps: warps a program.
    """

    rows: int
    cols: int
    num_warps: int


ROW_TILE = 2048
"""Elements of their tiles: with 4 warps, two 16-byte loads a thread in bfloat16, on any architecture."""


def row_config(head_dim: int) -> RowConfig:
    """Tiles of `ROW_TILE` elements: the smaller the rows, the more of them."""
    cols = padded(head_dim)
    return RowConfig(rows=max(1, ROW_TILE // cols), cols=cols, num_warps=4)


RESIDENT_PROGRAMS = 4
"""Programs of `norm_gate_bwd` with sums that fit on a multiprocessor: 4 warps, 128 registers a thread."""


def row_runs(
    tokens: int, heads: int, config: RowConfig, multiprocessors: int, *, long: bool
) -> tuple[int, int]:
    """The number of runs of tokens, and the tokens (whole tiles) of a run; a program owns one head of a run.

    Runs of one tile, or ``long`` ones for sums over tokens: as many runs as fill the GPU once.
    """
    tiles = -(-tokens // config.rows)
    programs = RESIDENT_PROGRAMS * multiprocessors
    runs = min(tiles, max(1, programs // heads)) if long else tiles
    length = -(-tiles // runs) * config.rows
    return -(-tokens // length), length


# ---- pop_fwd ----


@dataclass(frozen=True, kw_only=True)
class PopConfig:
    """How `pop_fwd` divides its work.

    Attributes:
        tile: tokens of a full tile.
        cols_v: columns of Dv in a slice.
        num_warps, num_stages: of a program, and of its pipeline.
        scale_v: whether v or k takes the powers of γ on the way into the state; see `tiles.chunk_state`.
        steps: one tile a step, instead of all tiles of a boundary in a line.
        split: the block states first, and then a program for each boundary.
    """

    tile: int
    cols_v: int
    num_warps: int
    num_stages: int
    scale_v: bool = False
    steps: bool = False
    split: bool = False


LARGEST_KEY_DIM = 256
"""The largest Dk of a forward kernel: a program holds all of it. Dv comes in slices and has no limit."""

LONGEST_LINE = 160
"""Rows in the tiles of one boundary: with more, a line leaves no room for a second program on an SM."""

FEWEST_SPLIT_BLOCKS = 4
"""A split reads k and v twice and moves each block's state four times, in three launches."""

# (tile, columns of a slice, warps, stages) by architecture, found by compiling REM's shape: no stack in use.
_LINE = {
    "sm_90": (64, 64, 4, 2),
    "sm_100": (64, 64, 8, 2),
    "sm_120": (32, 32, 4, 2),
    "sm_": (64, 32, 4, 2),
    "gfx": (64, 64, 4, 2),
}

# The same by padded Dk, for one tile a step; float32 by its dots' precision.
STEPS = {
    "sm_90": {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 64, 8, 2)},
    "sm_100": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    "sm_120": {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (16, 32, 8, 2)},
    "sm_": {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    "gfx": {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (16, 32, 8, 2)},
    "tf32": {64: (32, 64, 4, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
    "tf32x3": {64: (16, 64, 8, 2)},
    "ieee": {64: (16, 64, 8, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 1)},
}


def tail_rows(length: int, tile: int) -> int:
    """Rows of the masked tile for the tokens of a block after its full tiles; 0 if there are none."""
    return padded(length % tile) if length % tile else 0


def pred_tiles(length: int, tile: int) -> int:
    """The tiles of a prediction: 1, 2, or 0 for more than two, which need a second state in registers."""
    tiles = max(1, -(-length // tile))
    return tiles if tiles <= 2 else 0


def widest_slice(key_dim: int, length: int, tile: int) -> int:
    """Columns of Dv in a slice at most, with predictions of ``length`` tokens in tiles of ``tile``."""
    second_state = pred_tiles(length, tile) == 0
    return NARROWEST_SLICE if second_state and padded(key_dim) == LARGEST_KEY_DIM else LARGEST_KEY_DIM


def pop_tiles(
    lengths: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    architecture: str,
) -> PopConfig:
    """The form and the tiles of `pop_fwd` with enough programs.

    A line of tiles is for low-precision tokens, head dims of 8, 16, ... 64, and blocks and predictions of
    about 64 tokens; the rest goes one tile a step, in tiles no longer than the longer of the two.

    Args:
        lengths: (L, M), tokens in a block and in a prediction.
        head_dims: (Dk, Dv).
        dtype: of the tokens.
        precision: of float32 dots, see `dot_precision`.
        architecture: of the GPU.
    """
    key_dim, value_dim = head_dims
    if key_dim > LARGEST_KEY_DIM:
        raise ValueError(f"pop_fwd(): Dk is {key_dim}; the kernel takes at most {LARGEST_KEY_DIM}.")
    tile, cols_v, num_warps, num_stages = entry_of(_LINE, architecture)
    rows = sum(length // tile * tile + tail_rows(length, tile) for length in lengths)
    wide_copies = key_dim % 8 == value_dim % 8 == 0  # of 16 bytes; narrower ones take more registers
    steps = dtype is torch.float32 or padded(max(head_dims)) > 64 or rows > LONGEST_LINE or not wide_copies
    if steps:
        table = entry_of(STEPS, precision if dtype is torch.float32 else architecture)
        tile, cols_v, num_warps, num_stages = table[max(64, padded(key_dim))]
        tile = min(tile, padded(max(lengths)))
        cols_v = min(cols_v, widest_slice(key_dim, lengths[1], tile))
        # Narrow copies, and the second state that a prediction of several tiles holds, take registers.
        num_stages = num_stages if wide_copies and lengths[1] <= tile else min(num_stages, 2)
    return PopConfig(
        tile=tile,
        cols_v=min(cols_v, padded(value_dim)),
        num_warps=num_warps,
        num_stages=num_stages,
        scale_v=architecture == "sm_90" and padded(key_dim) > 64 and dtype is not torch.float32,
        steps=steps,
    )


def pop_config(
    *,
    pairs: int,
    num_blocks: int,
    lengths: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    architecture: str,
    multiprocessors: int,
) -> PopConfig:
    """The tiles and the schedule of `pop_fwd` for `pairs` of batch and head, each of `num_blocks` blocks.

    1. Slices of Dv are halved, down to 32 columns, while there are fewer programs (pairs x slices) than
       multiprocessors.
    2. One pass, unless half of the multiprocessors still have no program, and there are 4 blocks or more.
    """
    config = pop_tiles(lengths, head_dims, dtype, precision, architecture)
    cols_v = narrowed(config.cols_v, head_dims[1], pairs, multiprocessors)
    programs = pairs * -(-head_dims[1] // cols_v)
    split = 2 * programs <= multiprocessors and num_blocks >= FEWEST_SPLIT_BLOCKS
    return replace(config, cols_v=cols_v, split=split)


def entry_of(table: dict[str, Any], kind: str) -> Any:
    """A table's entry, or that of the vendor's other architectures."""
    return table[kind] if kind in table else table["sm_" if kind.startswith("sm_") else "gfx"]


# ---- retention_fwd and retention_step ----


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """How `retention_fwd` divides its work.

    Attributes:
        rows: tokens in a chunk.
        cols_k: columns of a tile that holds all of Dk.
        cols_v: columns of Dv in a slice.
        num_warps, num_stages: of a program, and of its pipeline of chunks.
        scale_v: whether v or k takes the powers of γ on the way into the state; see `tiles.chunk_state`.
        stretch: tokens that one program walks, a multiple of `rows`; None: whole sequences, in one sweep.
    """

    rows: int
    cols_k: int
    cols_v: int
    num_warps: int
    num_stages: int
    scale_v: bool
    stretch: int | None = None


NARROWEST_SLICE = 32
"""Columns of Dv: half the slice means twice the reads of q and k, if mostly from the cache."""

WAVES = 2
"""Programs a multiprocessor that are wanted: two hide each other's waits."""

BUSY_ENOUGH = 0.6
"""The wanted share of SM time in use by programs that have an SM for themselves (`busy`)."""

SPLIT_FROM = 2048
SHORTEST_STRETCH = 256
"""A split reads k and v twice, moves each stretch's state four times and takes three launches. It needs
sequences of 2,048 tokens, and stretches whose tokens outweigh their state."""

MOST_PACKED_IN_A_SPLIT = 511
"""Each program of a split searches all sequences for its own; this many fill a GPU without a split."""

SCAN_TILE = (16, 32)
"""Rows and columns of a state in a program of a scan over stretches: small, as it only waits for memory."""

# (rows, columns of a slice, warps, stages) by padded Dk, found by compiling: no stack in use.
_WGMMA = {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 128, 8, 2)}
_BLACKWELL = {64: (64, 64, 4, 3), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)}
_MMA = {64: (64, 32, 4, 3), 128: (32, 32, 4, 2), 256: (16, 32, 8, 2)}
_AMD = {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (16, 32, 8, 2)}
_TF32 = {64: (32, 32, 4, 3), 128: (32, 32, 4, 2), 256: (16, 32, 8, 2)}
_TF32X3 = {64: (16, 32, 4, 2)}
_IEEE = {64: (16, 32, 4, 3), 128: (16, 16, 8, 2), 256: (16, 16, 8, 2)}
_FLOAT32 = {"tf32": _TF32, "tf32x3": _TF32X3, "ieee": _IEEE}


def retention_tiles(
    head_dims: tuple[int, int], dtype: torch.dtype, precision: str, architecture: str
) -> RetentionConfig:
    """The tiles of `retention_fwd` with enough programs: (Dk, Dv) by dtype and architecture."""
    key_dim, value_dim = head_dims
    if key_dim > LARGEST_KEY_DIM:
        raise ValueError(f"retention_fwd(): Dk is {key_dim}; the kernel takes at most {LARGEST_KEY_DIM}.")
    if dtype is torch.float32:
        table = _FLOAT32[precision]
    elif architecture == "sm_90":
        table = _WGMMA
    elif architecture == "sm_100":
        table = _BLACKWELL
    else:
        table = _MMA if architecture.startswith("sm_") else _AMD
    rows, cols_v, num_warps, num_stages = table[max(64, padded(key_dim))]
    if table is _WGMMA and any(dim % 8 for dim in head_dims):  # copies of less than 16 bytes take registers
        num_warps = 8 if padded(key_dim) == 128 else num_warps
        cols_v = min(cols_v, 64)
    return RetentionConfig(
        rows=rows,
        cols_k=padded(key_dim),
        cols_v=min(cols_v, padded(value_dim)),
        num_warps=num_warps,
        num_stages=num_stages,
        scale_v=table is not _MMA and (precision == "ieee" or architecture in ("sm_90", "sm_100")),
    )


def retention_config(
    *,
    tokens: int,
    sequences: int,
    num_heads: int,
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    architecture: str,
    multiprocessors: int,
) -> RetentionConfig:
    """The tiles and the schedule of `retention_fwd` for `tokens` tokens of `sequences` sequences together.

    A schedule is enough if it has two programs a multiprocessor, or keeps them busy (`enough`). The first of
    these that is, or else the one with the most programs:

    1. One sweep: a program is a sequence, a head and a slice of Dv.
    2. The same with slices of half as many columns, down to 32, where Dv has two of 32 at most: each slice
       reads all of q and k, from the cache, whose rate is little above that of the memory.
    3. A split into as few stretches as are enough.
    4. With slices of half as many columns, down to 32: one sweep, or a split.

    A split needs sequences of 2,048 tokens, and stretches of at least 256 tokens and 4 Dk. Packed sequences
    are judged by their mean length, because their lengths are on the device.
    """
    config = retention_tiles(head_dims, dtype, precision, architecture)
    cols_v, stretch = schedule(
        widths(config.cols_v),
        tokens=tokens,
        sequences=sequences,
        num_heads=num_heads,
        value_dim=head_dims[1],
        rows=config.rows,
        cols_k=config.cols_k,
        multiprocessors=multiprocessors,
    )
    return replace(config, cols_v=cols_v, stretch=stretch)


def enough(programs: int, multiprocessors: int, cols_k: int) -> bool:
    """Whether programs are `WAVES` a multiprocessor, but for one in sixteen: 256 are, on an H200's 132.

    Beyond 128 columns of Dk one program takes most of an SM's registers: then they keep SMs busy.
    """
    if cols_k > 128:
        return busy(programs, multiprocessors) >= BUSY_ENOUGH
    return 16 * programs >= 15 * WAVES * multiprocessors


def busy(programs: int, multiprocessors: int) -> float:
    """The share of the time of multiprocessors in use by programs that run one on each, round after round."""
    programs = max(1, programs)
    return programs / (-(-programs // multiprocessors) * multiprocessors)


def widths(cols_v: int) -> list[int]:
    """Columns of a slice, halved down to 32."""
    return [cols_v, *widths(cols_v // 2)] if cols_v > NARROWEST_SLICE else [cols_v]


def schedule(
    widths: Sequence[int],
    *,
    tokens: int,
    sequences: int,
    num_heads: int,
    value_dim: int,
    rows: int,
    cols_k: int,
    multiprocessors: int,
) -> tuple[int, int | None]:
    """Columns of a slice, one of `widths`, and a stretch's tokens, None for one sweep: see
    `retention_config`."""
    each = -(-tokens // max(1, sequences))

    def programs(option: tuple[int, int | None]) -> int:
        cols_v, stretch = option
        pairs = sequences * num_heads * -(-value_dim // cols_v)
        return pairs if stretch is None else pairs * -(-each // stretch)

    def cut(cols_v: int) -> tuple[int, int]:
        stretches = -(-WAVES * multiprocessors // programs((cols_v, None)))
        return cols_v, stretch_of(stretches, each, rows, cols_k)

    sweeps: list[tuple[int, int | None]] = [(cols_v, None) for cols_v in widths]
    cuts = [cut(cols_v) for cols_v in widths] if may_split(tokens, sequences) else sweeps
    if value_dim <= 2 * widths[-1]:
        options = [*sweeps, *cuts]
    else:
        options = [option for pair in zip(sweeps, cuts, strict=True) for option in pair]
    chosen = (option for option in options if enough(programs(option), multiprocessors, cols_k))
    return next(chosen, max(options, key=programs))


def may_split(tokens: int, sequences: int) -> bool:
    """Whether sequences of so many tokens together are long enough, and few enough."""
    return 0 < sequences <= MOST_PACKED_IN_A_SPLIT and tokens >= sequences * SPLIT_FROM


def stretch_of(stretches: int, tokens: int, rows: int, cols_k: int) -> int:
    """Tokens of a stretch, whole chunks of ``rows``, in a split of ``tokens`` into about so many."""
    stretch = max(-(-tokens // stretches), SHORTEST_STRETCH, 4 * cols_k)
    return -(-stretch // rows) * rows


def narrowed(cols_v: int, value_dim: int, pairs: int, multiprocessors: int) -> int:
    """Columns of a slice of Dv, halved while programs (pairs x slices) are fewer than multiprocessors."""
    while cols_v > NARROWEST_SLICE and pairs * -(-value_dim // cols_v) < multiprocessors:
        cols_v //= 2
    return cols_v


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How `retention_step` divides a state: tiles of all of Dk by a slice of Dv.

    Attributes:
        rows: Dk, padded to a power of two.
        cols: columns of Dv.
        num_warps: of a program.
    """

    rows: int
    cols: int
    num_warps: int


STEP_TILE = 4096
"""Elements of a state in one program: 16 KiB, with 4 warps 32 registers a thread."""

SECTOR = 8
"""float32 numbers in the 32 bytes that memory moves at least: no tile is narrower."""


def step_config(pairs: int, head_dims: tuple[int, int], multiprocessors: int) -> StepConfig:
    """Slices of `STEP_TILE` elements, halved (to 8 columns) until there are two programs a multiprocessor.

    Args:
        pairs: batch times heads.
        head_dims: (Dk, Dv).
        multiprocessors: of the GPU.
    """
    rows, cols = (max(SECTOR, 1 << (dim - 1).bit_length()) for dim in head_dims)
    while cols > SECTOR and (
        rows * cols > STEP_TILE or pairs * -(-head_dims[1] // cols) < 2 * multiprocessors
    ):
        cols //= 2
    return StepConfig(rows=rows, cols=cols, num_warps=max(1, min(4, rows * cols // 1024)))

"""Programs and waves of every launch of retention, over a list of shapes; needs no GPU.

    python -m benchmarks.kernel_audit.programs

A wave is a program for each multiprocessor of an H200.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.text import print_table
from retpop.kernels.launch import Launch, Target
from retpop.kernels.retention_bwd import plan_retention_bwd
from retpop.kernels.retention_fwd import plan_retention_fwd

H200 = Target("sm_90", 132)


class Shape(NamedTuple):
    """Tokens of retention, (B, T, H, D), in bfloat16."""

    B: int
    T: int
    H: int
    D: int


README = (
    Shape(1, 8192, 96, 128),
    Shape(2, 16_384, 16, 128),
    Shape(4, 4096, 64, 128),
    Shape(8, 2048, 32, 256),
)
"""The shapes at which the README of flash-linear-attention times its kernels."""

SHAPES = (
    *README,
    *itertools.starmap(
        Shape,
        itertools.product((1, 2, 4, 8), (1024, 4096, 16_384, 65_536), (4, 8, 16, 32, 64, 96), (64, 128, 256)),
    ),
)


def launches(shape: Shape, target: Target = H200) -> Iterator[tuple[str, Launch]]:
    """The launches of the forward and of the backward, with the direction."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    log_decay = torch.empty(shape.H, device="meta")
    arguments = (x, x, x, log_decay, None, 1.0, None)
    forward, _ = plan_retention_fwd(*arguments, target=target)
    backward, _ = plan_retention_bwd(*arguments, x, None, needs=(True, True, True, False), target=target)
    yield from (("forward", launch) for launch in forward)
    yield from (("backward", launch) for launch in backward)


def main() -> None:
    """Print a row for each launch at the README's shapes."""
    body = []
    for shape in README:
        for direction, launch in launches(shape):
            programs = launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1)
            waves = f"{programs / H200.multiprocessors:.2f}"
            sizes = " ".join(f"{name}{size}" for name, size in shape._asdict().items())
            body.append([sizes, direction, launch.kernel.__name__, str(programs), waves])
    print_table(["shape", "pass", "kernel", "programs", "waves"], body)


if __name__ == "__main__":
    main()

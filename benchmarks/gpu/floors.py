"""The ceilings of this GPU, measured in the run that is judged by them: copying and multiplying.

On random numbers: a product of zeros draws less power and runs faster.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.rows import Row

PART = "floors"

COPY = "copy"
PRODUCTS = {"bfloat16": 8192, "float16": 8192, "tf32": 8192, "float32": 4096}
"""The side of the square matrices, by the arithmetic."""


def measure(clock: Clock) -> Iterator[Row]:
    """A copy of 4 GiB, counting bytes read and written, and a matrix product in each arithmetic."""
    yield _copy(clock)
    for name, side in PRODUCTS.items():
        side = side if clock.on_gpu else 32
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        seconds = clock.median(lambda a=a, b=b: a @ b)
        torch.set_float32_matmul_precision("highest")
        yield Row(
            part=PART,
            what="matrix product",
            shape=f"{side} cubed",
            dtype=name,
            seconds=seconds,
            floor_flops=2 * side**3,
        )


def _copy(clock: Clock) -> Row:
    count = 2**31 if clock.on_gpu else 2**10
    source = torch.randn(count, device=clock.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = clock.median(lambda: target.copy_(source))
    return Row(part=PART, what=COPY, dtype="bfloat16", seconds=seconds, floor_bytes=4 * count)


class Ceilings:
    """What the floors come to: bytes and operations a second."""

    def __init__(self, rows: list[Row]) -> None:
        timed = [row for row in rows if row.part == PART and row.seconds]
        self.bandwidth = next((r.floor_bytes / r.seconds for r in timed if r.what == COPY), None)
        self.rates = {r.dtype: r.floor_flops / r.seconds for r in timed if r.what != COPY}

    def fraction(self, row: Row) -> float | None:
        """A row's floor over its time: 1 is as fast as can be; None where a floor is unknown."""
        if not row.seconds or not (row.floor_bytes or row.floor_flops):
            return None
        floors = []
        if row.floor_bytes:
            if self.bandwidth is None:
                return None
            floors.append(row.floor_bytes / self.bandwidth)
        if row.floor_flops:
            if row.dtype not in self.rates:
                return None
            floors.append(row.floor_flops / self.rates[row.dtype])
        return max(floors) / row.seconds

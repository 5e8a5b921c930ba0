"""Timing on a GPU, eagerly and in a CUDA graph; in a rehearsal on a CPU everything runs once."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Run = Callable[[], object]

WARM_UP, REPEAT = 20, 60
"""Milliseconds of warm-up and of measurement, as `triton.testing.do_bench` takes them."""


class Clock:
    """Medians of a device's times; between repetitions do_bench clears the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device.type == "cuda"

    def median(self, run: Run) -> float:
        """Median seconds of ``run``, called as a program would call it."""
        run()
        if not self.on_gpu:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        from triton.testing import do_bench

        torch.cuda.synchronize()
        return 1e-3 * float(do_bench(run, warmup=WARM_UP, rep=REPEAT, return_mode="median"))

    def graphed(self, run: Run) -> float:
        """Median seconds of a replay of ``run``, captured in a CUDA graph: the GPU's share alone."""
        if not self.on_gpu:
            return self.median(run)
        return self.median(captured(run).replay)

    def modes(self) -> dict[str, Callable[[Run], float]]:
        """Both, by name."""
        return {"eager": self.median, "graph": self.graphed}


def captured(run: Run) -> torch.cuda.CUDAGraph:
    """``run`` in a CUDA graph, after three calls on a side stream, as PyTorch's documentation has it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph

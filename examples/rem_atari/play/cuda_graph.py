"""Imagination captured as a CUDA graph: one launch in place of a thousand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Generic, TypeVar

import torch

from rem_atari.models.sequence_tokens import SequenceTokens

Result = TypeVar("Result")

WARM_UP = 3
"""Calls before the capture, in which libraries set themselves up and kernels are compiled and tuned."""


class CudaGraph(Generic[Result]):
    """A function of segments without gradient, as a CUDA graph that its first call captures.

    The function must do the same work whatever the segments hold: no shape that depends on values, no waiting
    for the device, random numbers from `generator` alone. Calling the graph gives what calling the function
    would give and leaves the generator where the function would leave it, so that a run does not depend on
    when it was captured. Weights are read where they lie: in-place changes, as optimisers and
    `load_state_dict` make them, are seen.

    The result's tensors belong to the graph: the next call overwrites them.

    Args:
        function: what to capture.
        generator: its source of random numbers, on a CUDA device.
    """

    def __init__(self, function: Callable[[SequenceTokens], Result], generator: torch.Generator) -> None:
        self._function = function
        self._generator = generator
        self._graph: torch.cuda.CUDAGraph | None = None
        self._segments: SequenceTokens | None = None
        self._result: Result | None = None

    @torch.no_grad()
    def __call__(self, segments: SequenceTokens) -> Result:
        """The function's result for segments of the same shape at every call."""
        if self._graph is None:
            self._capture(segments)
        for column in fields(segments):
            getattr(self._segments, column.name).copy_(getattr(segments, column.name))
        self._graph.replay()
        return self._result

    def _capture(self, segments: SequenceTokens) -> None:
        """Capture the function, which leaves no trace in the generator."""
        state = self._generator.get_state()
        self._segments = SequenceTokens(
            *(getattr(segments, column.name).clone() for column in fields(segments))
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._function(self._segments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        # Weights that autocast has cast are kept until it ends. The graph must cast its own, or it would read
        # copies of old weights; and other code must not read the graph's.
        torch.clear_autocast_cache()
        with torch.cuda.graph(graph):
            self._result = self._function(self._segments)
        torch.clear_autocast_cache()
        self._generator.set_state(state)
        self._graph = graph

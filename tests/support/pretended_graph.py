"""CUDA graphs for a machine without a GPU: operations are recorded at a capture, and replayed in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PretendedGraph(TorchDispatchMode):
    """As `torch.cuda.CUDAGraph`: it holds operations with the tensors that they read and write.

    A capture leaves what it writes, and the registered generators, as they were before, because a GPU then
    runs nothing; its new tensors hold NaN until the first replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.registered: list[torch.Generator] = []
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.registered.append(generator)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        written = [a for s, a in zip(func._schema.arguments, args, strict=False) if _is_written(s)]
        written += [kwargs[s.name] for s in func._schema.arguments if s.name in kwargs and _is_written(s)]
        for x in tree_leaves(written):
            if isinstance(x, Tensor):
                self._before.setdefault(id(x), (x, x.clone()))
        result = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, _tensors(result)))
        return result

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """What `torch.cuda.graph` does."""
        generators = [torch.default_generator, *self.registered]
        states = [generator.get_state() for generator in generators]
        with self:
            yield
        with torch.no_grad():
            for x, value in self._before.values():
                x.copy_(value)
        self._before.clear()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        self._poison()

    def _poison(self) -> None:
        outside: set[int] = set()
        new: dict[int, Tensor] = {}
        for _, args, kwargs, results in self._operations:
            outside |= {_memory(x) for x in _tensors((args, kwargs))} - new.keys()
            new |= {_memory(x): x for x in results if _memory(x) not in outside | new.keys()}
        for x in new.values():
            if x.is_floating_point():
                x.detach().fill_(torch.nan)

    def replay(self) -> None:
        """Run the operations again on the same tensors."""
        with torch.no_grad():
            for func, args, kwargs, results in self._operations:
                for kept, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                    if kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> list[PretendedGraph]:
    """Let `retpop.capture` capture on a CPU; returns the graphs that it makes."""
    made: list[PretendedGraph] = []

    def make() -> PretendedGraph:
        made.append(PretendedGraph())
        return made[-1]

    monkeypatch.setattr("retpop.cuda_graph.has_graphs", lambda device: True)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph.capturing())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    return made

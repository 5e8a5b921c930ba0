"""What is measured: problems, those who solve them, and groups of these that are timed together.

A `Problem` is inputs with sizes; a `Contender` makes of it a `Work`, which times, memory, floors and the
comparison with the reference are all taken from; a `Group` is a problem and its contenders, whose times are
taken in turn so that a ratio of two of them has seen the same noise. Every module of an operation
(`benchmarks.retention`, `pop`, `decoder`, `step`, `imagination`) has a function ``groups``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.audit.case import floor_bytes

FORWARD, BOTH = "forward", "forward+backward"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Outputs = Sequence[Tensor]
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one call, the same for everybody who makes it.

    Attributes:
        sizes: of the call; a dataclass with ``text``.
        dtype: what is computed in. A model's weights and inputs stay in float32: autocast makes it bfloat16.
        tensors: inputs by name, each (B, ...).
        shared: what all rows share: log-decays, models.
    """

    sizes: Any
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it is solved."""
        return next(iter(self.tensors.values())).device

    def first_row(self, dtype: torch.dtype) -> Problem:
        """The first row of the batch, in float64 or in its own dtype: what the reference is given."""

        def cast(x: Any) -> Any:
            is_cast = dtype == torch.float64 and isinstance(x, Tensor | nn.Module)
            is_cast = is_cast and (isinstance(x, nn.Module) or x.is_floating_point())
            return copy.deepcopy(x).double() if is_cast else x

        tensors = {n: cast(x.detach()[:1]).requires_grad_(x.requires_grad) for n, x in self.tensors.items()}
        shared = {n: cast(x) for n, x in self.shared.items()}
        return replace(self, dtype=dtype, tensors=tensors, shared=shared)

    def autocast(self) -> AbstractContextManager[object]:
        """Makes a model's products of its dtype, where that is not its weights' own."""
        enabled = self.dtype in (torch.bfloat16, torch.float16)
        # Without the cache, as in a captured graph; inside one pass every weight is used once anyway.
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled, cache_enabled=False)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way through a work, and what it must at least move and compute."""

    run: Run
    floor_bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something to time.

    Attributes:
        run: computes the outputs, each (B, ...).
        answer: computes what is compared with the reference where that is not the outputs.
        inputs: tensors that are read; gradients are taken in those that require one.
        weights: further tensors in which gradients are taken.
        flops: products of the forward pass.
        backward_flops: those of the backward pass, in those of the forward.
        graded: how many outputs, the first ones, have gradients in training; 0: it is not trained.
        linear: whether backward needs no input.
    """

    run: Callable[[], Outputs]
    inputs: Sequence[Tensor | None] = ()
    weights: Sequence[Tensor] = ()
    flops: int = 0
    backward_flops: float = 2.0
    graded: int = 1
    linear: bool = False
    answer: Callable[[], Outputs] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs in which gradients are taken."""
        return [x for x in self.inputs if x is not None and x.requires_grad]

    def forward(self) -> Outputs:
        """The outputs, without gradient."""
        with torch.no_grad():
            return self.run()

    def gradients(self, upstream: Outputs) -> tuple[Tensor, ...]:
        """Gradients in the leaves, then in the weights, of the first outputs times ``upstream``."""
        return torch.autograd.grad(self.run()[: self.graded], [*self.leaves, *self.weights], upstream)

    def passes(self) -> dict[str, Pass]:
        """Forward and, if it is trained, forward and backward; runs it once to see its outputs."""
        outputs = self.forward()
        moved = floor_bytes([*self.inputs, *self.weights, *outputs])
        found = {FORWARD: Pass(run=self.forward, floor_bytes=moved, flops=self.flops)}
        if self.graded and (self.leaves or self.weights):
            upstream = [torch.randn_like(x) for x in outputs[: self.graded]]
            read = [] if self.linear else [*self.inputs, *self.weights]
            moved += floor_bytes([*read, *upstream, *self.leaves, *self.weights])
            flops = int((1 + self.backward_flops) * self.flops)
            found[BOTH] = Pass(run=lambda: self.gradients(upstream), floor_bytes=moved, flops=flops)
        return found


Maker = Callable[[Problem], Work]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Somebody who solves a problem.

    Attributes:
        make: the work, of a problem.
        reference: what its outputs must equal, of a problem of one row in float64.
        computes: "" if that is the same function as ours, else what it computes instead.
        model: whether outputs are a model's, (..., T, E); else an operation's, (..., T, H, D).
        states: how many outputs, the last ones, are states.
    """

    make: Maker
    reference: Maker
    computes: str = ""
    model: bool = False
    states: int = 0


@dataclass(frozen=True, kw_only=True)
class Group:
    """Contenders on one problem, timed in turn.

    Attributes:
        op, shape, mode: its name; what computes, for which kind of sizes, in which way.
        dtype: name of what is computed in.
        size: the number that varies where the shape is a series, else 0.
        passes: those that are timed.
        problem: makes the problem on a device.
        contenders: by name.
    """

    op: str
    shape: str
    mode: str
    dtype: str
    passes: Sequence[str]
    problem: Callable[[torch.device], Problem]
    contenders: Mapping[str, Contender]
    size: int = 0


def randoms(
    names: str, *shape: int, dtype: torch.dtype, device: torch.device, grad: bool = True
) -> dict[str, Tensor]:
    """Random tensors of one shape by their names."""
    return {n: leaf(*shape, dtype=dtype, device=device, grad=grad) for n in names.split()}


def leaf(*shape: int, dtype: torch.dtype, device: torch.device, grad: bool = True) -> Tensor:
    """A random tensor in which gradients can be taken."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def weights_of(model: nn.Module) -> list[Tensor]:
    """What training changes."""
    return [x for x in model.parameters() if x.requires_grad]


def product_flops(model: nn.Module) -> int:
    """Products of a token's way through a model: two operations a weight of its matrices."""
    return 2 * sum(x.numel() for x in model.parameters() if x.dim() > 1)

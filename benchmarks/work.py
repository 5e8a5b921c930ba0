"""Units of measurement: problems, contenders that solve them, and groups of contenders timed together.

A `Problem` is inputs with sizes. A `Contender` makes a `Work` of it: times, memory, floors and the comparison
with the reference are all taken from that. A `Group` is a problem and its contenders, timed in turn, so that
the sides of a ratio have seen the same noise. Every module of an operation has a function ``groups``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floors import floor_bytes
from benchmarks.timing import Run

FORWARD, BOTH, UPDATE = "forward", "forward+backward", "training step"
"""The passes; the last one is forward, backward and AdamW."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {"backend": "torch"},
    "compile": {"backend": "torch", "compiled": True},
    "triton": {"backend": "triton"},
    "triton-compile": {"backend": "triton", "compiled": True},
}
"""Our own contenders and their names."""

ON_GPU = ("triton", "triton-compile", "fla")
"""Contenders that need a GPU; on a CPU Triton would run in its interpreter."""

Outputs = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one call, the same for every contender.

    Attributes:
        sizes: of the call; a dataclass with ``text``.
        dtype: of the computation. A model's weights and inputs stay in float32, under autocast.
        tensors: inputs by name, each (B, ...).
        shared: what all rows of the batch share: log-decays, models.
    """

    sizes: Any
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""
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
        """Computes a model's products in ``dtype``, where that is not its weights' own."""
        enabled = self.dtype in (torch.bfloat16, torch.float16)
        # Without the cache, as in a captured graph; inside one pass every weight is used once anyway.
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled, cache_enabled=False)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass through a work, and the least that it must move and multiply."""

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
        moves: whether the bytes of inputs and outputs count; a model's floor is its products alone.
    """

    run: Callable[[], Outputs]
    inputs: Sequence[Tensor | None] = ()
    weights: Sequence[Tensor] = ()
    flops: int = 0
    backward_flops: float = 2.0
    graded: int = 1
    linear: bool = False
    moves: bool = True
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

    def passes(self, wanted: Sequence[str] = (FORWARD, BOTH)) -> dict[str, Pass]:
        """The passes that it has of those that are wanted; runs it once to see its outputs."""
        outputs = self.forward()
        moved = floor_bytes([*self.inputs, *outputs]) if self.moves else 0
        found = {FORWARD: Pass(run=self.forward, floor_bytes=moved, flops=self.flops)}
        if self.graded and (self.leaves or self.weights):
            upstream = [torch.randn_like(x) for x in outputs[: self.graded]]
            read = [] if self.linear else self.inputs
            moved += floor_bytes([*read, *upstream, *self.leaves]) if self.moves else 0
            flops = int((1 + self.backward_flops) * self.flops)
            found[BOTH] = Pass(run=lambda: self.gradients(upstream), floor_bytes=moved, flops=flops)
            if UPDATE in wanted:
                found[UPDATE] = replace(found[BOTH], run=self._update())
        return {name: found[name] for name in wanted if name in found}

    def _update(self) -> Run:
        """Forward, backward and AdamW, with a learning rate that leaves the weights finite."""
        on_gpu = self.weights[0].is_cuda
        optimizer = torch.optim.AdamW(self.weights, lr=1e-5, capturable=on_gpu, fused=on_gpu)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            sum(x.float().square().mean() for x in self.run()[: self.graded]).backward()
            optimizer.step()

        return run


Maker = Callable[[Problem], Work]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to solve a problem.

    Attributes:
        make: the work, of a problem.
        reference: what its outputs must equal, of a problem of one row in float64.
        computes: "" if that is the same function as ours, else what it computes instead.
        model: whether outputs are a model's, (..., T, E); else an operation's, (..., T, H, D).
        states: how many outputs, the last ones, are states.
        graphable: whether a CUDA graph of it is timed too.
    """

    make: Maker
    reference: Maker
    computes: str = ""
    model: bool = False
    states: int = 0
    graphable: bool = False


def ours(
    make: Callable[..., Work],
    names: Sequence[str] = ("torch", "compile", "triton"),
    *,
    reference: Maker | None = None,
    **options: Any,
) -> dict[str, Contender]:
    """Our contenders of these names: ``make`` with ``backend`` and, where it is compiled, ``compiled``.

    The reference is ``make`` by the backend "reference", unless another is given; ``options`` are the
    contenders' fields.
    """
    expected = reference or partial(make, backend="reference")
    return {
        name: Contender(make=partial(make, **BACKENDS[name]), reference=expected, graphable=True, **options)
        for name in names
    }


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
        for_gpu: whether its sizes are too large for a CPU.
    """

    op: str
    shape: str
    mode: str
    dtype: str
    passes: Sequence[str]
    problem: Callable[[torch.device], Problem]
    contenders: Mapping[str, Contender]
    size: int = 0
    for_gpu: bool = False


def randoms(
    names: str, *shape: int, dtype: torch.dtype, device: torch.device, grad: bool = True
) -> dict[str, Tensor]:
    """Random tensors of one shape by their names."""
    return {n: leaf(*shape, dtype=dtype, device=device, grad=grad) for n in names.split()}


def leaf(*shape: int, dtype: torch.dtype, device: torch.device, grad: bool = True) -> Tensor:
    """A random tensor in which gradients can be taken."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def compile_call(call: Callable[..., Any], backend: str, device: torch.device) -> Callable[..., Any]:
    """``call`` by torch.compile, in one graph; interpreted kernels are captured and no more."""
    compiler = "eager" if backend == "triton" and device.type == "cpu" else "inductor"
    return torch.compile(call, dynamic=False, fullgraph=True, backend=compiler)


def weights_of(model: nn.Module) -> list[Tensor]:
    """What training changes."""
    return [x for x in model.parameters() if x.requires_grad]


def product_flops(model: nn.Module) -> int:
    """Products of a token's way through a model: two operations a weight of its matrices."""
    return 2 * sum(x.numel() for x in model.parameters() if x.dim() > 1)

"""A case: one call of one launcher, forward or backward, on inputs as the layers make them.

A case is made for any device: "meta" tensors to see what would be compiled, "cpu" to run in the interpreter
with ``rows`` of the batch only (bytes and flops grow with the batch, their ratios do not). A backward call is
given a gradient of each output and finds that of each input.

The floor of its bytes and the yardstick of its products are those of `benchmarks.floors`.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from benchmarks.floors import BACKWARD_FLOPS, chunk_flops
from retpop.ops.rows import split_row

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
"""Multiprocessors of an A100, A40, H100, B200, RTX 5090 and MI300X."""

Made = tuple[Sequence[Tensor | None], Sequence[Tensor]]
"""The inputs of a call and its outputs."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one launcher.

    Attributes:
        op: the launcher's name, which is its module's.
        shape: what kind of shape it is, for example "rem training".
        dtype: of the token tensors.
        head_dim: the larger of Dk and Dv.
        batch: rows of the whole case; it is counted on one row and as small a part of the GPU.
        call: makes the inputs for (device, batch rows) and calls the launcher; returns (inputs, outputs).
        flops: the yardstick for one row of the batch; 0 where there are no dot products.
    """

    op: str
    shape: str
    dtype: torch.dtype
    head_dim: int
    batch: int
    call: Callable[[torch.device, int], Made]
    flops: int = 0

    @property
    def name(self) -> str:
        """For example "pop_fwd, rem training, bfloat16"."""
        return f"{self.op}, {self.shape}, {str(self.dtype).removeprefix('torch.')}"


@contextmanager
def on_architecture(architecture: str, op: str, *, fraction: float = 1.0) -> Iterator[None]:
    """Let a launcher see a GPU of ``architecture``, or a ``fraction`` of it (for a fraction of a batch)."""
    launcher(op)
    launch = importlib.import_module("retpop.kernels.launch")
    target = launch.Target(architecture, max(1, math.ceil(fraction * MULTIPROCESSORS[architecture])))
    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("retpop.kernels.")]:
            if hasattr(module, "target_of"):
                stack.enter_context(mock.patch.object(module, "target_of", return_value=target))
        yield


def launcher(op: str) -> Callable[..., Any]:
    """A launcher by its name; imported late, because Triton reads TRITON_INTERPRET at import."""
    module, function = _PLACES.get(op, (op, op))
    return getattr(importlib.import_module(f"retpop.kernels.{module}"), function)


_PLACES = {
    "norm_gate_fwd": ("norm_gate", "norm_gate_fwd"),
    "norm_gate_bwd": ("norm_gate", "norm_gate_bwd"),
    "rotary_fwd": ("rotary", "rotary_fwd"),
    "rotary_bwd": ("rotary", "rotary_fwd"),  # its inverse
}
"""Module and function of the launchers that are not named as their modules."""


def tokens(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros, because no figure depends on values."""
    return torch.zeros(shape, dtype=dtype, device=device)


def log_decays(device: torch.device, heads: int) -> Tensor:
    """One a head; so slow that no program starts a stretch early, which would move fewer bytes."""
    return torch.full((heads,), -0.01, device=device)


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operation at some sizes.

    Attributes:
        names: the launchers of its forward and, if it has one, of its backward.
        B: rows of the whole batch; a call is made for the number of rows it is given.
        H, D: heads and their dims.
    """

    names: ClassVar[tuple[str, ...]]

    B: int
    H: int
    D: int

    @property
    def dims(self) -> tuple[int, int]:
        """(Dk, Dv)."""
        return self.D, self.D

    @property
    def flops(self) -> int:
        """The yardstick of the forward for one row of the batch; 0 without products of tiles."""
        return 0

    def forward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        raise NotImplementedError

    def backward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        raise NotImplementedError


def forward(dtype: torch.dtype, shape: str, call: Call) -> Case:
    """The forward call as a case, whose ``shape`` is a name for its sizes."""
    return _case(call.names[0], shape, dtype, call, call.forward, call.flops)


def backward(dtype: torch.dtype, shape: str, call: Call) -> Case:
    """The backward call as a case."""
    return _case(call.names[1], shape, dtype, call, call.backward, int(BACKWARD_FLOPS * call.flops))


def _case(op: str, shape: str, dtype: torch.dtype, call: Call, run: Callable[..., Made], flops: int) -> Case:
    return Case(
        **{"op": op, "shape": shape, "dtype": dtype, "head_dim": max(call.dims), "batch": call.B},
        call=partial(run, dtype),
        flops=flops,
    )


@dataclass(frozen=True, kw_only=True)
class Pop(Call):
    """POP. ``state``: with a first state, and a gradient of the last one. ``packed``: as the layers call it,
    with views of a projection's q, k and v, and outputs in rows of main and prediction tokens.
    """

    names: ClassVar = ("pop_fwd", "pop_bwd")

    N: int
    L: int
    M: int
    Dv: int | None = None
    P: int | None = None
    offset: int = 0
    state: bool = False
    reset: bool = False
    packed: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        return self.D, self.Dv or self.D

    @property
    def predictions(self) -> int:
        return self.N if self.P is None else self.P

    @property
    def flops(self) -> int:
        blocks = self.N * chunk_flops(self.L, *self.dims)
        return self.H * (blocks + self.predictions * chunk_flops(self.M, *self.dims, takes_in=False))

    def forward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        inputs = self._inputs(dtype, device, rows)
        into = dict(zip(("out", "pred"), self._pair(dtype, device, rows, self.D), strict=True))
        launch = launcher("pop_fwd")
        return inputs, launch(*inputs, self.L, self.offset, self.D**-0.5, **(into if self.packed else {}))

    def backward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        inputs = self._inputs(dtype, device, rows)
        inputs += self._pair(dtype, device, rows, self.dims[1])
        inputs.append(self._state(device, rows))
        pairs = [self._pair(dtype, device, rows, self.D) for _ in range(3)]
        into = [*(main for main, _ in pairs), *(pred for _, pred in pairs)] if self.packed else None
        grads = launcher("pop_bwd")(*inputs, self.L, self.offset, self.D**-0.5, [True] * 7, out=into)
        return inputs, [x for x in grads if x is not None]

    def _inputs(self, dtype: torch.dtype, device: torch.device, rows: int) -> list[Tensor | None]:
        if self.packed:
            projected = tokens(device, dtype, rows, self._length, 3, self.H, self.D)
            pairs = [self._split(x) for x in projected.unbind(2)]
        else:
            pairs = [self._pair(dtype, device, rows, width) for width in (self.D, *self.dims)]
        main, pred = zip(*pairs, strict=True)
        starts = torch.zeros(rows, self.N, dtype=torch.bool, device=device) if self.reset else None
        return [*main, *pred, log_decays(device, self.H), self._state(device, rows), starts]

    def _pair(self, dtype: torch.dtype, device: torch.device, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Tokens of blocks and of predictions: views of one row if packed."""
        if self.packed:
            return self._split(tokens(device, dtype, rows, self._length, self.H, width))
        main = tokens(device, dtype, rows, self.N * self.L, self.H, width)
        return main, tokens(device, dtype, rows, self.predictions, self.M, self.H, width)

    @property
    def _length(self) -> int:
        return self.N * self.L + self.predictions * self.M

    def _split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        return split_row(row, (self.predictions, self.M))

    def _state(self, device: torch.device, rows: int) -> Tensor | None:
        return torch.zeros(rows, self.H, *self.dims, device=device) if self.state else None


@dataclass(frozen=True, kw_only=True)
class Retention(Call):
    """B sequences of T tokens, or packed ones of ``lengths`` (B is 1); ``state``, ``reset`` as in `Pop`."""

    names: ClassVar = ("retention_fwd", "retention_bwd")

    T: int
    Dv: int | None = None
    state: bool = False
    reset: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def dims(self) -> tuple[int, int]:
        return self.D, self.Dv or self.D

    @property
    def flops(self) -> int:
        return self.H * sum(chunk_flops(length, *self.dims) for length in self.lengths or [self.T])

    def forward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        inputs = self._inputs(dtype, device, rows)
        given = [self._bounds(device), self._resets(device, rows)]
        return [*inputs, *given], launcher("retention_fwd")(*inputs, self.D**-0.5, *given)

    def backward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        inputs = self._inputs(dtype, device, rows)
        given = [
            self._bounds(device),
            tokens(device, dtype, rows, self.T, self.H, self.dims[1]),
            self._state(device, rows),
        ]
        resets = self._resets(device, rows)
        grads = launcher("retention_bwd")(*inputs, self.D**-0.5, *given, reset=resets)
        return [*inputs, *given, resets], [x for x in grads if x is not None]

    def _inputs(self, dtype: torch.dtype, device: torch.device, rows: int) -> list[Tensor | None]:
        qkv = [tokens(device, dtype, rows, self.T, self.H, width) for width in (self.D, *self.dims)]
        return [*qkv, log_decays(device, self.H), self._state(device, rows)]

    def _bounds(self, device: torch.device) -> Tensor | None:
        ends = list(itertools.accumulate(self.lengths, initial=0))
        return torch.tensor(ends, device=device) if self.lengths else None

    def _resets(self, device: torch.device, rows: int) -> Tensor | None:
        return torch.zeros(rows, self.T, dtype=torch.bool, device=device) if self.reset else None

    def _state(self, device: torch.device, rows: int) -> Tensor | None:
        sequences = len(self.lengths) or rows
        return torch.zeros(sequences, self.H, *self.dims, device=device) if self.state else None


@dataclass(frozen=True, kw_only=True)
class Step(Call):
    """One token of each of B sequences."""

    names: ClassVar = ("retention_step",)

    def forward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        inputs = [
            *(tokens(device, dtype, rows, self.H, self.D) for _ in range(3)),
            log_decays(device, self.H),
        ]
        inputs.append(torch.zeros(rows, self.H, self.D, self.D, device=device))
        return inputs, launcher("retention_step")(*inputs, self.D**-0.5)


@dataclass(frozen=True, kw_only=True)
class Pooled(Call):
    """T tokens of each of B sequences, whose states fill a pool."""

    names: ClassVar = ("pooled_retention",)

    T: int

    def forward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        inputs = [
            *(tokens(device, dtype, rows, self.T, self.H, self.D) for _ in range(3)),
            log_decays(device, self.H),
        ]
        states = torch.zeros(rows, self.H, self.D, self.D, device=device)
        inputs += [states, torch.arange(rows, device=device)]
        return inputs, [launcher("pooled_retention")(*inputs, None, self.D**-0.5), states]


@dataclass(frozen=True, kw_only=True)
class NormGate(Call):
    """Norm and gate: "rmsnorm" with weight and bias, "groupnorm" without."""

    names: ClassVar = ("norm_gate_fwd", "norm_gate_bwd")

    T: int
    kind: str

    def forward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        inputs = self._inputs(dtype, device, rows)
        return inputs, [launcher("norm_gate_fwd")(*inputs, self.kind, 1e-6)]

    def backward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        inputs = self._inputs(dtype, device, rows)
        inputs.append(tokens(device, dtype, rows, self.T, self.H, self.D))
        grads = launcher("norm_gate_bwd")(*inputs, self.kind, 1e-6)
        return inputs, [x for x in grads if x is not None]

    def _inputs(self, dtype: torch.dtype, device: torch.device, rows: int) -> list[Tensor | None]:
        x = tokens(device, dtype, rows, self.T, self.H, self.D)
        gate = tokens(device, dtype, rows, self.T, self.H * self.D)
        affine = [tokens(device, dtype, self.H, self.D) if self.kind == "rmsnorm" else None for _ in range(2)]
        return [x, gate, *affine]


@dataclass(frozen=True, kw_only=True)
class Rotary(Call):
    """Rotation of queries and keys; backward, the inverse rotation of their gradients."""

    names: ClassVar = ("rotary_fwd", "rotary_bwd")

    T: int
    kind: str

    def forward(self, dtype: torch.dtype, device: torch.device, rows: int, *, inverse: bool = False) -> Made:
        q, k = (tokens(device, dtype, rows, self.T, self.H, self.D) for _ in range(2))
        cos, sin = (tokens(device, FP32, 1, self.T, 1, self.D) for _ in range(2))
        turned = launcher(self.names[inverse])(q, k, cos, sin, self.kind, inverse=inverse)
        # The floor is half of each angle table: every cosine and sine stands there twice.
        return [q, k, cos[..., : self.D // 2], sin[..., : self.D // 2]], turned

    def backward(self, dtype: torch.dtype, device: torch.device, rows: int) -> Made:
        return self.forward(dtype, device, rows, inverse=True)

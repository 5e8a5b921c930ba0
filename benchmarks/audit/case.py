"""What an audited case is: one call of one launcher, for any device, with its floors.

A case is made for any device: "meta" tensors to see what would be compiled, "cpu" to run in the interpreter
with ``rows`` of the batch only (bytes and flops grow with the batch, their ratios do not).

Floors: `floor_bytes` is every input read once and every output written once; `yardstick_flops` are the
products of the tokens as they are, in chunks of 64 (PERFORMANCE: 9.4 GFLOP for POP at REM's training shape).
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
"""Of an A100, A40, H100, B200, RTX 5090 and MI300X."""

CHUNK = 64

BACKWARD_FLOPS = 2.5
"""Products of a backward pass, in those of the forward: scores twice, four more products of their size
instead of two, and five with a state instead of two."""


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


def floor_bytes(tensors: Sequence[Tensor | None]) -> int:
    """The bytes of tensors that are read or written once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def chunk_flops(tokens: int, key_dim: int, value_dim: int, *, takes_in: bool = True) -> int:
    """Products of a head's tokens: scores, values, reading the state and, if so, taking tokens into it."""
    flops = 0
    for first in range(0, tokens, CHUNK):
        n = min(CHUNK, tokens - first)
        last = first + n >= tokens
        flops += 2 * n * n * (key_dim + value_dim)
        flops += 2 * n * key_dim * value_dim * (2 if takes_in or not last else 1)
    return flops


@contextmanager
def on_architecture(architecture: str, op: str, *, fraction: float = 1.0) -> Iterator[None]:
    """Let a launcher see a GPU of ``architecture``, or a ``fraction`` of it (for a fraction of a batch)."""
    launcher(op)
    seen = {
        "architecture_of": lambda device: architecture,
        "multiprocessors_of": lambda device: max(1, math.ceil(fraction * MULTIPROCESSORS[architecture])),
    }
    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("retpop.kernels.")]:
            for name, value in seen.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


def launcher(op: str) -> Callable[..., Any]:
    """A launcher by its name; imported late, because the environment decides what Triton makes of it."""
    module, function = _PLACES.get(op, (op, op))
    return getattr(importlib.import_module(f"retpop.kernels.{module}"), function)


_PLACES = {
    "norm_gate_fwd": ("norm_gate", "norm_gate_fwd"),
    "rotary_fwd": ("rotary", "rotary_fwd"),
    "rotary_bwd": ("rotary", "rotary_fwd"),  # its inverse
}
"""Module and function of the launchers that are not named as their modules."""


def tokens(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros: no figure depends on what they are."""
    return torch.zeros(shape, dtype=dtype, device=device)


def log_decays(device: torch.device, heads: int) -> Tensor:
    """One a head."""
    return torch.full((heads,), -0.01, device=device)

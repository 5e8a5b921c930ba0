"""Checks of arguments for the whole package, and tests for active transforms and compilers."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor

from retpop._torch import FakeTensor, forward_ad_level, is_batched, transforms_are_active


def check_tensor(where: str, name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor; ``where`` begins the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be a torch.Tensor.")


def as_int(where: str, name: str, value: object) -> int:
    """``value`` as an int if it is an integer, NumPy's and traced sizes included; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, int | Integral | torch.SymInt):
        raise TypeError(f"{where}: {name} is {value!r} ({type(value).__name__}); it must be an int.")
    return cast(int, value) if isinstance(value, torch.SymInt) else int(value)


def as_float(where: str, name: str, value: object) -> float:
    """``value`` as a float if it is a real number, NumPy's scalars included; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {name} is {value!r}; it must be a number.")
    return float(value)


def check_num_heads(where: str, num_heads: object) -> int:
    """``num_heads`` as an int, at least 1; ``where`` begins the message."""
    heads = as_int(where, "num_heads", num_heads)
    if heads < 1:
        raise ValueError(f"{where}: num_heads is {heads}; it must be at least 1.")
    return heads


def check_chunk_size(where: str, chunk_size: object) -> int:
    """``chunk_size`` as an int, a power of two of at least 16; ``where`` begins the message."""
    size = as_int(where, "chunk_size", chunk_size)
    if size < 16 or size & (size - 1):
        raise ValueError(f"{where}: chunk_size is {size}; it must be a power of two, at least 16.")
    return size


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode AD is active, which forbids writes in place."""
    return transforms_are_active() or forward_ad_level() >= 0


def are_batched(grads: Iterable[Tensor | None]) -> bool:
    """Whether each gradient stands for a batch; never under a compiler, which has no such tensors."""
    return not torch.compiler.is_compiling() and any(is_batched(x) for x in grads if x is not None)


def is_exporting_length(length: int) -> bool:
    """Whether `torch.export` (not strict) traces ``length`` as a symbol for all allowed lengths."""
    return isinstance(length, torch.SymInt) and torch.compiler.is_exporting()


def values_are_free(x: Tensor) -> bool:
    """Whether reading ``x``'s values costs nothing: eager, on the CPU."""
    return x.is_cpu and is_eager(x)


def is_eager(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor outside of compilers and functorch transforms.

    Inside a transform torch 2.9 cannot read even the tensors that it does not transform.
    """
    return not (torch.compiler.is_compiling() or isinstance(x, FakeTensor) or transforms_are_active())


def free_values(x: Tensor) -> list[float] | None:
    """The values of ``x`` (N,), if reading them costs nothing."""
    return x.tolist() if values_are_free(x) else None

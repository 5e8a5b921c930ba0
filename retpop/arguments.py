"""Checks of arguments that every part of the package needs; each raises, and names what it checked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def check_tensor(where: str, name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor; ``where`` begins the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be a torch.Tensor.")


def values_are_free(x: Tensor) -> bool:
    """Whether reading ``x``'s values costs nothing: eager, on the CPU, not inside a functorch transform.

    Inside one torch 2.9 does not read tensors that the transform leaves alone either.
    """
    return x.is_cpu and not (
        torch.compiler.is_compiling() or isinstance(x, FakeTensor) or transforms_are_active()
    )


def free_values(x: Tensor) -> list[float] | None:
    """The values of ``x`` (N,), where reading them costs nothing."""
    return x.tolist() if values_are_free(x) else None


def transforms_are_active() -> bool:
    """Whether a transform of `torch.func` is at work on anything."""
    return torch._C._are_functorch_transforms_active()


def check_num_heads(where: str, num_heads: int) -> None:
    """Raise unless ``num_heads`` is an int of at least 1; ``where`` begins the message."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"{where}: num_heads is {num_heads!r}; it must be an int.")
    if num_heads < 1:
        raise ValueError(f"{where}: num_heads is {num_heads}; it must be at least 1.")


def check_chunk_size(where: str, chunk_size: object) -> None:
    """Raise unless ``chunk_size`` is a power of two of at least 16; ``where`` begins the message."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"{where}: chunk_size is {chunk_size!r}; it must be an int.")
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{where}: chunk_size is {chunk_size}; it must be a power of two, at least 16.")

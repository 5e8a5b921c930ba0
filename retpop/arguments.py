"""Checks and dtypes of arguments, and whether transforms or autocast are on, for all parts of the package.

Autocast casts the token inputs of an operation; inside, it is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from retpop._torch import FakeTensor, forward_ad_level, is_batched, transforms_are_active

Result = TypeVar("Result")

INPUT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DECAY_DTYPES = (torch.float32, torch.float64)


def check_tensor(where: str, name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor; ``where`` begins the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} is {type(value).__name__}; it must be a torch.Tensor.")


def check_mapping(where: str, name: str, value: object) -> None:
    """Raise unless ``value`` is a mapping; ``where`` begins the message."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}: {name} is {type(value).__name__}; it must map names to values.")


def as_int(where: str, name: str, value: object) -> int:
    """``value`` as an int if it is an integer, NumPy's and traced sizes included; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, int | Integral | torch.SymInt):
        raise TypeError(f"{where}: {name} is {value!r} ({type(value).__name__}); it must be an int.")
    return cast(int, value) if isinstance(value, torch.SymInt) else int(value)


def as_ints(where: str, name: str, values: object) -> list[int]:
    """``values`` as a list of ints if they are integers as `as_int` takes them."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{where}: {name} is {values!r}; it must hold ints.")
    return [as_int(where, f"a value in {name}", value) for value in values]


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


def is_open_length(length: int) -> bool:
    """Whether `torch.compile` or `torch.export` traces ``length`` as a symbol, for more than one length."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # sympy is slow to import

    return not has_static_value(length)


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


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_state(q: Tensor, v: Tensor, rows: int) -> Tensor:
    """The state before any token, (rows, H, Dk, Dv)."""
    return q.new_zeros(rows, *q.shape[2:], v.shape[-1], dtype=state_dtype(q.dtype))


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which outputs of tokens in ``dtype`` go to the norm that follows them.

    float16 goes in float32, because sums over many tokens exceed its range; the norm scales them back.
    """
    return torch.float32 if dtype == torch.float16 else dtype


class Inputs(NamedTuple):
    """The properties that decide which backend can run.

    Attributes:
        device, dtype: of the tokens, after autocast.
        key_dim, value_dim: of a head.
    """

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int


def outside_autocast(run: Callable[..., Result], *tokens: Tensor) -> Result:
    """``run`` of token inputs cast by autocast, with autocast off inside."""
    device = tokens[0].device
    if not autocast_is_on(device.type):
        return run(*tokens)
    tokens = cast_inputs(*tokens)
    with without_autocast(device):
        return run(*tokens)


def cast_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Token inputs in autocast's dtype if autocast is on for their device, else unchanged.

    float64 stays, as in torch's own autocast. States and decays are not cast: they keep the precision that
    retention needs.
    """
    first = inputs[0]  # all share a device, or the checks that follow refuse them
    if not isinstance(first, Tensor) or not autocast_is_on(first.device.type):
        return inputs
    return tuple(x.to(dtype_after(x.device, x.dtype)) if isinstance(x, Tensor) else x for x in inputs)


def dtype_after(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that `cast_inputs` gives to inputs of ``dtype`` on ``device``."""
    if not autocast_is_on(device.type) or not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device.type)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device; False for one without autocast, such as "meta"."""
    # The query whether the device has autocast is slowest, and torch 2.9 does not compile it.
    has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return has_autocast and torch.is_autocast_enabled(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products keep their inputs' dtype."""
    if autocast_is_on(device.type):
        return torch.autocast(device_type=device.type, enabled=False)
    return nullcontext()

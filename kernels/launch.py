"""A kernel launch as a value; the device's properties, and the preparation of tensors for launchers.

A launcher is two functions: `plan_<op>(tensors, ..., target=...)`, which allocates the outputs and returns
the launches and the outputs, and `<op>(tensors, ...)`, which runs the plan for the tensors' own device. A
plan runs nothing and reads no values, so it takes tensors on the "meta" device. `repeat.py` records what a
call launches, and repeats it without a plan. The audit calls the launchers themselves and records what they
launch (`benchmarks/kernel_audit`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

Tensors = Mapping[str, Tensor | None]

INTERPRETED = "sm_90"
"""The architecture whose configs are used for tensors on a CPU (the interpreter) and meta tensors."""


def architecture_of(device: torch.device) -> str:
    """The architecture of a device: sm_<major><minor>, or AMD's gfx name."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def multiprocessors_of(device: torch.device) -> int:
    """The number of SMs (AMD: compute units) of a device; an H200's where there is no GPU."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Target(NamedTuple):
    """The GPU for which a plan is made: `architecture_of` and `multiprocessors_of` of its device."""

    architecture: str
    multiprocessors: int


class _Recording(threading.local):
    """A call that is recorded on this thread: its launches, and the tensors' device; None without one."""

    launches: list[Launch] | None = None
    device: torch.device | None = None


_RECORDING = _Recording()


def target_of(device: torch.device) -> Target:
    """The target of tensors on a device; of stand-ins, that of the call that is recorded."""
    return _target_of(_RECORDING.device or device)


@cache
def _target_of(device: torch.device) -> Target:
    return Target(architecture_of(device), multiprocessors_of(device))


_FLOAT32_DEFAULTS = (None, "ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
"""Triton's own words. Of these only "tf32x3" changes these kernels; torch allows TF32 or does not."""


LARGEST_IN_THREE_PRODUCTS = 64
"""The largest head dim whose operands a program holds in two parts; with 128 there are too few registers."""


def dot_precision(dtype: torch.dtype, architecture: str, head_dims: tuple[int, int]) -> str:
    """`tl.dot`'s input_precision, which counts for float32 tokens on NVIDIA's GPUs.

    "tf32" where torch itself would use it. Else "tf32x3" where Triton's own setting asks for it, and head
    dims are at most 64: tensor cores multiply the upper parts of the operands, and each upper part by the
    other's rest, which leaves errors near those of float32. Else "ieee".

    Raises:
        ValueError: Triton's setting is none of its words.
    """
    if dtype is not torch.float32 or not architecture.startswith("sm_"):
        return "ieee"
    wanted = float32_default()
    if wanted not in _FLOAT32_DEFAULTS:
        raise ValueError(f"TRITON_F32_DEFAULT is {wanted!r}; it must be one of {_FLOAT32_DEFAULTS[1:]}.")
    # However it was set: torch.get_float32_matmul_precision() raises where this newer setting has changed it.
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if wanted == "tf32x3" and max(head_dims) <= LARGEST_IN_THREE_PRODUCTS else "ieee"


def float32_default() -> str | None:
    """Triton's setting of float32 products: TRITON_F32_DEFAULT in the environment, or what a program set."""
    word: str | None = triton.knobs.language.fp32_default
    return word


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs along up to three axes.
        arguments: exactly the kernel's parameters by name, constexprs included.
        num_warps, num_stages: as Triton names them.

    Raises:
        TypeError: a parameter is missing, or there is none of that name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        wrong = self.arguments.keys() ^ set(self.kernel.arg_names)
        if wrong:
            names = ", ".join(sorted(wrong))
            raise TypeError(f"{self.kernel.__name__}: missing or unknown arguments: {names}")

    def run(self) -> Any:
        """Launch on the current stream; returns the compiled kernel, or None in the interpreter."""
        # Fusion of multiplications and additions is given, because its default differs by version of Triton.
        return self.kernel[self.grid](
            **self.arguments,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            enable_fp_fusion=True,
        )


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run the launches in order on the current stream of the tensors' device."""
    with nullcontext() if is_current(device) else torch.cuda.device(device):
        for launch in launches:
            launch.run()


def is_current(device: torch.device) -> bool:
    """Whether launches go to a device; those for tensors on a CPU go nowhere else."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


@contextmanager
def recorded(device: torch.device) -> Iterator[list[Launch]]:
    """Let `launched` plan for tensors on a device, and put launches into a list instead of running them."""
    _RECORDING.launches, _RECORDING.device = [], device
    try:
        yield _RECORDING.launches
    finally:
        _RECORDING.launches = _RECORDING.device = None


def launched(plan: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run ``plan(*arguments, **options)``, whose first argument is a tensor, and return its outputs."""
    launches, outputs = plan(*arguments, **options)
    if _RECORDING.launches is None:
        run(launches, arguments[0].device)
    else:
        _RECORDING.launches += launches
    return outputs


def zero(*tensors: Tensor | None) -> None:
    """Fill those that are there with zeros."""
    for tensor in tensors:
        if tensor is not None:
            tensor.zero_()


def with_contiguous_rows(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous: kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def named_strides(name: str, x: Tensor | None, dims: str) -> dict[str, int]:
    """Strides as a kernel's arguments, stride_<name>_<dim> for each letter of `dims`; 0 without a tensor."""
    strides = [0] * len(dims) if x is None else x.stride()
    return {f"stride_{name}_{dim}": stride for dim, stride in zip(dims, strides, strict=False)}


def stride_unit(tensors: Iterable[Tensor]) -> int:
    """The unit of strides in elements, 1 to 8: a kernel that multiplies by it knows the alignment of strides.

    Triton only sees multiples of 16, for which this is 1. With head dims of 24 or 60 rows start at multiples
    of 8 or 4 elements; known to the compiler, that makes wide loads and async copies of what were single
    elements.
    """
    divisor = math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))
    return 1 if divisor == 16 else divisor


_LIKE = {
    **{"k": "q", "v": "k", "out": "q", "g": "q", "dk": "g", "dv": "dk", "pred": "out"},
    **{f"{name}_pred": name for name in ("q", "k", "v", "g", "dk", "dv")},
}
"""The tensor whose token stride a kernel uses for each other tensor with a stride of None."""


def token_strides(tokens: Tensors, *, shared: bool = True) -> dict[str, int | None]:
    """UNIT, and in it the strides of token tensors: (B, T, H, D), or (B, P, M, H, D) if named "pred".

    With ``shared`` a token stride is None where it equals that of its entry in `_LIKE`, or where there is no
    tensor: equal strides share registers.
    """
    unit = stride_unit(x for x in tokens.values() if x is not None)
    strides: dict[str, int | None] = {"UNIT": unit}
    for name, x in tokens.items():
        named = named_strides(name, x, "bpth" if "pred" in name else "bth")
        strides |= {argument: stride // unit for argument, stride in named.items()}
    if not shared:
        return strides
    own = {name: strides[f"stride_{name}_t"] for name in tokens}
    for name, other in _LIKE.items():
        if name in tokens and other in tokens:
            own[name] = own[other] if tokens[name] is None else own[name]
            strides[f"stride_{name}_t"] = None if own[name] == own[other] else own[name]
    return strides

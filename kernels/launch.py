"""A kernel launch as a value: the launchers run it, and the audit compiles and counts the very same one.

A launcher is two functions: `plan_<op>(tensors, ..., architecture=...)`, which allocates the outputs and
returns the launches and the outputs, and `<op>(tensors, ...)`, which plans for the tensors' own device and
runs. A plan runs nothing, so tensors on the "meta" device do, with any architecture:

    launches, outputs = plan_pop_fwd(..., architecture="sm_90")
    compiled = triton.compile(launches[0].source(), target=GPUTarget("cuda", 90, 32),
    options=launches[0].options)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.compiler import ASTSource

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}

_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs along up to three axes.
        arguments: every parameter of the kernel by name, constexprs included.
        num_warps, num_stages: as Triton names them.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What `triton.compile` and a launch take; fusion is explicit, its default differs by version."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def source(self) -> ASTSource:
        """What to compile ahead of time, specialised as a call would be; pointers count as aligned."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            specialized = not parameter.do_not_specialize
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            is_one = specialized and is_integer and value == 1 and not parameter.annotation_type
            if parameter.is_constexpr or value is None or is_one:
                signature[name] = "constexpr"
                constants[name] = value
                continue
            signature[name] = parameter.annotation_type or _type_of(name, value)
            if isinstance(value, Tensor) or (specialized and is_integer and value % 16 == 0):
                attributes[(index,)] = _ALIGNED
        return ASTSource(self.kernel, signature, constants, attributes)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch one after another on the current stream of the tensors' device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            _run(launches)
    else:
        _run(launches)


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)


def _type_of(name: str, value: object) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(
        f"argument {name}: a kernel takes tensors, ints, floats and None, not {type(value).__name__}"
    )


def with_contiguous_rows(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not contiguous: kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def named_strides(name: str, x: Tensor | None, dims: str) -> dict[str, int]:
    """Strides as a kernel's arguments, stride_<name>_<dim> for each letter of `dims`; 0 without a tensor."""
    strides = [0] * len(dims) if x is None else x.stride()
    return {f"stride_{name}_{dim}": stride for dim, stride in zip(dims, strides, strict=False)}


def stride_unit(tensors: Iterable[Tensor]) -> int:
    """Elements to count strides in, 1 to 8: a kernel that multiplies by it knows how far strides are aligned.

    Triton only sees multiples of 16, for which this is 1. With head dims of 24 or 60 rows start at multiples
    of 8 or 4 elements; known to the compiler, that makes wide loads and async copies of what were single
    elements.
    """
    divisor = math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))
    return 1 if divisor == 16 else divisor

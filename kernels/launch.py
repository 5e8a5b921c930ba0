"""A kernel launch as a value; the device's properties, and the preparation of tensors for launchers.

A launcher is two functions: `plan_<op>(tensors, ..., target=...)`, which allocates the outputs and returns
the launches and the outputs, and `<op>(tensors, ...)`, which runs the plan for the tensors' own device. A
plan runs nothing and reads no values, so it takes tensors on the "meta" device. Tensors of the same dtypes,
shapes and strides have the same plan, which `launched` makes once. The audit calls the launchers themselves
and records what they launch (`benchmarks/kernel_audit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.compiler import CompiledKernel

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


@cache
def target_of(device: torch.device) -> Target:
    """The target of tensors on a device, which is asked once."""
    return Target(architecture_of(device), multiprocessors_of(device))


def dot_precision(dtype: torch.dtype, architecture: str) -> str:
    """`tl.dot`'s input_precision: "tf32" where torch itself would use it for float32, else "ieee"."""
    allowed = torch.get_float32_matmul_precision() != "highest" and architecture.startswith("sm_")
    return "tf32" if dtype is torch.float32 and allowed else "ieee"


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
    with _on(device):
        for launch in launches:
            launch.run()


def _on(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# ---- plans, made once ----

PLANS = 1024
"""Plans that are kept, the last used. Each is a few kilobytes of numbers, and holds no memory of tensors."""


ALIGNED = 16
"""Bytes: Triton compiles a kernel of its own for tensors that start elsewhere."""


def launched(plan: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run ``plan(*arguments, **options)`` and return its outputs.

    Args:
        plan: a `plan_<op>`.
        arguments, options: the plan's: tensors (the first argument is one), tuples, and hashable values. They
            include the target if the plan depends on it.
    """
    tensors: list[Tensor] = []
    forms = _forms((*arguments, *options.values()), tensors)
    device = arguments[0].device
    recipe = _recipe(plan, forms, tuple(options), device, torch.get_float32_matmul_precision())
    if recipe is not None:
        return recipe.run(tensors, device)
    launches, outputs = plan(*arguments, **options)
    run(launches, device)
    return outputs


def _forms(arguments: Iterable[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """The arguments, with dtype, shape and strides in place of tensors, which are put into ``tensors``."""
    forms = []
    for x in arguments:
        if isinstance(x, Tensor):
            tensors.append(x)
            forms.append((x.dtype, x.shape, x.stride()))
        else:
            forms.append(_forms(x, tensors) if type(x) is tuple else x)
    return tuple(forms)


_Source = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class _Recipe:
    """A plan whose tensors are numbered: first those that it is given, then new ones.

    Attributes:
        new: shape and dtype of each new tensor; and for a copy its source and the strides of it, else None.
        launches: in order.
        outputs: the plan's, of a kind: a tuple, a list, or a single tensor.
    """

    new: Sequence[tuple[Sequence[int], torch.dtype, _Source | None]]
    launches: Sequence[_Repeated]
    outputs: Sequence[int | None]
    kind: type

    def run(self, given: Sequence[Tensor], device: torch.device) -> Any:
        """Allocate, launch, and return the outputs."""
        tensors = list(given)
        for shape, dtype, source in self.new:
            if source is None:
                tensors.append(torch.empty(shape, dtype=dtype, device=device))
            else:
                number, stride = source
                tensors.append(tensors[number].as_strided(shape, stride).contiguous())
        addresses = 0
        for x in given:
            addresses |= x.data_ptr()
        with _on(device):
            for launch in self.launches:
                launch.run(tensors, aligned=addresses % ALIGNED == 0)
        found = [None if number is None else tensors[number] for number in self.outputs]
        return found[0] if self.kind is Tensor else self.kind(found)


class _Repeated:
    """A launch with numbers for its tensors, by name. It holds the kernel that its first run compiled.

    Finding that kernel again takes Triton several times as long as to launch it. Triton compiles a kernel for
    integers, dtypes, and whether tensors start at multiples of 16 bytes. A recipe fixes all but the last, so
    where all tensors do, the kernel is that of the first such run, launched as Triton's tutorial on fused
    softmax launches one. On AMD's GPUs it also depends on the memory behind the tensors: there, and in the
    interpreter, Triton is asked each time.
    """

    def __init__(self, launch: Launch, numbers: Mapping[str, int]) -> None:
        self._launch = launch
        names = launch.kernel.arg_names
        self._values = [launch.arguments[name] for name in names]
        self._places = [(names.index(name), number) for name, number in numbers.items()]
        self._compiled: Callable[..., object] | None = None

    def run(self, tensors: Sequence[Tensor], *, aligned: bool) -> None:
        """Launch on the current stream."""
        values = self._values.copy()
        for place, number in self._places:
            values[place] = tensors[number]
        if aligned and self._compiled is not None:
            self._compiled(*values)
            return
        arguments = dict(zip(self._launch.kernel.arg_names, values, strict=True))
        kernel = replace(self._launch, arguments=arguments).run()
        if aligned and isinstance(kernel, CompiledKernel) and torch.version.hip is None:
            self._compiled = kernel[(*self._launch.grid, 1, 1)[:3]]


@lru_cache(maxsize=PLANS)
def _recipe(
    plan: Callable[..., Any],
    forms: tuple[Any, ...],
    options: tuple[str, ...],
    device: torch.device,  # a compiled kernel is loaded on one
    float32_matmul_precision: str,  # `dot_precision` reads it
) -> _Recipe | None:
    """The recipe of a plan for tensors of such forms; None if it also computes something, such as zeros."""
    watch = _Watch()
    arguments = watch.stand_in(forms)
    first = len(arguments) - len(options)
    with watch:
        launches, outputs = plan(*arguments[:first], **dict(zip(options, arguments[first:], strict=True)))
    kind = Tensor if isinstance(outputs, Tensor) else type(outputs)
    numbered = [watch.output(x) for x in ([outputs] if kind is Tensor else outputs)]
    repeated = []
    for launch in launches:
        tensors = {name: x for name, x in launch.arguments.items() if isinstance(x, Tensor)}
        without = replace(launch, arguments={**launch.arguments, **dict.fromkeys(tensors)})
        repeated.append(_Repeated(without, {name: watch.number_of(x) for name, x in tensors.items()}))
    new = [(x.shape, x.dtype, watch.sources.get(place)) for place, x in enumerate(watch.new)]
    return _Recipe(new, repeated, numbered, kind) if watch.plain else None


class _Watch(TorchFunctionMode):
    """Numbers the tensors of a plan by their memory.

    Attributes:
        given: stand-ins for the plan's input tensors.
        new: the tensors that it makes, empty or as contiguous copies. They are numbered after those.
        sources: of the copies.
        plain: False once the plan has filled a tensor, or used one that is none of these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self.new: list[Tensor] = []
        self.sources: dict[int, _Source] = {}
        self.plain = True
        self._numbers: dict[torch.UntypedStorage, int] = {}

    def stand_in(self, x: Any) -> Any:
        """A given tensor of a form, without memory; anything else as it is."""
        if type(x) is not tuple:
            return x
        if not (x and isinstance(x[0], torch.dtype)):
            return tuple(map(self.stand_in, x))
        dtype, shape, stride = x
        made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        self._numbers[made.untyped_storage()] = len(self.given)
        self.given.append(made)
        return made

    def number_of(self, x: Tensor) -> int:
        """The number of the tensor that starts where ``x`` does: a launch is told strides as numbers."""
        number = self._numbers.get(x.untyped_storage())
        if number is None or x.storage_offset() != 0 or x.dtype != self._tensor(number).dtype:
            self.plain = False
            return 0
        return number

    def output(self, x: Tensor | None) -> int | None:
        """The number of an output. A new tensor is made in its shape."""
        if x is None:
            return None
        number = self.number_of(x)
        before = self._tensor(number)
        if number >= len(self.given) and x.is_contiguous() and x.numel() == before.numel():
            self.new[number - len(self.given)] = x
        else:
            self.plain &= x is before
        return number

    def _tensor(self, number: int) -> Tensor:
        return (self.given + self.new)[number]

    def _add(self, x: Tensor) -> None:
        self._numbers[x.untyped_storage()] = len(self.given) + len(self.new)
        self.new.append(x)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.__name__
        if name in ("empty", "empty_like"):
            self._add(result)
        elif name == "contiguous" and result is not args[0]:
            self.sources[len(self.new)] = (self.number_of(args[0]), args[0].stride())
            self._add(result)
        elif name.endswith("_") and not name.endswith("__"):  # in place
            self.plain = False
        return result


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

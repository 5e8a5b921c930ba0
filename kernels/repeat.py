"""Calls of launchers, planned once for tensors of the same dtypes, shapes and strides, and then repeated.

A call of some forms is recorded: it runs on stand-ins without memory, and what it allocates and launches
becomes a recipe. Calls of these forms then allocate and launch compiled kernels. Nothing between is run
again: no plan, and none of Triton's own search for the kernel, which takes several times as long as a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from triton.compiler import CompiledKernel

from .launch import Launch, is_current, recorded

ALIGNED = 16
"""Bytes: Triton compiles a kernel of its own for tensors that start elsewhere."""

_TENSORS = {Tensor, nn.Parameter}
_NUMBERS = {type(None), int, float, bool, str, torch.dtype}


def forms_of(arguments: Sequence[Any], tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """The arguments, with a form for each tensor, which is put into `tensors`.

    A tensor's form is its dtype, shape, strides, device, and whether it requires a gradient. None if one of
    the arguments is neither an ordinary tensor nor a plain number, or a list or tuple of those. A view whose
    memory holds the negated numbers (`Tensor.is_neg`) is no ordinary tensor.
    """
    forms: list[Any] = []
    for x in arguments:
        kind = type(x)
        form = x
        if kind in _TENSORS:
            if x.is_neg():
                return None
            tensors.append(x)
            form = (x.dtype, x.shape, x.stride(), x.device, x.requires_grad)
        elif kind is list or kind is tuple:
            form = forms_of(x, tensors)
            if form is None:
                return None
        elif kind not in _NUMBERS:
            return None
        forms.append(form)
    return tuple(forms)


def filled(forms: Sequence[Any], tensors: Any) -> list[Any]:
    """The arguments of some forms with the next tensors of an iterator; the inverse of `forms_of`."""
    return [
        x if type(x) is not tuple else next(tensors) if _is_tensor(x) else filled(x, tensors) for x in forms
    ]


def tensor_forms(forms: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The forms of tensors among those of arguments, in order."""
    for x in forms:
        if type(x) is tuple:
            yield from [x] if _is_tensor(x) else tensor_forms(x)


def _is_tensor(form: tuple[Any, ...]) -> bool:
    return bool(form) and isinstance(form[0], torch.dtype)


def recorded_call(function: Callable[..., Any], forms: tuple[Any, ...]) -> Callable[[Sequence[Tensor]], Any]:
    """A function that allocates and calls launchers, as a function of its tensors only.

    Args:
        function: takes tensors, plain numbers, and lists of them.
        forms: of its arguments, as `forms_of` gives them.
    """
    recorder, device = _Recorder(forms), next(tensor_forms(forms))[3]
    try:
        with recorded(device) as launches, recorder:
            results = function(*recorder.arguments)
        return recorder.recipe(launches, results, device).run
    except _ComputedError:
        return lambda tensors: function(*filled(forms, iter(tensors)))


class _Place(NamedTuple):
    """A tensor by the number of that in whose memory it lies, and the place there.

    Attributes:
        number: of a given tensor, or of a new one, which are numbered after those.
        shape, stride: the tensor's own.
        offset: in elements.
        first: in bytes.
    """

    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    first: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor at this place."""
        x = tensors[self.number]
        if self.offset == 0 and x.shape == self.shape and x.stride() == self.stride:
            return x
        return x.as_strided(self.shape, self.stride, x.storage_offset() + self.offset)


class _New(NamedTuple):
    """A new tensor, contiguous: of undefined values, or with `source` a copy."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    source: _Place | None


class _Recipe(NamedTuple):
    """What a call does.

    Attributes:
        new: tensors to make.
        launches: in order.
        outputs: the numbers of the results, of a kind: a tuple, a list, or a single tensor.
        device: of all tensors.
    """

    new: Sequence[_New]
    launches: Sequence[_Repeated]
    outputs: Sequence[int | None]
    kind: type
    device: torch.device

    def run(self, given: Sequence[Tensor]) -> Any:
        """Allocate, launch, and return the outputs."""
        created, launches, outputs, kind, device = self
        if not is_current(device):
            with torch.cuda.device(device):
                return self.run(given)
        tensors = [*given]
        for shape, stride, dtype, source in created:
            if source is None:
                tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
            else:
                tensors.append(source.of(tensors).contiguous())
        addresses = [x.data_ptr() for x in tensors]
        aligned = not reduce(or_, addresses) % ALIGNED
        for launch in launches:
            launch.run(tensors, addresses, aligned)
        found = [None if number is None else tensors[number] for number in outputs]
        return found[0] if kind is Tensor else kind(found)


class _Repeated:
    """A launch with places for its tensors, by name. It holds the kernel that its first run compiled.

    Triton compiles a kernel for integers, dtypes, and whether tensors start at multiples of 16 bytes. A
    recipe fixes all but the last, so where all tensors do, the kernel is that of the first such run, launched
    as Triton's tutorial on fused softmax launches one, with addresses in place of tensors. On AMD's GPUs it
    also depends on the memory behind the tensors: there, and in the interpreter, Triton is asked each time.
    """

    def __init__(self, launch: Launch, places: dict[str, _Place]) -> None:
        self._launch, self._places = launch, places
        names = launch.kernel.arg_names
        self._values = [launch.arguments[name] for name in names]
        self._pointers = [(names.index(name), place.number, place.first) for name, place in places.items()]
        self._compiled: Callable[..., object] | None = None

    def run(self, tensors: Sequence[Tensor], addresses: Sequence[int], aligned: bool) -> None:
        """Launch on the current stream."""
        if aligned and self._compiled is not None:
            values = self._values.copy()
            for place, number, first in self._pointers:
                values[place] = addresses[number] + first
            self._compiled(*values)
            return
        given = {name: place.of(tensors) for name, place in self._places.items()}
        kernel = replace(self._launch, arguments={**self._launch.arguments, **given}).run()
        if aligned and isinstance(kernel, CompiledKernel) and torch.version.hip is None:
            self._compiled = kernel[(*self._launch.grid, 1, 1)[:3]]


class _ComputedError(Exception):
    """A recorded call does more than to allocate, copy and launch."""


class _Recorder(TorchFunctionMode):
    """Runs a function on stand-ins, and numbers the tensors of its launches by their memory.

    Attributes:
        arguments: the function's, with stand-ins for tensors.
    """

    def __init__(self, forms: Sequence[Any]) -> None:
        super().__init__()
        self._tensors: list[Tensor] = []
        self._numbers: dict[torch.UntypedStorage, int] = {}
        self._new: list[_New] = []
        self.arguments = self._stand_ins(forms)
        self._given = len(self._tensors)

    def _stand_ins(self, forms: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        for x in forms:
            if type(x) is tuple and _is_tensor(x):
                dtype, shape, stride, *_ = x
                found.append(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))
                self._add(found[-1])
            else:
                found.append(self._stand_ins(x) if type(x) is tuple else x)
        return found

    def recipe(self, launches: Sequence[Launch], results: Any, device: torch.device) -> _Recipe:
        """The recipe of a call that made these launches and results; what it made for neither is left out."""
        kind = Tensor if isinstance(results, Tensor) else type(results)
        outputs = [self._output(x) for x in ([results] if kind is Tensor else results)]
        places = [
            {name: self._place(x) for name, x in launch.arguments.items() if isinstance(x, Tensor)}
            for launch in launches
        ]
        used = {place.number for named in places for place in named.values()} | {*outputs}
        used |= {new.source.number for new in self._new if new.source is not None}
        kept = [n for n in range(len(self._tensors)) if n < self._given or n in used]
        numbers = {None: None} | {n: i for i, n in enumerate(kept)}

        def moved(place: _Place) -> _Place:
            return place._replace(number=numbers[place.number])

        new = [self._new[n - self._given] for n in kept[self._given :]]
        new = [x._replace(source=None if x.source is None else moved(x.source)) for x in new]
        repeated = []
        for launch, named in zip(launches, places, strict=True):
            without = replace(launch, arguments={**launch.arguments, **dict.fromkeys(named)})
            repeated.append(_Repeated(without, {name: moved(place) for name, place in named.items()}))
        return _Recipe(new, repeated, [numbers[n] for n in outputs], kind, device)

    def _add(self, x: Tensor) -> None:
        self._numbers[x.untyped_storage()] = len(self._tensors)
        self._tensors.append(x)

    def _place(self, x: Tensor) -> _Place:
        number = self._numbers.get(x.untyped_storage())
        if number is None or x.dtype != self._tensors[number].dtype:
            raise _ComputedError
        offset = x.storage_offset()
        return _Place(number, tuple(x.shape), x.stride(), offset, offset * x.itemsize)

    def _output(self, x: Tensor | None) -> int | None:
        """The number of an output; a new tensor is made in its shape."""
        if x is None:
            return None
        number, shape, stride, offset, _ = self._place(x)
        before = self._tensors[number]
        if number >= self._given and offset == 0 and x.is_contiguous() and x.numel() == before.numel():
            made = self._new[number - self._given]
            self._new[number - self._given] = made._replace(shape=shape, stride=stride)
        elif x is not before:
            raise _ComputedError
        return number

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = function(*args, **(kwargs or {}))
        except RuntimeError as error:  # a stand-in has no values to read
            raise _ComputedError from error
        name = function.__name__
        if name.endswith("_") and not name.endswith("__"):  # in place
            raise _ComputedError
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if not isinstance(x, Tensor) or x.untyped_storage() in self._numbers:
                continue
            if name not in ("empty", "empty_like", "contiguous"):
                raise _ComputedError
            source = self._place(args[0]) if name == "contiguous" else None
            self._add(x)
            self._new.append(_New(tuple(x.shape), x.stride(), x.dtype, source))
        return result

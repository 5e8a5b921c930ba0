"""The bytes and products of kernels, counted in Triton's interpreter, and accesses that no kernel may make.

Bytes are the unmasked lanes of loads and stores (a re-read counts), flops are 2·M·N·K a dot, both as the
kernel asks for them: caches and the padding of tensor cores are not modelled. Needs TRITON_INTERPRET=1, set
before Triton decorates the kernels.

    with audit() as counts:
        out, state = retention_fwd(q, k, v, ...)
    assert counts.bytes <= 1.05 * floor

Works with Triton 3.6 to 3.9: plain, masked and descriptor accesses all pass through `create_masked_load` and
`create_masked_store` of the interpreter's builder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_SHARED = -1
"""Stands for more than one program, in place of a program's number."""


class AuditError(AssertionError):
    """A kernel made an access that no kernel may make."""


@dataclass
class Traffic:
    """What one kernel, or all of them, moved (bytes) and multiplied (flops)."""

    launches: int = 0
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Loads and stores together."""
        return self.loaded + self.stored


@dataclass
class Counts(Traffic):
    """The sums over all launches, and by kernel."""

    by_kernel: dict[str, Traffic] = field(default_factory=dict)


@contextmanager
def audit(*, outputs: Sequence[Tensor] = (), races: bool = True) -> Iterator[Counts]:
    """Count what the kernels launched inside move, and stop at the first faulty access.

    Faults, within each launch: an element stored twice; a masked load without `other`; an access outside the
    tensors that the launch was given (outside of their views: the gaps of a strided view count as outside); a
    load of memory that nothing has written (what `torch.empty` and its relatives made inside, and
    ``outputs``); a load or store of an element that another program of the same launch stores or loads; any
    atomic.

    Args:
        outputs: tensors made outside whose memory counts as not yet written.
        races: whether double stores and races are faults; False for wrong inputs, for which kernels only
            promise to stay inside the tensors.

    Raises:
        AuditError: at the first fault; its message names the kernel and the fault.
    """
    recorder = _Recorder(outputs, races)
    with ExitStack() as stack:
        for owner, name, wrap in recorder.patches():
            stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        try:
            yield recorder.counts
        except interpreter.InterpreterError as error:
            if recorder.fault is None:
                raise
            raise AuditError(recorder.fault) from error


def footprint(tensor: Tensor) -> np.ndarray:
    """The byte offsets in its storage of a tensor's elements, each once."""
    offsets = np.array([tensor.storage_offset()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = np.arange(size if stride else min(size, 1)) * stride
        offsets = (offsets[:, None] + steps).reshape(-1)
    return offsets * tensor.element_size()


class _Memory:
    """The bytes of every storage that a launch was given, one after another in flat arrays."""

    def __init__(self) -> None:
        self.storages: dict[
            int, torch.UntypedStorage
        ] = {}  # by address; held, so that none is freed and reused
        self.bases = np.zeros(0, np.int64)
        self.sizes = np.zeros(0, np.int64)
        self.starts = np.zeros(0, np.int64)
        self.written = np.zeros(0, bool)
        self.allowed = np.zeros(0, bool)
        self.reader = np.zeros(0, np.int32)
        self.writer = np.zeros(0, np.int32)

    def begin_launch(self, tensors: Sequence[Tensor], fresh: Callable[[torch.UntypedStorage], bool]) -> None:
        """Take in the tensors' storages; their elements, and nothing else, may be accessed by this launch."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.storages:
                self.storages[storage.data_ptr()] = storage
                self.written = np.append(self.written, np.full(storage.nbytes(), not fresh(storage)))
        self.bases = np.array(sorted(self.storages), np.int64)
        nbytes = {base: storage.nbytes() for base, storage in self.storages.items()}
        starts = dict(zip(nbytes, np.cumsum([0, *nbytes.values()]).tolist(), strict=False))
        self.sizes = np.array([nbytes[base] for base in self.bases.tolist()], np.int64)
        self.starts = np.array([starts[base] for base in self.bases.tolist()], np.int64)
        self.allowed = np.zeros(len(self.written), bool)
        self.reader, self.writer = (np.zeros(len(self.written), np.int32) for _ in range(2))
        for tensor in tensors:
            if tensor.numel():
                self.allowed[starts[tensor.untyped_storage().data_ptr()] + footprint(tensor)] = True

    def places(self, addresses: np.ndarray) -> np.ndarray | None:
        """Where the elements at these addresses lie in the flat arrays; None if one may not be accessed."""
        if not len(self.bases):
            return None
        storage = np.searchsorted(self.bases, addresses, side="right") - 1
        offsets = addresses - self.bases[storage]
        if (storage < 0).any() or (offsets >= self.sizes[storage]).any():
            return None
        places = self.starts[storage] + offsets
        return places if self.allowed[places].all() else None


def _without_overflows(options: Any) -> Any:
    """Without a second computation of each sum of integers; `triton_ir` looks for those that overflow."""
    return replace(options, sanitize_overflow=False)


class _Recorder:
    def __init__(self, outputs: Sequence[Tensor], races: bool) -> None:
        self.races = races
        self.counts = Counts()
        self.kernel = Traffic()
        self.memory = _Memory()
        self.fault: str | None = None
        self.name = ""
        self.fresh = [tensor.untyped_storage() for tensor in outputs]

    def patches(self) -> list[tuple[Any, str, Callable[[Any], Any]]]:
        builder = interpreter.InterpreterBuilder
        allocations = [
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
        ]
        return [
            (interpreter.GridExecutor, "__call__", self.launching),
            (TritonSemantic, "load", self.checking_other),
            (builder, "create_masked_load", self.loading),
            (builder, "create_masked_store", self.storing),
            (builder, "create_dot", self.multiplying),
            (builder, "create_atomic_rmw", self.refusing_atomics),
            (builder, "create_atomic_cas", self.refusing_atomics),
            (interpreter.interpreter_builder, "options", _without_overflows),
            *((owner, name, self.allocating) for owner, name in allocations),
        ]

    def launching(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            fresh = {storage.data_ptr() for storage in self.fresh}
            self.memory.begin_launch(tensors, lambda storage: storage.data_ptr() in fresh)
            self.name = executor.fn.__name__
            self.kernel = self.counts.by_kernel.setdefault(self.name, Traffic())
            call(executor, *args, **kwargs)
            for traffic in (self.counts, self.kernel):
                traffic.launches += 1
                traffic.programs += math.prod(interpreter.interpreter_builder.grid_dim)

        return launch

    def allocating(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            self.fresh.append(tensor.untyped_storage())
            return tensor

        return allocate

    def checking_other(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `tl.load` itself, because the builder gets None for an `other` of 0 too."""

        @functools.wraps(load)
        def checked_load(
            semantic: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if mask is not None and other is None:
                self.fail("a masked load without `other`: masked lanes hold anything")
            return load(semantic, pointers, mask, other, *args, **kwargs)

        return checked_load

    def loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def masked_load(builder: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
            places = self.access("load", pointers, mask)
            if not self.memory.written[places].all():
                self.fail("loads memory that nothing has written")
            program = self.program(builder)
            writer = self.memory.writer[places]
            if self.races and ((writer != 0) & (writer != program)).any():
                self.fail("loads what another program of the same launch stores")
            reader = self.memory.reader[places]
            self.memory.reader[places] = np.where((reader == 0) | (reader == program), program, _SHARED)
            loaded = places.size * _item_size(pointers)
            self.counts.loaded += loaded
            self.kernel.loaded += loaded
            return load(builder, pointers, mask, other, *args, **kwargs)

        return masked_load

    def storing(self, store: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(store)
        def masked_store(
            builder: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            places = self.access("store", pointers, mask)
            if self.races and (self.memory.writer[places].any() or np.unique(places).size != places.size):
                self.fail("stores an element twice")
            program = self.program(builder)
            reader = self.memory.reader[places]
            if self.races and ((reader != 0) & (reader != program)).any():
                self.fail("stores what another program of the same launch loads")
            self.memory.writer[places] = program
            self.memory.written[places] = True
            stored = places.size * _item_size(pointers)
            self.counts.stored += stored
            self.kernel.stored += stored
            return store(builder, pointers, value, mask, *args, **kwargs)

        return masked_store

    def multiplying(self, dot: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(dot)
        def count_dot(builder: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
            flops = 2 * a.data.size * b.data.shape[-1]
            self.counts.flops += flops
            self.kernel.flops += flops
            return dot(builder, a, b, *args, **kwargs)

        return count_dot

    def refusing_atomics(self, atomic: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(atomic)
        def refuse(*args: Any, **kwargs: Any) -> Any:
            self.fail("an atomic: results would depend on the order of programs")

        return refuse

    def access(self, what: str, pointers: Any, mask: Any) -> np.ndarray:
        """The places of the unmasked lanes; an element's place is that of its first byte."""
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[lanes].astype(np.int64)
        if not addresses.size:
            return np.zeros(0, np.int64)
        places = self.memory.places(addresses)
        if places is None:
            self.fail(f"a {what} outside the tensors that the launch was given")
        return places

    def program(self, builder: Any) -> int:
        """The number of the running program, from 1."""
        x, y, z = builder.grid_idx
        _, size_y, size_z = builder.grid_dim
        return int((x * size_y + y) * size_z + z + 1)

    def fail(self, fault: str) -> None:
        self.fault = f"{self.name}: {fault}"
        raise AuditError(self.fault)


def _item_size(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)  # a bool is a byte

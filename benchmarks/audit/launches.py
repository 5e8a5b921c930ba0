"""What a launcher would compile on a GPU, found by calling it without one.

A stand-in for Triton's driver names an architecture, Triton's own binder specialises the arguments (types,
ones, divisibility by 16), and in place of the compiler a recorder notes what came. So a `Compilation` holds
exactly what a launch on that architecture compiles, however the launcher goes about it, and its key is the
one that Triton looks kernels up by. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

SHARED_MEMORY_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""What one program may take at most."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One launch, as `triton.compile(ASTSource(...), target, options)` takes it.

    Attributes:
        kernel: the `triton.jit` function.
        key: what Triton looks the compiled kernel up by: equal keys compile once.
        signature, constants, attributes: the kernel's specialisation.
        options: Triton's, all of them, defaults included.
        arguments: the integers among the arguments, by name.
        grid: programs along three axes.
    """

    kernel: Any
    key: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    arguments: dict[str, int]
    grid: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)


@contextmanager
def recorded(architecture: str) -> Iterator[list[Compilation]]:
    """Record the launches made inside, in order, as on a GPU of ``architecture``; nothing is compiled or run.

    The launchers see a driver of that architecture, and tensors on any device (meta tensors will do).
    """
    compilations: list[Compilation] = []

    def record(
        kernel: Any,
        key: str,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> _NotCompiled:
        def launch(grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
            integers = {
                name: value
                for name, value in zip(kernel.arg_names, arguments, strict=True)
                if isinstance(value, int) and not isinstance(value, bool)
            }
            compilations.append(
                Compilation(
                    kernel=kernel,
                    key=f"{kernel.__name__}: {key}",
                    signature=signature,
                    constants=constants,
                    attributes=attributes,
                    options=dict(options.__dict__),
                    arguments=integers,
                    grid=grid,
                )
            )

        return _NotCompiled(launch)

    before = driver._active
    driver.set_active(_Driver(TARGETS[architecture]))
    try:
        with mock.patch.object(JITFunction, "_do_compile", record):
            yield compilations
    finally:
        driver.set_active(before)


class _NotCompiled:
    """In place of a compiled kernel: calls ``launch`` with the grid and the arguments it would run on."""

    function = packed_metadata = None

    def __init__(self, launch: Callable[[tuple[int, int, int], Sequence[Any]], None]) -> None:
        self._launch = launch

    def launch_metadata(self, *args: object) -> None:
        return None

    def run(self, *args: Any) -> None:
        # Grid, stream, function, two kinds of metadata, two hooks; then the kernel's arguments.
        self._launch(args[:3], args[9:])


class _Driver:
    """As much of a driver as a launch asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # A kernel keeps what it knows of a target under the device's name, so each target has a name of its
        # own.
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

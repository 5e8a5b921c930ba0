"""The kernels that launchers would compile on a GPU, compiled ahead of time without one, and their figures.

`recorded` stands in for Triton's driver and names an architecture. Triton's own binder specialises the
arguments (types, ones, divisibility by 16), and a recorder takes the place of the compiler. So a
`Compilation` holds exactly what a launch on that architecture compiles, for any launcher, and its key is the
one by which Triton finds kernels. Needs a process without TRITON_INTERPRET.

`compile_for` compiles it. Registers, stack and SASS come from NVIDIA's cuobjdump, which Triton's wheel
carries; AMD's figures stand in the assembly text. Judge spills by the stack, not by the registers. The
figures hold for one version of Triton.

`hazards` looks in the TTGIR of sm_90 for constructs that public reports tie to wrong results. On Hopper a
matrix product runs on its own while its warps go on, and may read its first operand from registers. The
reports are about two things that a kernel's source does not show:

- a product with a first operand in registers that is still in flight when those are used again, by Triton's
  pipeliner (https://github.com/triton-lang/triton/issues/9433) or by ptxas
  (https://github.com/triton-lang/triton/pull/11781);
- a first operand that is another product's result, transposed, with Triton 3.4 to 3.7.0
  (https://github.com/fla-org/flash-linear-attention/pull/983).

A kernel that waits for such products at once, and transposes no result into a first operand, has neither.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.kernel_audit.machine_code import Instruction, count, main_loop, read_amdgcn, read_sass
from retpop.kernels.gpus import SHARED_MEMORY

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One launch, as `triton.compile(source, target, options)` takes it.

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

    @property
    def source(self) -> ASTSource:
        """What `triton.compile` takes first."""
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)


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
    """The part of a driver that a launch uses."""

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


_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TENSOR_CORES = r"HGMMA|HMMA|UTC\w*MMA|QMMA|OMMA|IMMA|DMMA|v_mfma"
ASYNC_COPIES = r"LDGSTS|UTMALDG|UBLKCP|(global|buffer)_load_lds|buffer_load_\w+ .*\blds$"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a compiled kernel.

    Attributes:
        registers, stack: a thread's 32-bit registers (AMD: VGPRs) and bytes of stack (AMD: scratch).
        shared: bytes of shared memory a program takes; ``shared_limit`` is the architecture's.
        hgmma, hmma: warp-group and warp matrix products (AMD: mfma counts as hmma; sm_100's tcgen05 as
        hgmma). async_copies: copies from global to shared memory that threads do not wait for (LDGSTS,
        UTMALDG). instructions: in all. seconds: of processor time that compiling took, ptxas included.
        loop_*: the same within one iteration of the longest loop; 0 without a loop.
        hazards: see `hazards`; of sm_90 only.
    """

    registers: int
    stack: int
    shared: int
    shared_limit: int
    hgmma: int
    hmma: int
    async_copies: int
    instructions: int
    seconds: float
    loop_mma: int
    loop_async_copies: int
    loop_instructions: int
    hazards: list[str]


def compile_for(architecture: str, compilation: Compilation) -> Figures:
    """Compile one recorded launch and read the result."""
    before = _processor_seconds()
    compiled = triton.compile(compilation.source, target=TARGETS[architecture], options=compilation.options)
    seconds = _processor_seconds() - before
    if TARGETS[architecture].backend == "cuda":
        registers, stack, code = _read_cubin(compiled.asm["cubin"])
    else:
        registers, stack, code = _read_amdgcn(compiled.asm["amdgcn"])
    loop = main_loop(code)
    return Figures(
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        shared_limit=1024 * SHARED_MEMORY[architecture],
        hgmma=count(code, r"HGMMA|UTC\w*MMA"),
        hmma=count(code, TENSOR_CORES) - count(code, r"HGMMA|UTC\w*MMA"),
        async_copies=count(code, ASYNC_COPIES),
        instructions=len(code),
        seconds=round(seconds, 1),
        loop_mma=count(loop, TENSOR_CORES),
        loop_async_copies=count(loop, ASYNC_COPIES),
        loop_instructions=len(loop),
        hazards=hazards(compiled.asm["ttgir"]) if architecture == "sm_90" else [],
    )


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _read_cubin(cubin: bytes) -> tuple[int, int, list[Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    figures = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if figures is None:
        raise RuntimeError(f"cuobjdump printed no resource usage, but:\n{usage}")
    return int(figures[1]), int(figures[2]), read_sass(sass)


def _read_amdgcn(text: str) -> tuple[int, int, list[Instruction]]:
    registers, stack = (
        re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)", text, re.MULTILINE)
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    if registers is None or stack is None:
        raise RuntimeError("the assembly text names no vgpr_count or private_segment_fixed_size")
    return int(registers[1]), int(stack[1]), read_amdgcn(text)


_OPERATION = re.compile(r"^\s*(%[\w]+)(?::\d+)? = ([\w.]+) (.*)$")
_PRODUCT = "ttng.warp_group_dot"
_WAIT = "ttng.warp_group_dot_wait"
_NAME = re.compile(r"%\w+")
_CARRYING = (
    "arith.extf",
    "arith.mulf",
    "arith.truncf",
    "tt.fp_to_fp",
    "tt.trans",
    "ttg.convert_layout",
    "ttg.local_alloc",
    "ttg.local_load",
    "ttg.memdesc_trans",
)
"""Operations that pass a value on, as it is or scaled."""


def hazards(ttgir: str) -> list[str]:
    """A sentence for each product that has one of the two."""
    lines = [match.groups() for line in ttgir.splitlines() if (match := _OPERATION.match(line))]
    made_by = {name: (operation, rest) for name, operation, rest in lines}
    found = []
    for index, (name, operation, rest) in enumerate(lines):
        if operation != _PRODUCT:
            continue
        in_flight = "isAsync = true" in rest and not _waited_for(name, lines[index + 1 :])
        if in_flight and "opIdx = 0" in rest:
            found.append(f"{name} reads registers while other work is done")
        if _is_transposed_result(_NAME.findall(rest)[0], made_by):
            found.append(f"{name} reads a product's result, transposed")
    return found


def _waited_for(name: str, after: list[tuple[str, str, str]]) -> bool:
    """Whether nothing but further products stands between a product and the wait for all of them."""
    for _, operation, rest in after:
        if operation == _WAIT:
            return name in _NAME.findall(rest) and "pendings = 0" in rest
        if operation != _PRODUCT:
            return False
    return False


def _is_transposed_result(name: str, made_by: dict[str, tuple[str, str]]) -> bool:
    """Whether an operand comes from a product's result and was transposed on its way."""
    ahead = [(name, False)]
    while ahead:
        value, transposed = ahead.pop()
        operation, rest = made_by.get(value, ("", ""))
        if operation in (_PRODUCT, _WAIT) and transposed:
            return True
        if operation in _CARRYING:
            transposed |= operation.endswith("trans")
            ahead += [(operand, transposed) for operand in _NAME.findall(rest.split(" : ")[0])]
    return False

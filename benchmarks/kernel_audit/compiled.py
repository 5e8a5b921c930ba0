"""The kernels that launchers would compile on a GPU, compiled ahead of time without one, and their figures.

`recorded` stands in for Triton's driver and names an architecture. Triton's own binder specialises the
arguments (types, ones, divisibility by 16), and a recorder takes the place of the compiler. So a
`Compilation` holds exactly what a launch on that architecture compiles, for any launcher, and its key is the
one by which Triton finds kernels. Needs a process without TRITON_INTERPRET.

`ttir_of` stops at Triton's first intermediate form. `compile_for` goes on to machine code. Registers, stack
and SASS come from NVIDIA's cuobjdump, which Triton's wheel carries; AMD's figures stand in the assembly text.
Judge spills by the stack, not by the registers. The figures hold for one version of Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.kernel_audit.triton_ir import hazards
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
        architecture: a name in `TARGETS`.
        key: Triton's key for the compiled kernel: equal keys compile once.
        signature, constants, attributes: the kernel's specialisation.
        options: Triton's, all of them, defaults included.
        arguments: the integers among the arguments, by name.
        grid: programs along three axes.
    """

    kernel: Any
    architecture: str
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
        """The first argument of `triton.compile`."""
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
                    architecture=architecture,
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
        # A kernel caches its launches by the device's name, so each target has a name of its own.
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def ttir_of(architecture: str, compilation: Compilation) -> str:
    """The TTIR of a recorded launch, without compiling any further."""
    source = compilation.source
    target = TARGETS[architecture]
    backend = make_backend(target)
    options = backend.parse_options(dict(compilation.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, generators, backend.get_module_map(), context)
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


# ---- figures ----

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
        command = [_CUOBJDUMP, "--dump-resource-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if figures is None:
        raise RuntimeError(f"cuobjdump printed no resource usage, but:\n{text}")
    return int(figures[1]), int(figures[2]), read_sass(text)


def _read_amdgcn(text: str) -> tuple[int, int, list[Instruction]]:
    registers, stack = (
        re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)", text, re.MULTILINE)
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    if registers is None or stack is None:
        raise RuntimeError("the assembly text names no vgpr_count or private_segment_fixed_size")
    return int(registers[1]), int(stack[1]), read_amdgcn(text)


# ---- instructions, jumps and loops ----

_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_SASS_PREDICATE = re.compile(r"@!?U?P\w+\s+")
_HEX = re.compile(r"0x([0-9a-f]+)\b")
_AMD_LABEL = re.compile(r"^(\.L\w+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its text without a predicate, where it may jump (indices), whether it may go on."""

    text: str
    targets: tuple[int, ...] = ()
    falls_through: bool = True

    @property
    def opcode(self) -> str:
        """The first word, for example HGMMA.64x64x16.F32.BF16 or v_mfma_f32_32x32x8_bf16."""
        return self.text.split()[0]


def read_sass(text: str) -> list[Instruction]:
    """The instructions of the first function in what `cuobjdump -sass` prints."""
    lines: list[tuple[int, str]] = []
    for match in _SASS_LINE.finditer(text):
        address = int(match[1], 16)
        if lines and address <= lines[-1][0]:
            break  # another function
        lines.append((address, match[2]))
    places = {address: index for index, (address, _) in enumerate(lines)}
    barriers: dict[str, int] = {}  # where the threads of a convergence barrier meet
    code = []
    for _, line in lines:
        bare = _SASS_PREDICATE.sub("", line)
        opcode = bare.split()[0].split(".")[0]
        operands = bare.split(None, 1)[1].split(",") if " " in bare else []
        targets: tuple[int, ...] = ()
        ends = False
        if opcode in ("BRA", "JMP"):
            targets = (places[int(_HEX.findall(bare)[-1], 16)],)
            ends = bare == line and len(operands) == 1
        elif opcode == "BSSY":
            barriers[operands[0].split()[0]] = places[int(_HEX.findall(bare)[-1], 16)]
        elif opcode == "BSYNC":
            targets = (barriers[operands[0].split()[0]],)  # hints may follow the operand
        elif opcode in ("EXIT", "RET", "BRX"):
            ends = bare == line
        code.append(Instruction(bare, targets, not ends))
    return code


def read_amdgcn(text: str) -> list[Instruction]:
    """The instructions of the kernel in the assembly text that Triton keeps as ``amdgcn``."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(lines)
        elif line.startswith("\t") and line.strip()[0] not in ".;":
            lines.append(line.split(";")[0].strip())
    code = []
    for line in lines:
        opcode = line.split()[0]
        targets = (labels[line.split()[1]],) if opcode.startswith(("s_branch", "s_cbranch")) else ()
        code.append(Instruction(line, targets, opcode not in ("s_branch", "s_endpgm")))
    return code


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The instructions of one iteration of the longest loop; empty if there is no loop.

    Loops are natural ones: a jump back to an instruction that every path to the jump passes through. A slow
    path behind the end of the kernel that jumps back is no loop. A loop that only waits does not count.
    """
    bodies = [[code[i] for i in body] for body in _natural_loops(code)]
    return max((body for body in bodies if not _only_waits(body)), key=len, default=[])


def _only_waits(body: Sequence[Instruction]) -> bool:
    """Whether a loop only polls a barrier or a resource; sm_100 has many."""
    waits, works = (count(body, pattern) for pattern in (r"SYNCS\S*TRYWAIT|NANOSLEEP", r"\w*MMA|LD|ST"))
    return waits > 0 and not works


def count(code: Iterable[Instruction], pattern: str) -> int:
    """How many instructions match a pattern from their first letter on."""
    return sum(re.match(pattern, instruction.text) is not None for instruction in code)


def _natural_loops(code: Sequence[Instruction]) -> list[list[int]]:
    """The instructions (indices) of each loop, one loop a header."""
    bounds, successors = _blocks(code)
    reachable = _reached([0], successors)
    predecessors: list[list[int]] = [[] for _ in successors]
    for block in sorted(reachable):
        for after in successors[block]:
            predecessors[after].append(block)
    loops = []
    for header, before in enumerate(predecessors):
        # A jump back comes from a block that cannot be reached without passing the header.
        others = _reached([0], successors, without=header) if before else set()
        tails = [block for block in before if block not in others]
        if tails == [header] and _is_padding(code[bounds[header] : bounds[header + 1]]):
            continue
        if tails:
            body = {header} | _reached(tails, predecessors, without=header)
            loops.append([i for block in sorted(body) for i in range(bounds[block], bounds[block + 1])])
    return loops


def _blocks(code: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """The bounds of the basic blocks, and for each block those that may run after it."""
    starts = {0} | {target for line in code for target in line.targets}
    starts |= {i + 1 for i, line in enumerate(code) if line.targets or not line.falls_through}
    bounds = [*sorted(start for start in starts if start < len(code)), len(code)]
    block_at = {start: block for block, start in enumerate(bounds[:-1])}
    successors = []
    for end in bounds[1:]:
        last = code[end - 1]
        after = [block_at[target] for target in last.targets]
        if last.falls_through and end in block_at:
            after.append(block_at[end])
        successors.append(after)
    return bounds, successors


def _reached(starts: Iterable[int], edges: Sequence[Sequence[int]], without: int | None = None) -> set[int]:
    """The blocks that are reached from ``starts`` along edges, not through the block ``without``."""
    found: set[int] = set()
    ahead = list(starts)
    while ahead:
        block = ahead.pop()
        if block not in found and block != without:
            found.add(block)
            ahead += edges[block]
    return found


def _is_padding(block: Sequence[Instruction]) -> bool:
    """Whether a block is the jump to itself that pads the end of a kernel."""
    return len(block) == 1 and not block[0].falls_through

"""Kernels compiled ahead of time for GPUs that are not here, and what their machine code says of them.

Registers, stack and SASS come from NVIDIA's cuobjdump, which Triton's wheel carries; AMD's figures stand in
the assembly text. Judge spills by the stack, not by the registers. The figures hold for one version of
Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import ASTSource

from benchmarks.audit.hazards import hazards
from benchmarks.audit.launches import SHARED_MEMORY_KIB, TARGETS, Compilation
from benchmarks.audit.machine_code import Instruction, count, main_loop, read_amdgcn, read_sass

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TENSOR_CORES = r"HGMMA|HMMA|UTC\w*MMA|QMMA|OMMA|IMMA|DMMA|v_mfma"
ASYNC_COPIES = r"LDGSTS|UTMALDG|UBLKCP|(global|buffer)_load_lds|buffer_load_\w+ .*\blds$"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a compiled kernel needs and holds.

    Attributes:
        registers, stack: a thread's 32-bit registers (AMD: VGPRs) and bytes of stack (AMD: scratch).
        shared: bytes of shared memory a program takes; ``shared_limit`` is the architecture's.
        hgmma, hmma: warp-group and warp matrix products (AMD: mfma counts as hmma; sm_100's tcgen05 as
        hgmma). async_copies: copies from global to shared memory that threads do not wait for (LDGSTS,
        UTMALDG). instructions: in all. seconds: of processor time that compiling took, ptxas included.
        loop_*: the same within one iteration of the longest loop; 0 without a loop.
        hazards: see `hazards.hazards`; of sm_90 only.
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
    source = ASTSource(
        compilation.kernel, compilation.signature, compilation.constants, compilation.attributes
    )
    before = _processor_seconds()
    compiled = triton.compile(source, target=TARGETS[architecture], options=compilation.options)
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
        shared_limit=1024 * SHARED_MEMORY_KIB[architecture],
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

"""GPUs: their shared memory, and the versions of Triton that are wrong on them.

An architecture is a name: "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120" or "gfx942".
"""

from __future__ import annotations

import re
from typing import NamedTuple

import triton

# Shared memory that one program may take, in KiB.
SHARED_MEMORY = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
}


class Fault(NamedTuple):
    """Versions of Triton that public reports say compute products like these kernels' wrong on some GPUs.

    Attributes:
        architectures: of those GPUs.
        first: the oldest reported version.
        fixed: the first version without the fault.
        what: the fault.
        report: its address.
    """

    architectures: tuple[str, ...]
    first: str
    fixed: str
    what: str
    report: str


FAULTS = (
    # The second half of `tiles.chunk_output` adds to what the first half left. The repair
    # (https://github.com/triton-lang/triton/pull/10988) is later than 3.8's branch.
    Fault(
        ("sm_100", "sm_103"),
        first="3.6.0",
        fixed="3.9.0",
        what="two products that add up in one accumulator come out wrong",
        report="https://github.com/triton-lang/triton/issues/10821",
    ),
    # These kernels walk tokens in such loops, and slices are as narrow as 32 columns.
    Fault(
        ("sm_100", "sm_103"),
        first="3.6.0",
        fixed="3.7.0",
        what="products of 32 columns in loops of run-time length come out differently each time",
        report="https://github.com/triton-lang/triton/issues/9871",
    ),
)
"""Refused pairs of GPU and Triton.

Reports about Hopper (sm_90) have no row here, because these kernels do not contain the reported constructs;
the audit checks the compiled code (`benchmarks/kernel_audit/triton_ir.py`).
"""


def why_wrong(architecture: str, triton_version: str = triton.__version__) -> str | None:
    """Half a sentence on why this Triton is refused on this GPU, or None."""
    for fault in FAULTS:
        if architecture in fault.architectures and (
            _release(fault.first) <= _release(triton_version) < _release(fault.fixed)
        ):
            return (
                f"with Triton {triton_version} on {architecture} {fault.what} ({fault.report}); "
                f"Triton {fault.fixed} has the repair"
            )
    return None


def _release(version: str) -> tuple[int, ...]:
    """(3, 7, 1) of "3.7.1", "3.7.1+git0a1b" or "3.7.1.post2"; missing parts are 0."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[+-]", version)[0])[:3]]
    return (*numbers, 0, 0, 0)[:3]

"""Constructs in compiled sm_90 kernels that public reports tie to wrong results, looked for in the TTGIR.

On Hopper a matrix product runs on its own while its warps go on, and may read its first operand from
registers. Reports of wrong results are about two things that a kernel's source does not show:

- a product with a first operand in registers that is still in flight when those are used again, by Triton's
  pipeliner (https://github.com/triton-lang/triton/issues/9433) or by ptxas
  (https://github.com/triton-lang/triton/pull/11781);
- a first operand that is another product's result, transposed, with Triton 3.4 to 3.7.0
  (https://github.com/fla-org/flash-linear-attention/pull/983).

A kernel that waits for such products at once, and transposes no result into a first operand, has neither.
"""

from __future__ import annotations

import re

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
"""What hands on a value, as it is or scaled."""


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

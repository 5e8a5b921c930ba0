"""Faults that Triton's intermediate forms show: 32-bit offsets that overflow, and suspect matrix products.

`overflows` follows the ranges of a kernel's integers through its TTIR up to its addresses. A tensor may have
more than 2^31 elements, so an offset that is computed in 32 bits is a fault that no test of ordinary size
shows. The grid and the integer arguments of a launch at a huge shape (meta tensors take no memory) give every
integer a range.

`hazards` looks in the TTGIR of sm_90 for constructs that public reports tie to wrong results. On Hopper a
matrix product runs on its own while its warps go on, and may read its first operand from registers. The
reports are about two things that a kernel's source does not show:

- a product with a first operand in registers that is still in flight when those registers are used again, by
  Triton's pipeliner (https://github.com/triton-lang/triton/issues/9433) or by ptxas
  (https://github.com/triton-lang/triton/pull/11781);
- a first operand that is another product's result, transposed, with Triton 3.4 to 3.7.0
  (https://github.com/fla-org/flash-linear-attention/pull/983).

A kernel that waits for such products at once, and transposes no result into a first operand, has neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_OPERATION = re.compile(r"^\s*(%[\w, %:]+?) = ([\w.]+)\s?(.*)$")
_FOR = re.compile(r"(%\w+) = (%\w+) to (%\w+) step (%\w+)(?: iter_args\((.*?)\) ->)?")
_NAME = re.compile(r"%\w+")
_SAME = {
    "extsi",
    "extui",
    "trunci",
    "index_cast",
    "splat",
    "expand_dims",
    "broadcast",
    "reshape",
    "trans",
    "unsplat",
}
_LIMIT = 2**31


@dataclass(frozen=True)
class _Value:
    """What is known of an integer: its range, if any, and the overflows that went into it."""

    low: int | None = None
    high: int | None = None
    overflows: frozenset[str] = field(default=frozenset())

    @property
    def known(self) -> bool:
        return self.low is not None


def overflows(
    ttir: str,
    arguments: Mapping[str, int],
    grid: Sequence[int],
    counters: Mapping[str, tuple[int, int]] | None = None,
) -> list[str]:
    """The operations whose result may leave 32 bits and is part of an address.

    A product of a value of unknown range counts as an overflow; a sum does not.

    Args:
        ttir: a kernel's TTIR.
        arguments: its integer arguments by name.
        grid: programs along three axes.
        counters: the ranges of kernels' counters, by their name in the source: the TTIR does not tell the
            range of a value that a loop carries or that was loaded.
    """
    counters = counters or {}
    values = {f"%{name}": _Value(value, value) for name, value in arguments.items()}
    found: dict[str, None] = {}  # a set in order
    for line in ttir.splitlines():
        line = re.sub(r"\s*loc\(.*$", "", line)
        operation = _OPERATION.match(line)
        if operation is None:
            if "scf.for" in line:
                _enter_loop(line, values, counters)
            continue
        names, name, rest = operation.groups()
        results = _NAME.findall(names)
        if name == "scf.for":
            _enter_loop(rest, values, counters)
        for result in results:
            values.pop(result, None)
        if name == "tt.addptr":
            offset = values.get(_NAME.findall(rest)[1], _Value())
            found.update(dict.fromkeys(sorted(offset.overflows)))
        elif len(results) == 1:
            value = _evaluate(name, rest, line.strip(), values, grid)
            values[results[0]] = _counted(results[0], value, counters)
    return list(found)


def _counted(name: str, value: _Value, counters: Mapping[str, tuple[int, int]]) -> _Value:
    """A value whose range is unknown, with that of its counter if it is one; %n_12 is the n of the source."""
    source = re.sub(r"_\d+$", "", name[1:])
    return value if value.known or source not in counters else _Value(*counters[source])


def _enter_loop(text: str, values: dict[str, _Value], counters: Mapping[str, tuple[int, int]]) -> None:
    """The loop's own variable has the range of its bounds; carried values are unknown, except counters."""
    loop = _FOR.search(text)
    if loop is None:
        return
    variable, first, end, _, carried = loop.groups()
    low, high = values.get(first, _Value()), values.get(end, _Value())
    bounded = low.known and high.known
    values[variable] = _Value(low.low, max(high.high - 1, low.low)) if bounded else _Value()
    for name, start in re.findall(r"(%\w+) = (%\w+)", carried or ""):
        value = _Value(overflows=values.get(start, _Value()).overflows)
        values[name] = _counted(name, value, counters)


def _evaluate(name: str, rest: str, line: str, values: Mapping[str, _Value], grid: Sequence[int]) -> _Value:
    kind = name.split(".")[-1]
    operands = [values.get(operand, _Value()) for operand in _NAME.findall(rest)]
    if kind == "constant":
        number = re.match(r"(?:dense<)?(-?\d+)>? :", rest)
        return _Value(int(number[1]), int(number[1])) if number else _Value()
    if kind == "get_program_id":
        return _Value(0, grid["xyz".index(rest[0])] - 1)
    if kind == "get_num_programs":
        return _Value(*[grid["xyz".index(rest[0])]] * 2)
    if kind == "make_range":
        start, end = (int(re.search(rf"{word} = (\d+)", rest)[1]) for word in ("start", "end"))
        return _Value(start, end - 1)
    if kind in ("load", "cmpi"):
        return _Value()
    if kind == "select":
        operands = operands[1:]
    inherited = frozenset().union(*(operand.overflows for operand in operands))
    ends = _range(kind, operands)
    if not re.search(r"\bi32\b|xi32>", rest.rsplit(":", 1)[-1]):
        return _Value(*ends, inherited)
    overflow = kind == "muli" if ends[0] is None else not -_LIMIT <= ends[0] <= ends[1] < _LIMIT
    if overflow:
        return _Value(None, None, inherited | {line})
    return _Value(*ends, inherited)


def _range(kind: str, operands: Sequence[_Value]) -> tuple[int, int] | tuple[None, None]:
    """The range of a result, from those of the operands; unknown if one is, or for other operations."""
    if not operands or not all(operand.known for operand in operands):
        return _half_known(kind, operands)
    ends = [(operand.low, operand.high) for operand in operands]
    if kind in _SAME:
        return ends[0]
    if kind == "select":
        return min(low for low, _ in ends), max(high for _, high in ends)
    if len(ends) != 2:
        return None, None
    (a, b), (c, d) = ends
    if kind == "addi":
        return a + c, b + d
    if kind == "subi":
        return a - d, b - c
    if kind in ("muli", "shli"):
        corners = [x * (2**y if kind == "shli" else y) for x in (a, b) for y in (c, d)]
        return min(corners), max(corners)
    if kind == "minsi":
        return min(a, c), min(b, d)
    if kind == "maxsi":
        return max(a, c), max(b, d)
    if kind in ("divsi", "divui") and a >= 0 and c > 0:
        return a // d, b // c
    if kind in ("remsi", "remui") and a >= 0 and c > 0:
        return 0, min(b, d - 1)
    return None, None


def _half_known(kind: str, operands: Sequence[_Value]) -> tuple[int, int] | tuple[None, None]:
    """A remainder is bounded by what divides it, whatever is divided."""
    if kind in ("remsi", "remui") and len(operands) == 2 and operands[1].known and operands[1].low > 0:
        return 1 - operands[1].high, operands[1].high - 1
    return None, None


# ---- products ----

_ASSIGNMENT = re.compile(r"^\s*(%[\w]+)(?::\d+)? = ([\w.]+) (.*)$")
_PRODUCT = "ttng.warp_group_dot"
_WAIT = "ttng.warp_group_dot_wait"
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
    """A sentence for each product with one of the two constructs."""
    lines = [match.groups() for line in ttgir.splitlines() if (match := _ASSIGNMENT.match(line))]
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

"""Reading machine code, NVIDIA's SASS (from cuobjdump) and AMD's assembly: instructions, jumps and loops."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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

    Loops are natural ones: a jump back to an instruction that every way to the jump passes through. So a slow
    path that stands after the end of the kernel and jumps back is none, and neither is one that only waits.
    """
    bodies = [[code[i] for i in body] for body in _natural_loops(code)]
    return max((body for body in bodies if not _only_waits(body)), key=len, default=[])


def _only_waits(body: Sequence[Instruction]) -> bool:
    """Whether a loop asks again and again if a barrier or a resource is free; sm_100 has many."""
    waits, works = (count(body, pattern) for pattern in (r"SYNCS\S*TRYWAIT|NANOSLEEP", r"\w*MMA|LD|ST"))
    return waits > 0 and not works


def count(code: Iterable[Instruction], pattern: str) -> int:
    """How many instructions match a pattern from their first letter on."""
    return sum(re.match(pattern, instruction.text) is not None for instruction in code)


def _natural_loops(code: Sequence[Instruction]) -> list[list[int]]:
    """The instructions (indices) of each loop, one loop a header."""
    starts = {0} | {target for line in code for target in line.targets}
    starts |= {i + 1 for i, line in enumerate(code) if (line.targets or not line.falls_through)}
    bounds = [*sorted(start for start in starts if start < len(code)), len(code)]
    block_at = {start: block for block, start in enumerate(bounds[:-1])}
    successors = []
    for end in bounds[1:]:
        last = code[end - 1]
        after = [block_at[target] for target in last.targets]
        if last.falls_through and end in block_at:
            after.append(block_at[end])
        successors.append(after)
    bodies: dict[int, set[int]] = {}
    dominators = _dominators(successors)
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, after in enumerate(successors):
        for other in after:
            if dominators[block]:  # what nothing reaches has none
                predecessors[other].append(block)
    for header, before in enumerate(predecessors):
        for tail in before:
            if header in dominators[tail] and not _idle(code, bounds, header, tail):
                bodies.setdefault(header, {header}).update(_reaching(tail, header, predecessors))
    return [
        [i for block in sorted(body) for i in range(bounds[block], bounds[block + 1])]
        for body in bodies.values()
    ]


def _idle(code: Sequence[Instruction], bounds: Sequence[int], header: int, tail: int) -> bool:
    """Whether a loop is the jump to itself that pads the end of a kernel."""
    return (
        header == tail and bounds[header + 1] - bounds[header] == 1 and not code[bounds[header]].falls_through
    )


def _reaching(tail: int, header: int, predecessors: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which ``tail`` is reached without passing ``header``."""
    found, ahead = set(), [tail]
    while ahead:
        block = ahead.pop()
        if block not in found and block != header:
            found.add(block)
            ahead += predecessors[block]
    return found


def _dominators(successors: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """For each block, those that every way to it passes through, itself included; none if unreachable."""
    order = _reverse_postorder(successors)
    reached = set(order)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for other in successors[block]:
            predecessors[other].append(block)
    dominators: dict[int, frozenset[int]] = {block: frozenset(order) for block in order}
    dominators[0] = frozenset([0])
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = frozenset.intersection(*(dominators[other] for other in predecessors[block])) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return [dominators[block] if block in reached else frozenset() for block in range(len(successors))]


def _reverse_postorder(successors: Sequence[Sequence[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, ahead = stack[-1]
        for other in ahead:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(successors[other])))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]

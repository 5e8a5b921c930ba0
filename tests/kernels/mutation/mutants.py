"""Small faults in Triton kernels: every sign, comparison, integer and mask operand, changed one by one.

A mutant is the source of a module with one change in one `@triton.jit` function. It is named by the
function, the text of its line and the change, so that a name outlives edits elsewhere in the file.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS = {
    ast.Lt: [ast.LtE],
    ast.LtE: [ast.Lt],
    ast.Gt: [ast.GtE],
    ast.GtE: [ast.Gt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
}
_SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add}
_TWINS = {"minimum": "maximum", "maximum": "minimum"}
_LAYOUT_CALLS = {"arange", "program_id", "reshape", "zeros", "full"}
_REDUCTIONS = {"sum", "max", "min", "cumsum"}
_KEYWORDS = {"axis", "dtype", "num_stages", "other"}


@dataclass(frozen=True)
class Mutant:
    """One changed function.

    Attributes:
        function, line, change: its name: `line` is the text of the source line, `change` is "old -> new".
        source: the whole module's source.
        number: in which place of the line, counted from 1, if the same change fits several.
    """

    function: str
    line: str
    change: str
    number: int
    source: str

    @property
    def name(self) -> tuple[str, str, str]:
        """What an entry in the list of equivalents names."""
        change = self.change if self.number == 1 else f"{self.change} (place {self.number})"
        return self.function, self.line, change


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of the `@triton.jit` functions of a module, in the order of its text."""
    lines = source.encode().split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    found: list[Mutant] = []
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or not _is_kernel(function):
            continue
        seen: Counter[tuple[str, str]] = Counter()
        for node, replacement in _changes(function):
            first = starts[node.lineno - 1] + node.col_offset
            last = starts[node.end_lineno - 1] + node.end_col_offset
            old = source.encode()[first:last].decode()
            # Parentheses keep the change to the node; a statement takes none.
            new = replacement if isinstance(node, ast.stmt) else f"({replacement})"
            line = lines[node.lineno - 1].decode().strip()
            change = f"{' '.join(old.split())} -> {replacement}"
            seen[line, change] += 1
            text = (source.encode()[:first] + new.encode() + source.encode()[last:]).decode()
            found.append(Mutant(function.name, line, change, seen[line, change], text))
    return found


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _changes(function: ast.FunctionDef) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Nodes of a function's body with the text that takes their place."""
    for statement in function.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        yield from _of_node(statement)


def _of_node(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    if isinstance(node, ast.Subscript):
        yield from _of_node(node.value)  # x[:, None] is layout
        return
    if isinstance(node, ast.AnnAssign):
        yield from _of_node(node.value)
        return
    yield from _here(node)
    for child in ast.iter_child_nodes(node):
        if not _is_layout(node, child):
            yield from _of_node(child)


def _is_layout(node: ast.AST, child: ast.AST) -> bool:
    """Numbers that only shapes follow from: with one changed nothing runs, which would prove nothing."""
    if isinstance(child, ast.keyword):
        return child.arg in _KEYWORDS  # `other` has a change of its own
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or child is node.func:
        return False
    called = node.func.attr
    return called in _LAYOUT_CALLS or (called in _REDUCTIONS and child in node.args[1:])


def _here(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """The changes of one node, not of what lies in it."""
    match node:
        case ast.BinOp(op=op) if type(op) in _SIGNS:
            yield node, ast.unparse(ast.BinOp(node.left, _SIGNS[type(op)](), node.right))
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            yield node, ast.unparse(node.left)
            yield node, ast.unparse(node.right)
        case ast.BoolOp():
            for dropped in range(len(node.values)):
                kept = [value for i, value in enumerate(node.values) if i != dropped]
                yield node, ast.unparse(kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept))
        case ast.AugAssign(op=op) if type(op) in _SIGNS:
            yield node, ast.unparse(ast.AugAssign(node.target, _SIGNS[type(op)](), node.value))
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node, ast.unparse(node.operand)
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            for other in _COMPARISONS[type(op)]:
                yield node, ast.unparse(ast.Compare(node.left, [other()], node.comparators))
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            yield node, str(value + 1)
            yield node, str(value - 1)
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Call():
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[tuple[ast.expr, str]]:
    """Ranges and program numbers shifted, minimum for maximum, branches of `where` swapped, masks dropped."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if name in ("arange", "program_id"):
        yield node, f"{ast.unparse(node)} + 1"
    elif name in _TWINS:
        yield node, ast.unparse(node).replace(name, _TWINS[name], 1)
    elif name == "where":
        condition, yes, no = node.args
        yield node, ast.unparse(ast.Call(node.func, [condition, no, yes], []))
    elif name == "trans":
        yield node, ast.unparse(node.args[0])
    for keyword in node.keywords:
        if keyword.arg == "mask":
            mask = ast.unparse(keyword.value)
            # `n < N | True` would be a comparison with N | True.
            yield keyword.value, f"{f'({mask})' if isinstance(keyword.value, ast.Compare) else mask} | True"
        elif keyword.arg == "other":
            yield keyword.value, "1"

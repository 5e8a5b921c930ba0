"""Every file that a page, a comment or a docstring names is there."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
FOLDERS = ("retpop", "kernels", "examples", "benchmarks", "tests", "docs")
PAGES = [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]

# A path with a folder, or the bare name of a Python file or page.
POINTER = re.compile(r"(?<![\w./*{-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|sh)\b(?!\w|/)")
# What a reader of the documentation makes, a pattern, and a file of MinAtar's.
ELSEWHERE = {"my_game.py", "docs/results/data/EXPERIMENT/README.md", "examples/dqn.py"}


@cache
def tree() -> frozenset[str]:
    """Every file of the repository by every way to name it: its path, less any of its first folders."""
    files = [path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*") if path.is_file()]
    names = set()
    for path in [*files, *CHECKOUT.iterdir()]:
        parts = path.relative_to(CHECKOUT).parts
        names.update("/".join(parts[first:]) for first in range(len(parts)))
    return frozenset(names)


def sources() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*")]
    return [*PAGES, *sorted(path for path in inside if path.suffix in {".py", ".md"})]


def pointers(text: str) -> set[str]:
    return {pointer.removeprefix("./") for pointer in POINTER.findall(text)}


def comments_and_docstrings(text: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def missing(path: Path) -> list[str]:
    """What a page, or the comments and docstrings of a Python file, name and the repository lacks."""
    text = path.read_text()
    absent = pointers(text) - tree() - ELSEWHERE
    if absent and path.suffix == ".py":  # parsing is slow, and few files need it
        absent &= pointers("\n".join(comments_and_docstrings(text)))
    return sorted(absent)


def named(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


def test_no_pointer_to_a_missing_file() -> None:
    assert {named(path): absent for path in sources() if (absent := missing(path))} == {}


@pytest.mark.parametrize("root", ["retpop", "kernels", "examples/rem_atari", "benchmarks"])
def test_the_design_page_draws_every_package(root: str) -> None:
    drawing = (CHECKOUT / "docs" / "design.md").read_text().split("```")[1]
    packages = [named(path.parent) for path in (CHECKOUT / root).rglob("__init__.py")]
    drawn = {folder.rstrip("/") for folder in re.findall(r"[\w/]+/", drawing)}
    assert packages
    assert [package for package in packages if package not in drawn and Path(package).name not in drawn] == []


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text('"""See retpop/ops/nowhere.py."""\n# and docs/nothing.md\nx = "a/string.py"\n')
    assert missing(source) == ["docs/nothing.md", "retpop/ops/nowhere.py"]

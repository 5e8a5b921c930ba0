"""The pages keep their word: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import retpop

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks of some languages: (number of lines before it, text)."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start(2)), match[2])
        for match in FENCE.finditer(text)
        if match[1] in languages
    ]


def named(page: Path) -> str:
    return page.relative_to(CHECKOUT).as_posix()


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def test_the_pages_have_examples() -> None:
    assert {"README.md", "docs/retention.md", "docs/pop.md", "docs/layers.md"} <= set(map(named, WITH_PYTHON))


OTHER_TOOLS = ("peft", "torchao", "accelerate", "onnx", "onnxscript")
"""Packages of the extra `interplay`: where they are installed, the blocks that need them run too."""


def languages(page: Path) -> tuple[str, ...]:
    """Of the blocks that run; elsewhere, `py` marks what the tests cannot run."""
    with_others = page.name == "with_other_tools.md" and all(map(find_spec, OTHER_TOOLS))
    return ("python", "py") if with_others else ("python",)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after another in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "example"}
    for line, code in blocks(page, *languages(page)):
        # Blank lines before the code make a traceback show the line of the page.
        exec(compile("\n" * line + code, page, "exec"), namespace)


COMMANDS = [
    pytest.param(command, id=f"{named(page)}: {command}")
    for page in PAGES
    for _, text in blocks(page, "sh", "bash", "shell", "console")
    for command in re.findall(r"^(?:\$ )?(rem-atari .*)$", text, re.MULTILINE)
]


def test_the_pages_have_commands() -> None:
    assert COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command: str) -> None:
    from rem_atari.parsing import parse_arguments

    parse_arguments(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index() -> None:
    index = (CHECKOUT / "docs" / "index.md").read_text()
    navigation = (CHECKOUT / "docs" / "mkdocs" / "mkdocs.yml").read_text()
    for page in (CHECKOUT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
        assert page.name in navigation, page.name


def test_the_config_table_lists_every_field_with_its_default() -> None:
    page = (CHECKOUT / "docs" / "layers.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\|", page, re.MULTILINE)
    expected = [
        (field.name, "" if field.default is MISSING else field.default)
        for field in fields(retpop.RetNetConfig)
    ]
    assert [(name, default and ast.literal_eval(default)) for name, default in listed] == expected

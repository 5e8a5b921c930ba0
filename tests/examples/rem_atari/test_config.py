"""The configuration: it survives the way through JSON, wrong data is named, and every field matters."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import rem_atari
from rem_atari.config import Config
from rem_atari.config_io import from_dict
from rem_atari.presets import PRESETS

PACKAGE = Path(rem_atari.__file__).parent


def as_json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))


def put(data: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """`data` with the entry at a dotted path replaced or added."""
    *parents, name = path.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    return data


def all_fields(cls: type, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and docstring of each field, nested ones too."""
    hints = get_type_hints(cls)
    docs = field_docs(cls.__name__)
    for field in fields(cls):
        dotted = f"{path}{field.name}"
        yield dotted, docs.get(field.name, "")
        if is_dataclass(hints[field.name]):
            yield from all_fields(hints[field.name], f"{dotted}.")


def field_docs(class_name: str) -> dict[str, str]:
    tree = ast.parse((PACKAGE / "config.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return {
        field.target.id: doc.value.value
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    assert Config.from_dict(as_json(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tokenizer.colour", 1, "unknown field: tokenizer.colour"),
        ("tokenizer.optim.lr", True, "tokenizer.optim.lr is True, wanted float"),
        ("tokenizer.optim.lr", "1e-4", "tokenizer.optim.lr is '1e-4', wanted float"),
        ("seed", 1.0, "seed is 1.0, wanted int"),
        ("seed", None, "seed is None, wanted int"),
        ("env.id", 3, "env.id is 3, wanted str or null"),
        ("tokenizer.channels", 8, "tokenizer.channels is 8, wanted a list"),
        ("tokenizer.channels", [8, "16"], r"tokenizer.channels\[1\] is '16', wanted int"),
        ("controller.channels", [8, 8, 8], "controller.channels has 3 entries, wanted 2"),
        ("world_model", 5, "world_model is 5, wanted an object"),
        ("world_model.dropout", [], r"world_model.dropout is \[\], wanted float"),
        ("controller.mask_after_end", 1, "controller.mask_after_end is 1, wanted bool"),
    ],
)
def test_wrong_data_is_named_by_its_path(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_dict(put(as_json(Config()), path, value))


def test_a_missing_field_is_named() -> None:
    data = as_json(Config())
    del data["world_model"]["optim"]["clip_norm"]
    with pytest.raises(ValueError, match=r"missing field: world_model\.optim\.clip_norm"):
        Config.from_dict(data)


def test_integers_become_floats_where_floats_are_wanted_and_lists_become_tuples() -> None:
    data = put(as_json(Config()), "world_model.dropout", 0)
    config = Config.from_dict(data)
    assert type(config.world_model.dropout) is float
    assert type(config.tokenizer.channels) is tuple


def test_alternatives_are_tried_in_turn() -> None:
    @dataclass(frozen=True)
    class Choice:
        bound: float | None

    assert from_dict(Choice, {"bound": None}) == Choice(None)
    assert from_dict(Choice, {"bound": 2}) == Choice(2.0)


def test_every_field_has_a_docstring() -> None:
    """They are the help of the command line."""
    assert [path for path, doc in all_fields(Config) if not doc.strip()] == []


def test_every_field_is_read() -> None:
    """A setting that nothing looks at would be a lie."""
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("config.py", "presets.py"):
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [path for path, _ in all_fields(Config) if path.split(".")[-1] not in read] == []

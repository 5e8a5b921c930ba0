"""The configuration: it survives the way through JSON, wrong data is named, and every field matters."""

from __future__ import annotations

import ast
import itertools
import json
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import rem_atari
from rem_atari.config import Config
from rem_atari.config.earlier_versions import ADDED_FIELDS
from rem_atari.config.presets import PRESETS
from rem_atari.config.reading import from_dict
from rem_atari.errors import UsageError
from rem_atari.training.setup import ABOVE_ZERO, AT_MOST_ONE, SMALLEST, check_config

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
    tree = ast.parse((PACKAGE / "config" / "settings.py").read_text())
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


@pytest.mark.parametrize("path", ADDED_FIELDS)
def test_a_run_folder_of_before_a_field_was_added_is_still_read(path: str) -> None:
    data = as_json(Config())
    *parts, name = path.split(".")
    del reduce(dict.__getitem__, parts, data)[name]
    before = json.dumps(data)
    filled = Config.from_dict(data).to_dict()
    assert reduce(dict.__getitem__, parts, filled)[name] == ADDED_FIELDS[path]
    assert json.dumps(data) == before


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
        if path.name not in ("settings.py", "presets.py"):
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [path for path, _ in all_fields(Config) if path.split(".")[-1] not in read] == []


def change(path: str, value: object) -> Config:
    """The debug preset with one field changed; a tuple gets `value` as its last entry."""
    data = as_json(PRESETS["debug"])
    old = reduce(operator.getitem, path.split("."), data)
    return Config.from_dict(put(data, path, [*old[:-1], value] if isinstance(old, list) else value))


def numbers() -> list[str]:
    """Dotted paths of the fields that are numbers, or None, or tuples of numbers."""
    types = {path: field_type(path) for path, _ in all_fields(Config)}
    return [path for path, kind in types.items() if re.search(r"\b(int|float)\b", kind)]


def field_type(path: str) -> str:
    """The type of the field at a dotted path, as text."""
    *parents, name = path.split(".")
    owner = reduce(lambda cls, parent: get_type_hints(cls)[parent], parents, Config)
    return str(get_type_hints(owner)[name])


LIMITS = (
    [(path, smallest - 1, f"at least {smallest}") for path, smallest in SMALLEST.items()]
    + [(path, 0, "more than 0") for path in ABOVE_ZERO]
    + [(path, 1.01, "at most 1") for path in AT_MOST_ONE]
    + [(path, -1, "wanted") for path in numbers()]
    + [
        (path, float(bad), "finite")
        for path in numbers()
        if "float" in field_type(path)
        for bad in ("nan", "inf")
    ]
)


@pytest.mark.parametrize(("path", "value", "wanted"), LIMITS)
def test_a_number_out_of_its_range_is_refused(path: str, value: float, wanted: str) -> None:
    with pytest.raises(UsageError, match=rf"^{path} is {value}(\.0)?, wanted .*") as refused:
        check_config(change(path, value))
    assert wanted in str(refused.value)


@pytest.mark.parametrize(("path", "smallest"), [*SMALLEST.items(), *((path, 1) for path in AT_MOST_ONE)])
def test_a_number_at_its_limit_is_taken(path: str, smallest: int) -> None:
    check_config(change(path, smallest))


def test_a_device_that_fails_is_explained_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nCompile with TORCH_USE_CUDA_DSA.")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(UsageError, match=r"^the device 'cuda:9' cannot be used: .* invalid device ordinal$"):
        check_config(change("device", "cuda:9"))


def test_defaults_are_as_published_but_for_two_fields() -> None:
    published, default = PRESETS["paper"], Config()
    better = replace(published.controller, burn_in_actions=True, mask_after_end=True)
    assert published != default
    assert replace(published, controller=better) == default


def test_a_context_longer_than_the_burn_in_is_refused() -> None:
    longer = change("controller.context_frames", PRESETS["debug"].controller.burn_in + 1)
    with pytest.raises(UsageError, match=r"controller\.context_frames is 4, wanted at most .* is 3"):
        check_config(longer)


def test_more_minibatches_than_episodes_are_refused() -> None:
    episodes = PRESETS["debug"].controller.optim.batch_size
    with pytest.raises(UsageError, match=rf"controller\.minibatches is {episodes + 1}, wanted at most"):
        check_config(change("controller.minibatches", episodes + 1))

"""Frozen dataclasses from JSON data, checked field by field.

The counterpart of :func:`dataclasses.asdict`: what a run folder's ``config.json`` holds becomes the
dataclass it came from, or a ValueError that names the field by its dotted path.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_dict(cls: type[T], data: dict[str, Any], *, path: str = "") -> T:
    """A dataclass, its nested dataclasses too, from JSON data.

    Lists become tuples where the field is a tuple, and an integer is taken where the field is a float.

    Args:
        cls: the dataclass wanted; its fields may be bool, int, float, str, None, Literal, tuples
            of these, unions of these and dataclasses.
        data: one entry per field, no more and no fewer.
        path: dotted path of `data` inside the whole, for messages.
    Raises:
        ValueError: an unknown or missing name or a wrong type; the message gives the dotted path.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{path or 'the configuration'} is {data!r}, wanted an object with named fields")
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for complaint, wrong in (
        ("unknown field", [name for name in data if name not in names]),
        ("missing field", [name for name in names if name not in data]),
    ):
        if wrong:
            listed = ", ".join(f"{prefix}{name}" for name in wrong)
            raise ValueError(f"{complaint}{'s' if len(wrong) > 1 else ''}: {listed}")
    hints = get_type_hints(cls)
    return cls(**{name: _convert(hints[name], data[name], f"{prefix}{name}") for name in names})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names `path`."""
    if is_dataclass(hint):
        return from_dict(hint, value, path=path)  # type: ignore[arg-type]
    if get_origin(hint) in (Union, types.UnionType):
        return _convert_union(hint, value, path)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{path} is {value!r}, wanted {_name(hint)}")
        return value
    if get_origin(hint) is tuple:
        return _convert_tuple(hint, value, path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    # type() and not isinstance(): True is an int in Python, but not in JSON.
    if type(value) is not hint:
        raise ValueError(f"{path} is {value!r}, wanted {_name(hint)}")
    return value


def _convert_union(hint: Any, value: Any, path: str) -> Any:
    for alternative in get_args(hint):
        try:
            return _convert(alternative, value, path)
        except ValueError:
            continue
    raise ValueError(f"{path} is {value!r}, wanted {_name(hint)}")


def _convert_tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path} is {value!r}, wanted a list")
    items = get_args(hint)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ValueError(f"{path} has {len(value)} entries, wanted {len(items)}")
    return tuple(
        _convert(item, entry, f"{path}[{i}]")
        for i, (item, entry) in enumerate(zip(items, value, strict=True))
    )


def _name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(alternative) for alternative in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(value) for value in get_args(hint))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary from dotted paths to values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, dict) else {path: value})
    return flat

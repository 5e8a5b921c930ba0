"""Keyword arguments of an environment, from words of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def parse_kwargs(words: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from key=value words and JSON objects.

    A value is read as JSON where it is JSON (8, true, [1, 2]), else it is a text.

    Raises:
        ValueError: a word is neither, or names a key again.
    """
    found: dict[str, Any] = {}
    for word in words:
        given = _parse_object(word) if word.lstrip().startswith("{") else _parse_pair(word)
        twice = found.keys() & given.keys()
        if twice:
            raise ValueError(f"env.kwargs has {', '.join(sorted(twice))} twice")
        found |= given
    return found


def _parse_object(word: str) -> dict[str, Any]:
    try:
        return json.loads(word)
    except ValueError as error:
        raise ValueError(f"env.kwargs {word!r} is no JSON object: {error}") from error


def _parse_pair(word: str) -> dict[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"env.kwargs {word!r} is neither key=value nor a JSON object")
    try:
        return {key: json.loads(text)}
    except ValueError:
        return {key: text}

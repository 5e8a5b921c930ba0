"""Files that anybody may have written: what can be read is read, and the rest is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rem_atari.runs.reading import is_number, read_json_lines


def test_lines_that_are_no_objects_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    texts = ['{"loss": 1}', "[" * 100_000, "7", '{"loss": 2}', "\udcff", '{"loss": 3, "ep']
    path.write_bytes("\n".join(texts).encode(errors="surrogateescape"))
    assert read_json_lines(path) == ([{"loss": 1}, {"loss": 2}], [2, 3, 5, 6])
    assert read_json_lines(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize("value", [0, -3, 1.5, 10**300])
def test_finite_numbers_are_numbers(value: float) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, None, "1", float("nan"), float("inf"), 10**400, [1]])
def test_nothing_else_is_a_number(value: object) -> None:
    assert not is_number(value)

"""A table of names and shapes finds every fault of a state dict, and names it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retpop.checkpoints.translation import below, check_heads, count_layers, measure, one_prefix, per_layer

TABLE = {"both": {"a": "XY", "b": "XY"}, "last": {"c": "Y"}}


def weights() -> dict[str, Tensor]:
    return {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3), "c": torch.zeros(3)}


def test_sizes_are_read_from_shapes() -> None:
    assert measure("load()", weights(), TABLE) == {"X": 2, "Y": 3}


WRONG = [
    ({"d": torch.zeros(3)}, ValueError, r"load\(\): the keys .* unmatched: \['d'\]; missing: none"),
    ({"b": torch.zeros(2, 4)}, ValueError, r"'b' has shape \(2, 4\); beside the other .* \(2, 3\)"),
    ({"c": torch.zeros(())}, ValueError, r"'c' has shape \(\); beside the other weights it must have \(3,\)"),
    (
        {"a": torch.zeros(2)},
        ValueError,
        r"'a' has shape \(2,\); beside the other weights it must have \(2, 3\)",
    ),
    ({"c": torch.zeros(3).double()}, ValueError, "'c' is torch.float64 on cpu but 'a' is torch.float32"),
    ({"c": torch.zeros(3).int()}, TypeError, "'c' is torch.int32; it must be a floating-point tensor"),
    ({"c": [0.0]}, TypeError, "'c' is list; it must be a floating-point tensor"),
]


@pytest.mark.parametrize(("given", "error", "words"), WRONG)
def test_what_does_not_fit_is_named(given: dict[str, Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        measure("load()", weights() | given, TABLE)


def test_missing_names_are_all_listed() -> None:
    with pytest.raises(ValueError, match=r"unmatched: none; missing: \['a', 'b'\]"):
        measure("load()", {"c": torch.zeros(3)}, TABLE)


def test_a_gap_between_layers_shows_as_missing() -> None:
    given = {"layers.0.a": torch.zeros(1), "layers.2.a": torch.zeros(1)}
    table = per_layer({"x": {"a": "E"}}, count_layers(given))
    assert table == {"layers.0.x": {"layers.0.a": "E"}, "layers.1.x": {"layers.1.a": "E"}}
    with pytest.raises(ValueError, match=r"unmatched: \['layers.2.a'\]; missing: \['layers.1.a'\]"):
        measure("load()", given, table)


def test_one_model_is_found_by_its_anchor() -> None:
    assert one_prefix("load()", {"m.d.a": 1, "m.b": 2, "data": 3}, "a") == "m.d."
    assert below("m.", {"m.a": 1, "b": 2}) == {"a": 1}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"holds no decoder; .* \(its keys: b\)"):
        one_prefix("load()", {"b": 1}, "a")
    with pytest.raises(ValueError, match="holds 2 decoders"):
        one_prefix("load()", {"a": 1, "m.a": 2}, "a")
    with pytest.raises(TypeError, match="state_dict is list"):
        one_prefix("load()", [], "a")


def test_heads_must_be_whole_and_agree() -> None:
    assert check_heads("load()", None, 4.0) == check_heads("load()", 4, 4) == 4
    with pytest.raises(ValueError, match="num_heads is 2, but the weights have 4 heads"):
        check_heads("load()", 2, 4)
    with pytest.raises(ValueError, match=r"the weights have 1\.5 heads"):
        check_heads("load()", None, 1.5)

"""Shared by all loaders: tables of names and shapes of foreign weights, and the module made from them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from retpop.config import RetNetConfig
from retpop.layers import RetNetDecoder
from retpop.models import RetNetLM, RetNetLMConfig

Table = dict[str, dict[str, str]]
"""Our name of a weight to their names of its parts, in order, each with its dimensions.

A dimension is a letter: E width of the residual stream, K and V of keys and values over all heads, F of the
feed-forward, N tokens in the vocabulary, H heads, D of one head's keys, and W of one head's values. A letter
has one size in all weights.
"""

OF_THE_MODEL = {"embedding.weight", "head.weight"}
"""Our names of a language model's weights outside its decoder."""


def one_prefix(where: str, state_dict: object, anchor: str) -> str:
    """The prefix of ``anchor`` in the one name that ends with it.

    Raises:
        TypeError, ValueError: state_dict does not map names to tensors, or not exactly one name ends with it.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"{where}: state_dict is {type(state_dict).__name__}; it must map names to tensors.")
    prefixes = [key.removesuffix(anchor) for key in state_dict if key.endswith(anchor)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} decoders, under {prefixes}" if prefixes else "no decoder"
        raise ValueError(
            f"{where}: state_dict holds {found}; it must have exactly one key that is '{anchor}' or ends "
            f"with '.{anchor}' (its keys: {_listed(list(state_dict))})."
        )
    return prefixes[0]


def below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def count_layers(weights: Mapping[str, Tensor]) -> int:
    """The number of different layers in the names; a gap in their indices later shows as missing names."""
    return len({match[1] for key in weights if (match := re.match(r"layers\.(\d+)\.", key))})


def per_layer(table: Table, num_layers: int) -> Table:
    """The table of one layer, for every layer."""
    return {
        f"layers.{n}.{ours}": {f"layers.{n}.{name}": dims for name, dims in theirs.items()}
        for n in range(num_layers)
        for ours, theirs in table.items()
    }


def measure(where: str, weights: Mapping[str, Tensor], table: Table) -> dict[str, int]:
    """Check names, kinds and shapes of ``weights`` against the table.

    Returns:
        the size of each letter.

    Raises:
        TypeError: a weight is no floating-point tensor.
        ValueError: names are unmatched or missing (all are listed), or a shape, dtype or device does not fit.
    """
    expected = {name: dims for theirs in table.values() for name, dims in theirs.items()}
    unmatched, missing = sorted(weights.keys() - expected), sorted(expected.keys() - weights.keys())
    if unmatched or missing:
        raise ValueError(
            f"{where}: the keys of state_dict do not fit; unmatched: {unmatched or 'none'}; "
            f"missing: {missing or 'none'}."
        )
    first = next(iter(expected))
    for name in expected:
        _check_kind(where, name, weights[name], first, weights[first])
    sizes: dict[str, int] = {}
    for name, dims in expected.items():
        for letter, size in zip(dims, weights[name].shape, strict=False):
            sizes.setdefault(letter, size)
    for name, dims in expected.items():
        wanted = tuple(sizes.get(letter, letter) for letter in dims)
        if tuple(weights[name].shape) != wanted:
            raise ValueError(
                f"{where}: '{name}' has shape {tuple(weights[name].shape)}; beside the other weights it must "
                f"have {wanted}."
            )
    return sizes


def _check_kind(where: str, name: str, weight: object, first: str, other: Tensor) -> None:
    """Raise unless ``weight`` is a floating-point tensor of the dtype and device of the first weight."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{where}: '{name}' is {got}; it must be a floating-point tensor.")
    if (weight.dtype, weight.device) != (other.dtype, other.device):
        raise ValueError(
            f"{where}: '{name}' is {weight.dtype} on {weight.device} but '{first}' is {other.dtype} on "
            f"{other.device}; all weights must share both."
        )


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_heads(where: str, given: int | None, found: float) -> int:
    """The number of heads ``found`` in the weights; raise if it is not whole or not the ``given`` one."""
    if found != int(found) or given not in (None, found):
        raise ValueError(f"{where}: num_heads is {given}, but the weights have {found:g} heads.")
    return int(found)


def build(
    table: Table, weights: Mapping[str, Tensor], cfg: RetNetConfig, model: RetNetLMConfig | None = None
) -> RetNetDecoder | RetNetLM:
    """A decoder, or a language model if its configuration is given, with copies of measured weights."""
    ours = {name: torch.cat([weights[key] for key in theirs]) for name, theirs in table.items()}
    sample = next(iter(ours.values()))
    if model is None:
        decoder = RetNetDecoder(cfg, sample.device, sample.dtype)
        decoder.load_state_dict(ours)
        return decoder
    whole = RetNetLM(model, sample.device, sample.dtype)
    whole.load_state_dict(
        {name if name in OF_THE_MODEL else f"decoder.{name}": weight for name, weight in ours.items()}
    )
    return whole

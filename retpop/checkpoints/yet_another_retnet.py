"""Weights of `yet-another-retnet` (PyPI, MIT; read at version 0.5.1) as a `RetNetDecoder`.

What that package fixes, and where it lands in `RetNetConfig`:

- decay 1 - exp(linspace(ln 1/32, ln 1/512, H)): ``decay="log_spaced"``;
- rotation of interleaved pairs by 10000^-linspace(0, 1, Dk/2): ``position="retnet"``;
- GroupNorm per head without affine, eps 1e-6, and biases everywhere: the defaults;
- one activation for the gate and the feed-forward layers, no norm after the last layer.

It divides k by sqrt(Dk) where we multiply the output: outputs are equal, its states are ours times Dk^-0.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from retpop.arguments import check_num_heads
from retpop.config import RetNetConfig
from retpop.layers import RetNetDecoder
from retpop.layers.feed_forward import ACTIVATIONS
from retpop.position import rotary_frequencies

_ANCHOR = "layers.0.retention.q_proj.weight"
_FUSED = ("q_proj", "k_proj", "v_proj", "g_proj")
_RENAMED = {
    "norm1": "retention_norm",
    "retention.out_proj": "retention.out_proj",
    "norm2": "feed_forward_norm",
    "linear1": "feed_forward.in_proj",
    "linear2": "feed_forward.out_proj",
}


def load_yet_another_retnet(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    activation: Literal["silu", "gelu", "relu"] = "silu",
    norm_first: bool = True,
    norm_eps: float = 1e-6,
) -> RetNetDecoder:
    """A `RetNetDecoder` with the weights, and so the outputs, of a `yet_another_retnet` decoder.

    Sizes are read from the weights; what they do not tell is an argument. The decoder has the weights' dtype
    and device, copies of the weights, no dropout, and is in training mode like any new module.

    Args:
        state_dict: `state_dict()` of its `RetNetDecoder`, or of a model that holds exactly one (its `RetNet`
            or your own). In a model, keys outside the decoder's prefix (embedding, output head) are not read.
        num_heads: its `nhead`.
        activation: its `activation`; "silu" is what it calls "swish".
        norm_first: its `norm_first`.
        norm_eps: its `layer_norm_eps`.

    Raises:
        ValueError: no decoder or several are found; keys are missing or unmatched (all are listed); a shape,
            the number of heads, the dtypes or the rotation angles do not fit.
        TypeError: a value under the decoder's prefix is not a floating-point tensor.
    """
    _check_arguments(state_dict, activation)
    check_num_heads("load_yet_another_retnet()", num_heads)
    weights = _decoder_weights(state_dict)
    num_layers = _num_layers(weights)
    embed_dim, ffn_dim = _sizes(weights)
    _check_keys(weights, _expected_shapes(num_layers, embed_dim, ffn_dim))
    if embed_dim % num_heads:
        raise ValueError(
            f"load_yet_another_retnet(): num_heads is {num_heads}; "
            f"it must divide the weights' width, {embed_dim}."
        )
    config = RetNetConfig(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        ffn_dim=ffn_dim,
        decay="log_spaced",
        position="retnet",
        gate_activation=activation,
        activation=activation,
        norm_eps=norm_eps,
        norm_first=norm_first,
    )
    _check_thetas(weights, config)
    anchor = weights[_ANCHOR]
    decoder = RetNetDecoder(config, device=anchor.device, dtype=anchor.dtype)
    decoder.load_state_dict(_translate(weights, num_layers))
    return decoder


def _check_arguments(state_dict: object, activation: str) -> None:
    where = "load_yet_another_retnet()"
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"{where}: state_dict is {type(state_dict).__name__}; it must map names to tensors.")
    if activation not in ACTIVATIONS:
        hint = ' (its "swish" is "silu")' if activation == "swish" else ""
        raise ValueError(
            f"{where}: activation is {activation!r}; it must be one of {tuple(ACTIVATIONS)}{hint}."
        )


def _decoder_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries under the prefix of the one decoder in ``state_dict``, without that prefix."""
    prefixes = [key.removesuffix(_ANCHOR) for key in state_dict if key.endswith(_ANCHOR)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} decoders, under {prefixes}" if prefixes else "no decoder"
        raise ValueError(
            f"load_yet_another_retnet(): state_dict holds {found}; it must have exactly one key that is "
            f"'{_ANCHOR}' or ends with '.{_ANCHOR}' (its keys: {_listed(state_dict)})."
        )
    prefix = prefixes[0]
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    for key, value in weights.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"load_yet_another_retnet(): '{prefix}{key}' is {got}; it must be a floating-point tensor."
            )
    return weights


def _num_layers(weights: dict[str, Tensor]) -> int:
    """How many different layers the keys name; a gap in their numbers then shows as missing keys."""
    return len({match[1] for key in weights if (match := re.match(r"layers\.(\d+)\.", key))})


def _sizes(weights: dict[str, Tensor]) -> tuple[int, int]:
    """Width of the decoder and of its feed-forward layers, from the first layer's weights."""
    anchor, linear1 = weights[_ANCHOR], weights.get("layers.0.linear1.weight")
    # What is missing or a scalar counts as 0 here; `_check_keys` then names it.
    embed_dim = anchor.shape[-1] if anchor.ndim else 0
    return embed_dim, linear1.shape[0] if linear1 is not None and linear1.ndim else 0


def _expected_shapes(num_layers: int, embed_dim: int, ffn_dim: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a decoder of these sizes has there."""
    square = (embed_dim, embed_dim)
    weights = {f"retention.{name}": square for name in (*_FUSED, "out_proj")}
    weights |= {"linear1": (ffn_dim, embed_dim), "linear2": (embed_dim, ffn_dim)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers):
        for name, shape in weights.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        for name in ("norm1", "norm2"):
            shapes[f"layers.{layer}.{name}.weight"] = (embed_dim,)
            shapes[f"layers.{layer}.{name}.bias"] = (embed_dim,)
    return shapes


def _check_keys(weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    thetas = {f"layers.{layer}.retention.thetas" for layer in range(_num_layers(weights))}
    unmatched = sorted(weights.keys() - expected.keys() - thetas)
    missing = sorted(expected.keys() - weights.keys())
    if unmatched or missing:
        raise ValueError(
            "load_yet_another_retnet(): the keys of state_dict do not fit a decoder of "
            f"yet-another-retnet; unmatched: {unmatched or 'none'}; missing: {missing or 'none'}."
        )
    first = weights[_ANCHOR]
    for key, shape in expected.items():
        weight = weights[key]
        if weight.shape != shape:
            raise ValueError(
                f"load_yet_another_retnet(): '{key}' has shape {tuple(weight.shape)}; "
                f"beside the other weights it must have {shape}."
            )
        if (weight.dtype, weight.device) != (first.dtype, first.device):
            raise ValueError(
                f"load_yet_another_retnet(): '{key}' is {weight.dtype} on {weight.device} but "
                f"'{_ANCHOR}' is {first.dtype} on {first.device}; all weights must share both."
            )


def _check_thetas(weights: dict[str, Tensor], config: RetNetConfig) -> None:
    """Compare the rotation angles, a buffer there, with ours: they also betray a wrong number of heads."""
    for key in (key for key in weights if key.endswith("retention.thetas")):
        thetas = weights[key]
        if thetas.shape != (config.head_key_dim,):
            raise ValueError(
                f"load_yet_another_retnet(): num_heads is {config.num_heads}, which makes heads of "
                f"{config.head_key_dim} features, but '{key}' has shape {tuple(thetas.shape)}: "
                f"that checkpoint has heads of {thetas.numel()} features."
            )
        ours = rotary_frequencies("retnet", config.head_key_dim).repeat_interleave(2)
        tolerance = max(1e-5, 4 * torch.finfo(thetas.dtype).eps)
        if not torch.allclose(thetas.detach().double().cpu(), ours, rtol=tolerance, atol=0):
            raise ValueError(
                f"load_yet_another_retnet(): '{key}' differs from 10000^-linspace(0, 1, Dk/2), the only "
                "rotation angles that this loader knows."
            )


def _translate(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The weights under our names, the four projections of x as one."""
    ours = {}
    for layer in (f"layers.{n}" for n in range(num_layers)):
        for kind in ("weight", "bias"):
            parts = [weights[f"{layer}.retention.{name}.{kind}"] for name in _FUSED]
            ours[f"{layer}.retention.qkvg_proj.{kind}"] = torch.cat(parts)
            for theirs, name in _RENAMED.items():
                ours[f"{layer}.{name}.{kind}"] = weights[f"{layer}.{theirs}.{kind}"]
    return ours


def _listed(keys: Iterable[str], most: int = 8) -> str:
    names = list(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

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
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor

from retpop.arguments import check_num_heads, check_tensor
from retpop.checkpoints.translation import Table, below, build, count_layers, measure, one_prefix, per_layer
from retpop.config import RetNetConfig
from retpop.layers import RetNetDecoder
from retpop.ops.torch_backend import ACTIVATIONS
from retpop.position import rotary_frequencies

_MODULES = {
    "retention.qkvg_proj": (
        ("retention.q_proj", "retention.k_proj", "retention.v_proj", "retention.g_proj"),
        "EE",
    ),
    "retention.out_proj": (("retention.out_proj",), "EE"),
    "retention_norm": (("norm1",), "E"),
    "feed_forward.in_proj": (("linear1",), "FE"),
    "feed_forward.out_proj": (("linear2",), "EF"),
    "feed_forward_norm": (("norm2",), "E"),
}
LAYER: Table = {
    f"{ours}.{kind}": {f"{name}.{kind}": dims if kind == "weight" else dims[:1] for name in theirs}
    for ours, (theirs, dims) in _MODULES.items()
    for kind in ("weight", "bias")
}
THETAS = r"layers\.\d+\.retention\.thetas"
"""Names of its rotation angles, constants that a state dict may hold."""


def load_yet_another_retnet(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int,
    activation: Literal["silu", "gelu", "relu"] = "silu",
    norm_first: bool = True,
    norm_eps: float = 1e-6,
) -> RetNetDecoder:
    """A `RetNetDecoder` with the weights, and so the outputs, of a `yet_another_retnet` decoder.

    Sizes are read from the weights; settings that the weights do not determine are arguments. The decoder has
    the weights' dtype and device, copies of the weights, no dropout, and is in training mode like any new
    module.

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
    where = "load_yet_another_retnet()"
    prefix = one_prefix(where, state_dict, "layers.0.retention.q_proj.weight")
    if activation not in ACTIVATIONS:
        hint = ' (its "swish" is "silu")' if activation == "swish" else ""
        raise ValueError(
            f"{where}: activation is {activation!r}; it must be one of {tuple(ACTIVATIONS)}{hint}."
        )
    check_num_heads(where, num_heads)
    weights = below(prefix, state_dict)
    thetas = {key: weights.pop(key) for key in list(weights) if re.fullmatch(THETAS, key)}
    num_layers = count_layers(weights)
    table = per_layer(LAYER, num_layers)
    sizes = measure(where, weights, table)
    if sizes["E"] % num_heads:
        raise ValueError(
            f"{where}: num_heads is {num_heads}; it must divide the weights' width, {sizes['E']}."
        )
    config = RetNetConfig(
        embed_dim=sizes["E"],
        num_heads=num_heads,
        num_layers=num_layers,
        ffn_dim=sizes["F"],
        decay="log_spaced",
        position="retnet",
        gate_activation=activation,
        activation=activation,
        norm_eps=norm_eps,
        norm_first=norm_first,
    )
    _check_thetas(thetas, config)
    return cast(RetNetDecoder, build(table, weights, config))


def _check_thetas(angles: dict[str, Tensor], config: RetNetConfig) -> None:
    """Compare its rotation angles, a buffer, with ours; they also reveal a wrong number of heads."""
    for key, thetas in angles.items():
        check_tensor("load_yet_another_retnet()", f"'{key}'", thetas)
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

"""Weights of torchscale's RetNet (PyPI torchscale, MIT; read at version 0.3.0), RetNet's released code.

What it fixes, and where it lands in `RetNetConfig`: decay and rotation of the paper (the defaults), RMSNorm
everywhere, without a weight on the heads' outputs, a feed-forward with a gate, no biases, a final norm.

It divides a head's output before the norm over the head's features takes every factor out again: at token
t by n_t = sqrt(1 + γ + ... + γ^t), and in parallel and chunkwise mode by the sum of the token's scores too
where that is above 1. We divide by nothing. So the norm's epsilon counts n_t² times as much there: an output
whose mean square is m is smaller by the factor sqrt((m + ε) / (m + n_t² ε)). At torchscale's initial weights,
whose outputs are tiny, logits differ by about 1 % (as its chunkwise mode does from its parallel one); the
larger the outputs, the less, and with a small ``layernorm_eps`` not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from retpop.checkpoints.translation import (
    Table,
    below,
    build,
    check_heads,
    count_layers,
    measure,
    one_prefix,
    per_layer,
)
from retpop.config import RetNetConfig
from retpop.decay import retnet_decay
from retpop.layers import RetNetDecoder
from retpop.models import RetNetLM, RetNetLMConfig
from retpop.position import rotary_frequencies

LAYER: Table = {
    "retention.qkvg_proj.weight": {
        "retention.q_proj.weight": "KE",
        "retention.k_proj.weight": "KE",
        "retention.v_proj.weight": "VE",
        "retention.g_proj.weight": "VE",
    },
    "retention.out_proj.weight": {"retention.out_proj.weight": "EV"},
    "retention_norm.weight": {"retention_layer_norm.weight": "E"},
    "feed_forward.in_proj.weight": {"ffn.fc1.weight": "FE", "ffn.gate.weight": "FE"},
    "feed_forward.out_proj.weight": {"ffn.fc2.weight": "EF"},
    "feed_forward_norm.weight": {"final_layer_norm.weight": "E"},
}
FINAL: Table = {"final_norm.weight": {"layer_norm.weight": "E"}}
MODEL: Table = {
    "embedding.weight": {"embed_tokens.weight": "NE"},
    "head.weight": {"output_projection.weight": "NE"},
}
ANGLE, DECAY = "retnet_rel_pos.angle", "retnet_rel_pos.decay"


def load_torchscale(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    activation: Literal["silu", "gelu", "relu"] = "gelu",
    scale_embeddings: bool = False,
    norm_eps: float = 1e-6,
) -> RetNetLM | RetNetDecoder:
    """The model of a torchscale `RetNetDecoder`; the module's docstring says how far its outputs are equal.

    Weights are copied and keep their dtype and device. Not supported, and refused by names that do not fit:
    mixtures of experts, ``layernorm_embedding``, ``multiway``, and norms after a layer, so ``deepnorm`` too.

    Args:
        state_dict: of the decoder, or of a model that holds exactly one; names outside its prefix are not
            read.
        num_heads: its ``decoder_retention_heads``; None: read from the weights.
        activation: its ``activation_fn``; "silu" is what it calls "swish".
        scale_embeddings: the opposite of its ``no_scale_embedding``.
        norm_eps: its ``layernorm_eps``.

    Returns:
        a `RetNetLM` if the weights hold an embedding or an output projection (it needs both), else a
        `RetNetDecoder`.

    Raises:
        TypeError, ValueError: state_dict holds no decoder or several, names are unmatched or missing (all are
            listed), a shape or dtype does not fit, or the decay or the rotation is another one.
    """
    where = "load_torchscale()"
    weights = below(one_prefix(where, state_dict, "layers.0.retention.q_proj.weight"), state_dict)
    whole = any(name in weights for theirs in MODEL.values() for name in theirs)
    num_layers = count_layers(weights)
    table = per_layer(LAYER, num_layers) | FINAL | (MODEL if whole else {})
    sizes = measure(where, weights, table | {"constants": {ANGLE: "D", DECAY: "H"}})
    cfg = RetNetConfig(
        embed_dim=sizes["E"],
        num_heads=check_heads(where, num_heads, sizes["H"]),
        num_layers=num_layers,
        ffn_dim=sizes["F"],
        key_dim=sizes["K"],
        value_dim=sizes["V"],
        head_norm="rmsnorm",
        head_norm_eps=norm_eps,
        norm="rmsnorm",
        norm_eps=norm_eps,
        ffn="glu",
        activation=activation,
        bias=False,
        final_norm=True,
    )
    _check_constants(where, weights, cfg)
    if not whole:
        return build(table, weights, cfg)
    model = RetNetLMConfig(vocab_size=sizes["N"], decoder=cfg, scale_embeddings=scale_embeddings)
    return build(table, weights, cfg, model)


def _check_constants(where: str, weights: Mapping[str, Tensor], cfg: RetNetConfig) -> None:
    """Compare its decay and rotation, which are buffers, with ours."""
    angles = rotary_frequencies("retnet", cfg.head_key_dim).repeat_interleave(2)
    for name, ours in ((DECAY, retnet_decay(cfg.num_heads, dtype=torch.float64)), (ANGLE, angles)):
        theirs = weights[name].detach().double().cpu()
        tolerance = max(1e-4, 4 * torch.finfo(weights[name].dtype).eps)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=tolerance, atol=0):
            raise ValueError(f"{where}: '{name}' is not RetNet's own, the only one that this loader knows.")

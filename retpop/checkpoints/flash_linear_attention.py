"""Weights of flash-linear-attention's RetNet (PyPI flash-linear-attention, MIT; read at version 0.6.0).

What it fixes, and where it lands in `RetNetConfig`: the paper's decay; rotation of pairs half a head apart
(``position="rope"``); RMSNorm everywhere, its weight on the heads' outputs shared by all heads; SiLU; a
feed-forward with a gate; no biases; a final norm. States are equal too: its ``recurrent_state`` of a layer
(B, H, Dk, Dv) is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from retpop.layers import RetNetDecoder
from retpop.models import RetNetLM, RetNetLMConfig

LAYER: Table = {
    "retention.qkvg_proj.weight": {
        "attn.q_proj.weight": "KE",
        "attn.k_proj.weight": "KE",
        "attn.v_proj.weight": "VE",
        "attn.g_proj.weight": "VE",
    },
    "retention.out_proj.weight": {"attn.o_proj.weight": "EV"},
    "retention_norm.weight": {"attn_norm.weight": "E"},
    "feed_forward.in_proj.weight": {"mlp.gate_proj.weight": "FE", "mlp.up_proj.weight": "FE"},
    "feed_forward.out_proj.weight": {"mlp.down_proj.weight": "EF"},
    "feed_forward_norm.weight": {"mlp_norm.weight": "E"},
}
HEAD_NORM: Table = {"retention.head_norm.weight": {"attn.g_norm_swish_gate.weight": "W"}}
FINAL: Table = {"final_norm.weight": {"norm.weight": "E"}}
MODEL: Table = {"embedding.weight": {"embeddings.weight": "NE"}, "head.weight": {"lm_head.weight": "NE"}}

FIXED: dict[str, Any] = {
    "decay": "retnet",
    "learn_decay": False,
    "position": "rope",
    "scale": None,
    "head_norm": "rmsnorm",
    "gate_activation": "silu",
    "norm": "rmsnorm",
    "ffn": "glu",
    "activation": "silu",
    "bias": False,
    "norm_first": True,
    "final_norm": True,
}
"""The settings that all such models share, as fields of `RetNetConfig`."""


def load_fla(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    norm_eps: float = 1e-6,
    tie_embeddings: bool = False,
) -> RetNetLM | RetNetDecoder:
    """The model of flash-linear-attention's `RetNetForCausalLM` or `RetNetModel`: equal outputs and states.

    Weights are copied and keep their dtype and device. Not supported, and refused by names or shapes that do
    not fit: short convolutions, fewer heads of keys than of queries, layers without an output gate or with
    ``fuse_norm=False``, and layers of attention. A feature map is not supported either, and no weight reveals
    it.

    Args:
        state_dict: of such a model, or of one that holds exactly one.
        num_heads: its ``num_heads``; None: read from the weights, which is impossible with
            ``elementwise_affine=False``.
        norm_eps: its ``norm_eps``.
        tie_embeddings: its ``tie_word_embeddings``; the stored weights of a tied model have no head.

    Returns:
        a `RetNetLM` if the weights hold a head or it is tied; else a `RetNetDecoder`, for which an embedding
        is not read.

    Raises:
        TypeError, ValueError: state_dict holds no such model or several, names are unmatched or missing (all
            are listed), a shape or dtype does not fit, or a tied head differs from the embedding.
    """
    where = "load_fla()"
    weights, whole = _weights(where, state_dict, tie_embeddings)
    affine = "layers.0.attn.g_norm_swish_gate.weight" in weights
    num_layers = count_layers(weights)
    table = _table(num_layers, affine) | (MODEL if whole else {})
    sizes = measure(where, weights, table)
    if affine:
        num_heads = check_heads(where, num_heads, sizes["V"] / sizes["W"])
    if num_heads is None:
        raise ValueError(f"{where}: num_heads is None, but it cannot be read from the weights.")
    cfg = RetNetConfig(
        embed_dim=sizes["E"],
        num_heads=num_heads,
        num_layers=num_layers,
        ffn_dim=sizes["F"],
        key_dim=sizes["K"],
        value_dim=sizes["V"],
        head_norm_eps=norm_eps,
        head_norm_affine=affine,
        norm_eps=norm_eps,
        **FIXED,
    )
    for name in weights:
        if name.endswith("g_norm_swish_gate.weight"):
            weights[name] = weights[name].expand(num_heads, -1)
    if not whole:
        return build(table, weights, cfg)
    model = RetNetLMConfig(vocab_size=sizes["N"], decoder=cfg, tie_embeddings=tie_embeddings)
    return build(table, weights, cfg, model)


def _table(num_layers: int, affine: bool) -> Table:
    """Names of a decoder's weights; ``affine``: the head norm has one."""
    return per_layer(LAYER | (HEAD_NORM if affine else {}), num_layers) | FINAL


def _weights(
    where: str, state_dict: Mapping[str, Tensor], tie_embeddings: bool
) -> tuple[dict[str, Tensor], bool]:
    """The weights of the one model in ``state_dict``, and whether it has a head."""
    prefix = one_prefix(where, state_dict, "layers.0.attn.q_proj.weight")
    weights = below(prefix, state_dict)
    head = f"{prefix.removesuffix('model.')}lm_head.weight"
    embedding = weights.get("embeddings.weight")
    if tie_embeddings and embedding is not None:
        weights["lm_head.weight"] = embedding
        if not torch.equal(state_dict.get(head, embedding), embedding):
            raise ValueError(f"{where}: tie_embeddings is True, but '{head}' differs from the embedding.")
    elif head in state_dict:
        weights["lm_head.weight"] = state_dict[head]
    else:
        weights.pop("embeddings.weight", None)
    return weights, "lm_head.weight" in weights


def to_fla(model: RetNetLM) -> dict[str, Tensor]:
    """The weights of a language model under the names of flash-linear-attention's `RetNetForCausalLM`.

    Args:
        model: of a configuration that `load_fla` makes; a head norm's weight must be the same for all heads.

    Returns:
        the tensors for that model's ``load_state_dict``; they share memory with ours.

    Raises:
        ValueError: the configuration or the head norm's weight has no equal there; the message says which.
    """
    where, cfg = "to_fla()", model.cfg.decoder
    wrong = [f"{name}={getattr(cfg, name)!r}" for name, value in FIXED.items() if getattr(cfg, name) != value]
    wrong += [] if cfg.head_norm_eps == cfg.norm_eps else [f"head_norm_eps={cfg.head_norm_eps}"]
    wrong += ["scale_embeddings=True"] if model.cfg.scale_embeddings else []
    if wrong:
        raise ValueError(f"{where}: flash-linear-attention's RetNet has no {', '.join(wrong)}.")
    rows = {
        "K": cfg.num_heads * cfg.head_key_dim,
        "V": cfg.num_heads * cfg.head_value_dim,
        "F": cfg.ffn_dim,
        "E": cfg.embed_dim,
        "N": model.cfg.vocab_size,
        "W": cfg.head_value_dim,
    }
    found: dict[str, Tensor] = {}
    for ours, theirs in (_table(cfg.num_layers, cfg.head_norm_affine) | MODEL).items():
        weight = model.get_parameter(ours if ours in MODEL else f"decoder.{ours}").detach()
        if ours.endswith("head_norm.weight"):
            if not (weight == weight[0]).all():
                raise ValueError(f"{where}: '{ours}' differs between heads; one weight for all is needed.")
            weight = weight[0]
        found |= dict(zip(theirs, weight.split([rows[dims[0]] for dims in theirs.values()]), strict=True))
    return {name if name == "lm_head.weight" else f"model.{name}": weight for name, weight in found.items()}

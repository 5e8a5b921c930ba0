"""The configuration of a retention layer or decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from retpop.arguments import check_chunk_size
from retpop.decay import SCHEDULES
from retpop.position import KINDS

_CHOICES = {
    "head_norm": ("groupnorm", "rmsnorm"),
    "gate_activation": ("silu", "gelu", "relu"),
    "norm": ("layernorm", "rmsnorm"),
    "ffn": ("mlp", "glu"),
    "activation": ("silu", "gelu", "relu"),
}
_POSITIVE_INTS = ("embed_dim", "num_heads", "num_layers", "ffn_dim", "key_dim", "value_dim")
_BOOLS = ("head_norm_affine", "bias", "norm_first", "final_norm")


@dataclass(frozen=True, kw_only=True)
class RetNetConfig:
    """Everything that shapes a `MultiScaleRetention` layer or a `RetNetDecoder`; checked once, here.

    Attributes:
        embed_dim: width E of the residual stream.
        num_heads: retention heads H.
        num_layers: layers of a decoder.
        ffn_dim: hidden width of the feed-forward layers.
        key_dim: width of queries and keys over all heads; None: embed_dim. Divisible by num_heads.
        value_dim: width of values and gate over all heads; None: embed_dim. Divisible by num_heads.
        decay: "retnet" (γ = 1 - 2^(-5-h)), "log_spaced" (time scales from 32 to 512 tokens), or num_heads
            log-decays, each at most 0.
        position: rotary positions, "retnet" or "rope" (see `retpop.position`), or None.
        scale: factor on the retention output; None: (key_dim / num_heads)^-0.5.
        head_norm: normalisation of each head's output: "groupnorm" (mean and variance) or "rmsnorm".
        head_norm_eps: its epsilon.
        head_norm_affine: whether it has a learned weight (and, for "groupnorm", bias) per value feature.
        gate_activation: activation of the output gate, "silu", "gelu" or "relu".
        norm: normalisation of the residual stream, "layernorm" or "rmsnorm".
        norm_eps: its epsilon.
        ffn: "mlp" (linear, activation, linear) or "glu" (linear, activation times linear, linear).
        activation: activation of the feed-forward layers, "silu", "gelu" or "relu".
        bias: whether linear layers and layer norms have biases.
        dropout: probability at four places: on the retention output before the head norm, after the output
            projection, in the feed-forward's hidden layer and after the feed-forward.
        norm_first: True: x + f(norm(x)); False: x + norm(f(x)).
        final_norm: whether a decoder ends with a normalisation.
        chunk_size: tokens in a chunk of the chunkwise mode, a power of two, at least 16.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range; the message names it.
    """

    embed_dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    key_dim: int | None = None
    value_dim: int | None = None
    decay: Literal["retnet", "log_spaced"] | tuple[float, ...] = "retnet"
    position: Literal["retnet", "rope"] | None = "retnet"
    scale: float | None = None
    head_norm: Literal["groupnorm", "rmsnorm"] = "groupnorm"
    head_norm_eps: float = 1e-6
    head_norm_affine: bool = False
    gate_activation: Literal["silu", "gelu", "relu"] = "silu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6
    ffn: Literal["mlp", "glu"] = "mlp"
    activation: Literal["silu", "gelu", "relu"] = "silu"
    bias: bool = True
    dropout: float = 0.0
    norm_first: bool = True
    final_norm: bool = False
    chunk_size: int = 64

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._check_decay()

    @property
    def head_key_dim(self) -> int:
        """Dk: features of one head's queries and keys."""
        return (self.key_dim or self.embed_dim) // self.num_heads

    @property
    def head_value_dim(self) -> int:
        """Dv: features of one head's values."""
        return (self.value_dim or self.embed_dim) // self.num_heads

    def _check_numbers(self) -> None:
        for name in _POSITIVE_INTS:
            value = getattr(self, name)
            if value is None and name in ("key_dim", "value_dim"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"RetNetConfig: {name} is {value!r}; it must be an int.")
            if value < 1:
                raise ValueError(f"RetNetConfig: {name} is {value}; it must be at least 1.")
        for name in ("key_dim", "value_dim"):
            given = getattr(self, name)
            if (given or self.embed_dim) % self.num_heads:
                named = f"{name} is {given}" if given else f"embed_dim (for {name}=None) is {self.embed_dim}"
                raise ValueError(f"RetNetConfig: {named}, which num_heads {self.num_heads} does not divide.")
        if self.position is not None and self.head_key_dim % 2:
            raise ValueError(
                f"RetNetConfig: a head has {self.head_key_dim} key features (key_dim over num_heads); "
                "rotary positions need an even number, or position=None."
            )
        check_chunk_size("RetNetConfig", self.chunk_size)
        for name in ("head_norm_eps", "norm_eps", "dropout"):
            self._check_real(name)
        if self.scale is not None:
            self._check_real("scale")
        for name in ("head_norm_eps", "norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"RetNetConfig: {name} is {getattr(self, name)}; it must be at least 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"RetNetConfig: dropout is {self.dropout}; it must be at least 0 and below 1.")

    def _check_real(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"RetNetConfig: {name} is {value!r}; it must be a number.")
        if not math.isfinite(value):
            raise ValueError(f"RetNetConfig: {name} is {value}; it must be finite.")

    def _check_choices(self) -> None:
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"RetNetConfig: {name} is {getattr(self, name)!r}; it must be True or False.")
        for name, choices in (*_CHOICES.items(), ("position", (*KINDS, None))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"RetNetConfig: {name} is {getattr(self, name)!r}; it must be one of {choices}."
                )

    def _check_decay(self) -> None:
        if isinstance(self.decay, str):
            if self.decay not in SCHEDULES:
                raise ValueError(
                    f"RetNetConfig: decay is {self.decay!r}; it must be one of {SCHEDULES} "
                    "or a tuple of num_heads log-decays."
                )
            return
        if not isinstance(self.decay, tuple) or not all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in self.decay
        ):
            raise TypeError(
                f"RetNetConfig: decay is {self.decay!r}; it must be one of {SCHEDULES} "
                "or a tuple of num_heads log-decays."
            )
        if len(self.decay) != self.num_heads:
            raise ValueError(
                f"RetNetConfig: decay has {len(self.decay)} log-decays but num_heads is {self.num_heads}."
            )
        for value in self.decay:
            if not value <= 0:  # also catches NaN
                raise ValueError(f"RetNetConfig: decay holds {value}; a log-decay must be at most 0.")

    def describe(self) -> str:
        """The fields that differ from their defaults, as ``name=value`` pairs."""
        shown = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                shown.append(f"{entry.name}={value!r}")
        return ", ".join(shown)

"""The configuration of a retention layer or decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from retpop.arguments import as_float, as_int, check_chunk_size, check_mapping
from retpop.decay import SCHEDULES, check_log_decays, log_spaced_decay, retnet_decay
from retpop.position import KINDS

_CHOICES = {
    "head_norm": ("groupnorm", "rmsnorm"),
    "gate_activation": ("silu", "gelu", "relu"),
    "norm": ("layernorm", "rmsnorm"),
    "ffn": ("mlp", "glu"),
    "activation": ("silu", "gelu", "relu"),
}
VERSION = 1
"""Version of what `RetNetConfig.to_dict` writes; it changes when a field changes its meaning."""

_POSITIVE_INTS = ("embed_dim", "num_heads", "num_layers", "ffn_dim", "key_dim", "value_dim")
_BOOLS = ("learn_decay", "head_norm_affine", "bias", "norm_first", "final_norm")


@dataclass(frozen=True, kw_only=True)
class RetNetConfig:
    """The configuration of a `MultiScaleRetention` layer or a `RetNetDecoder`, checked when it is made.

    Attributes:
        embed_dim: width E of the residual stream.
        num_heads: retention heads H.
        num_layers: layers of a decoder.
        ffn_dim: hidden width of the feed-forward layers; None: 4 x embed_dim.
        key_dim: width of queries and keys over all heads; None: embed_dim. Divisible by num_heads.
        value_dim: width of values and gate over all heads; None: embed_dim. Divisible by num_heads.
        decay: "retnet" (γ = 1 - 2^(-5-h)), "log_spaced" (time scales from 32 to 512 tokens), num_heads
            log-decays, each at most 0, or num_layers tuples of them, one for each layer.
        learn_decay: whether each layer learns its log-decays. They start at those of ``decay``, which must
            then be finite and below 0.
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
    num_layers: int = 1
    ffn_dim: int = None  # type: ignore[assignment]  # an int once the object is made
    key_dim: int | None = None
    value_dim: int | None = None
    decay: Literal["retnet", "log_spaced"] | tuple[float, ...] | tuple[tuple[float, ...], ...] = "retnet"
    learn_decay: bool = False
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
        for name in _POSITIVE_INTS:
            self._take_positive_int(name)
        for name in ("head_norm_eps", "norm_eps", "dropout", "scale"):
            self._take_real(name)
        self._check_ranges()
        self._check_choices()
        if not isinstance(self.decay, str):
            self._take_decay()
            self._check_learned()

    @property
    def head_key_dim(self) -> int:
        """Dk: features of one head's queries and keys."""
        return (self.key_dim or self.embed_dim) // self.num_heads

    @property
    def head_value_dim(self) -> int:
        """Dv: features of one head's values."""
        return (self.value_dim or self.embed_dim) // self.num_heads

    def log_decays(self, layer: int = 0) -> tuple[float, ...]:
        """ln γ of each head of a layer, in double precision."""
        if self.decay == "retnet":
            return tuple(retnet_decay(self.num_heads, dtype=torch.float64).tolist())
        if self.decay == "log_spaced":
            return tuple(log_spaced_decay(self.num_heads, dtype=torch.float64).tolist())
        return self.decay[layer] if isinstance(self.decay[0], tuple) else self.decay

    def to_dict(self) -> dict[str, Any]:
        """The fields and the version of their meaning, as JSON data for `from_dict`."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> RetNetConfig:
        """The config from a ``to_dict()``, which may have passed through JSON.

        Raises:
            TypeError, ValueError: another version wrote it, or a field is unknown or out of range.
        """
        check_mapping("RetNetConfig.from_dict()", "saved", saved)
        values = dict(saved)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise ValueError(f"RetNetConfig.from_dict(): version is {version!r}; it must be {VERSION}.")
        return cls(**values)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _take_positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name == "ffn_dim":
            value = 4 * self.embed_dim
        if value is None and name in ("key_dim", "value_dim"):
            return
        self._set(name, as_int("RetNetConfig", name, value))
        if getattr(self, name) < 1:
            raise ValueError(f"RetNetConfig: {name} is {value}; it must be at least 1.")

    def _take_real(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name == "scale":
            return
        self._set(name, as_float("RetNetConfig", name, value))
        if not math.isfinite(value):
            raise ValueError(f"RetNetConfig: {name} is {value}; it must be finite.")

    def _check_ranges(self) -> None:
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
        self._set("chunk_size", int(self.chunk_size))
        for name in ("head_norm_eps", "norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"RetNetConfig: {name} is {getattr(self, name)}; it must be at least 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"RetNetConfig: dropout is {self.dropout}; it must be at least 0 and below 1.")

    def _check_choices(self) -> None:
        if isinstance(self.decay, str) and self.decay not in SCHEDULES:
            raise ValueError(
                f"RetNetConfig: decay is {self.decay!r}; it must be one of {SCHEDULES} "
                "or num_heads log-decays."
            )
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"RetNetConfig: {name} is {getattr(self, name)!r}; it must be True or False.")
        for name, choices in (*_CHOICES.items(), ("position", (*KINDS, None))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"RetNetConfig: {name} is {getattr(self, name)!r}; it must be one of {choices}."
                )

    def _take_decay(self) -> None:
        """One set of log-decays or one per layer; lists from JSON become tuples."""
        given = self.decay
        if not isinstance(given, list | tuple) or not given:
            raise TypeError(
                f"RetNetConfig: decay is {given!r}; it must be one of {SCHEDULES}, "
                "num_heads log-decays, or num_layers tuples of them."
            )
        if not isinstance(given[0], list | tuple):
            self._set("decay", check_log_decays("RetNetConfig", "decay", given, self.num_heads))
            return
        if len(given) != self.num_layers:
            raise ValueError(
                f"RetNetConfig: decay has {len(given)} sets of log-decays but num_layers is "
                f"{self.num_layers}."
            )
        sets = [check_log_decays("RetNetConfig", "decay", own, self.num_heads) for own in given]
        self._set("decay", tuple(sets))

    def _check_learned(self) -> None:
        """A learned decay cannot reach γ = 0 or γ = 1, so it cannot start there either."""
        for layer in range(self.num_layers if self.learn_decay else 0):
            for value in self.log_decays(layer):
                if not -math.inf < value < 0:
                    raise ValueError(
                        f"RetNetConfig: decay holds {value}; with learn_decay=True log-decays must be finite "
                        "and below 0."
                    )

    def describe(self) -> str:
        """The fields that differ from their defaults, as ``name=value`` pairs."""
        shown = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                shown.append(f"{entry.name}={value!r}")
        return ", ".join(shown)


torch.serialization.add_safe_globals([RetNetConfig])

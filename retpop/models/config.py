"""The configuration of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from retpop.arguments import as_int, check_mapping
from retpop.config import RetNetConfig

MODEL_TYPE = "retpop"


@dataclass(frozen=True, kw_only=True)
class RetNetLMConfig:
    """The configuration of a `RetNetLM`, checked when it is made.

    Attributes:
        vocab_size: number of tokens V.
        decoder: the decoder's configuration; ``final_norm=True`` is usual.
        tie_embeddings: whether the head's weight is the embedding's.
        scale_embeddings: whether embeddings are multiplied by sqrt(E), as in the Transformer
            (arXiv 1706.03762, section 3.4).

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range; the message names it.
    """

    vocab_size: int
    decoder: RetNetConfig
    tie_embeddings: bool = False
    scale_embeddings: bool = False

    def __post_init__(self) -> None:
        vocab_size = as_int("RetNetLMConfig", "vocab_size", self.vocab_size)
        object.__setattr__(self, "vocab_size", vocab_size)  # the dataclass is frozen
        if self.vocab_size < 1:
            raise ValueError(f"RetNetLMConfig: vocab_size is {self.vocab_size}; it must be at least 1.")
        if not isinstance(self.decoder, RetNetConfig):
            raise TypeError(f"RetNetLMConfig: decoder is {self.decoder!r}; it must be a RetNetConfig.")
        for name in ("tie_embeddings", "scale_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"RetNetLMConfig: {name} is {getattr(self, name)!r}; it must be True or False."
                )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON data for `from_dict`; ``model_type`` identifies it."""
        return {"model_type": MODEL_TYPE, **asdict(self), "decoder": self.decoder.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RetNetLMConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            TypeError, ValueError: a key is unknown or missing, or ``model_type`` is another model's.
        """
        check_mapping("RetNetLMConfig.from_dict()", "values", values)
        values = dict(values)
        model_type = values.pop("model_type", None)
        if model_type != MODEL_TYPE:
            raise ValueError(f"RetNetLMConfig: model_type is {model_type!r}; it must be {MODEL_TYPE!r}.")
        names = {field.name for field in fields(cls)}
        unknown, missing = sorted(values.keys() - names), sorted({"vocab_size", "decoder"} - values.keys())
        if unknown or missing:
            raise ValueError(
                f"RetNetLMConfig: unknown keys: {unknown or 'none'}; missing: {missing or 'none'}."
            )
        return cls(decoder=RetNetConfig.from_dict(values.pop("decoder")), **values)

"""The language model inside Hugging Face's transformers: importing this module registers it there.

``AutoModelForCausalLM.from_pretrained(folder)`` then reads a folder that `RetNetLM.save_pretrained` wrote,
and ``generate``, ``Trainer``, ``pipeline`` and PEFT accept the model like any other. Its ``model`` is the
`RetNetLM`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from retpop.layers import MultiScaleRetention
from retpop.layers.decoder import FeedForward
from retpop.models import RetNetLM, RetNetLMConfig
from retpop.models.config import MODEL_TYPE
from retpop.packing import pack_padded, pad_packed
from retpop.state import RetNetState

INITIALISED_BY_US = (RetNetLM, MultiScaleRetention, FeedForward, nn.LayerNorm, nn.RMSNorm)


class RetNetForCausalLMConfig(PreTrainedConfig):
    """`RetNetLMConfig` as a configuration of transformers: the same fields, the decoder's as a dictionary.

    Args:
        vocab_size: number of tokens V.
        decoder: the fields of a `RetNetConfig`; None: those of a small decoder.
        scale_embeddings: as in `RetNetLMConfig`.
        tie_embeddings: as there; ``tie_word_embeddings`` is the same.
        options: those of every configuration of transformers.
    """

    model_type = MODEL_TYPE
    attribute_map = {"tie_word_embeddings": "tie_embeddings"}  # noqa: RUF012  # as its base class has them
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 256,
        decoder: dict[str, Any] | None = None,
        scale_embeddings: bool = False,
        tie_embeddings: bool = False,
        **options: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.decoder = decoder or {"embed_dim": 64, "num_heads": 4, "num_layers": 2, "ffn_dim": 256}
        self.scale_embeddings = scale_embeddings
        self.tie_embeddings = tie_embeddings
        super().__init__(**options)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return this configuration; transformers would mistake ``decoder`` for the one it looks for."""
        return self

    def language_model(self) -> RetNetLMConfig:
        """The configuration of the `RetNetLM` itself."""
        names = ("model_type", "vocab_size", "decoder", "scale_embeddings", "tie_embeddings")
        return RetNetLMConfig.from_dict({name: getattr(self, name) for name in names})


class StateCache:
    """A `RetNetState` in place of a cache of keys and values; its size does not grow with the tokens read."""

    is_compileable = False
    is_linear = (False,)
    """True: transformers then passes only tokens that the cache has not read, by the count it keeps."""

    def __init__(self, state: RetNetState) -> None:
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The largest number of tokens that a row has read."""
        return int(self.state.position.max())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the state of the beam that it continues; ``beam_idx`` is (B,)."""
        self.state = self.state.select(beam_idx)


class RetNetForCausalLM(PreTrainedModel, GenerationMixin):
    """`RetNetLM` behind the interface of transformers' causal language models."""

    config_class = RetNetForCausalLMConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True  # so Trainer passes num_items_in_batch
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["RetNetBlock"]  # noqa: RUF012  # as its base class has them
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: RetNetForCausalLMConfig) -> None:
        super().__init__(config)
        self.model = RetNetLM(config.language_model())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Run a batch.

        Args:
            input_ids: (B, T).
            attention_mask: (B, at least T), 0 for padding on any side; the last T columns count.
            cache: the cache after the tokens before; None for the start of a sequence.
            labels: (B, T), the tokens themselves, -100 where none counts; label t + 1 is the target of logits
                t.
            use_cache: whether to return the cache after the last token; None: only outside training.
            logits_to_keep: how many of the last tokens get logits; 0: all.
            num_items_in_batch: the divisor of the summed loss; None: the number of tokens that count.
            return_dict: False for a tuple.
            inputs_embeds: (B, T, E), used in place of the embeddings of input_ids.
            output_attentions, output_hidden_states: not supported; accepted because wrappers pass them as
                False.

        Returns:
            loss, logits (B, T, V) and cache, as transformers has them.

        Raises:
            ValueError: an unsupported output is requested, or not exactly one of input_ids and inputs_embeds
                is given.
        """
        if output_attentions or output_hidden_states:
            raise ValueError(
                "RetNetForCausalLM: output_attentions and output_hidden_states must be False: not supported."
            )
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("RetNetForCausalLM: exactly one of input_ids and inputs_embeds must be given.")
        logits, state = self._logits(tokens, attention_mask, cache, last=logits_to_keep == 1)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        keep_state = not self.training if use_cache is None else use_cache
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits[:, -logits_to_keep:], cache=StateCache(state) if keep_state else None
        )
        return output if return_dict is not False else output.to_tuple()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed for backward; transformers' switches set it."""
        return self.model.decoder.checkpoint_activations

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.decoder.checkpoint_activations = value

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding in its place."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another head in its place."""
        self.model.head = new_embeddings

    def _logits(
        self, tokens: Tensor, attention_mask: Tensor | None, cache: StateCache | None, *, last: bool
    ) -> tuple[Tensor, RetNetState]:
        """Logits (B, T, V), or (B, 1, V) of each row's last token, and the state."""
        state = None if cache is None else cache.state
        wanted = "last" if last else "all"
        mask = None if attention_mask is None else attention_mask[:, -tokens.shape[1] :].bool()
        if mask is None or mask.all():
            logits, state = self.model(tokens, state, logits=wanted)
            return logits.unsqueeze(1) if last else logits, state
        packed = pack_padded(tokens, mask=mask)
        logits, state = self.model(packed.data, state, cu_seqlens=packed.cu_seqlens, logits=wanted)
        return logits.unsqueeze(1) if last else pad_packed(packed.replace(logits)), state

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module's weights as `RetNetLM` does, unless a checkpoint held all of them."""
        loaded = all(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters())
        if isinstance(module, INITIALISED_BY_US) and not loaded:
            module.reset_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


AutoConfig.register(MODEL_TYPE, RetNetForCausalLMConfig, exist_ok=True)
AutoModelForCausalLM.register(RetNetForCausalLMConfig, RetNetForCausalLM, exist_ok=True)

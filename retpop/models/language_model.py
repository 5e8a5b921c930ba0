"""A RetNet language model: embedding, decoder, head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from retpop.arguments import check_tensor, values_are_free
from retpop.layers import RetNetDecoder
from retpop.models.config import RetNetLMConfig
from retpop.models.generation import generate, stream
from retpop.models.loss import IGNORED, chunked_cross_entropy
from retpop.models.pretrained import from_pretrained, save_pretrained
from retpop.state import RetNetState


class RetNetLM(nn.Module):
    """A language model over tokens 0 to V - 1: ``head(decoder(embedding(tokens)))``.

    Embedding and head start normal with standard deviation E^-0.5, as RetNet's released code (torchscale)
    initialises its head; `RetNetDecoder` says how the decoder starts.

    Args:
        cfg: the configuration.
        device, dtype: of the weights.

    Example:
        >>> decoder = RetNetConfig(embed_dim=64, num_heads=4, num_layers=2, ffn_dim=256, final_norm=True)
        >>> model = RetNetLM(RetNetLMConfig(vocab_size=256, decoder=decoder, tie_embeddings=True))
        >>> text = torch.tensor([list(b"to be or not to be")])
        >>> loss, state = model(text[:, :-1], targets=text[:, 1:])
        >>> more = model.generate([b"to be", b"or not"], max_new_tokens=20, temperature=0.8)

    Source: RetNet, arXiv 2307.08621, section 2.
    """

    def __init__(
        self,
        cfg: RetNetLMConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cfg, RetNetLMConfig):
            raise TypeError(f"RetNetLM: cfg is {type(cfg).__name__}; it must be a RetNetLMConfig.")
        self.cfg = cfg
        width = cfg.decoder.embed_dim
        self.embedding = nn.Embedding(cfg.vocab_size, width, device=device, dtype=dtype)
        self.decoder = RetNetDecoder(cfg.decoder, device, dtype)
        self.head = nn.Linear(width, cfg.vocab_size, bias=False, device=device, dtype=dtype)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights of embedding and head (see the class)."""
        std = self.cfg.decoder.embed_dim**-0.5
        nn.init.normal_(self.embedding.weight, std=std)
        if not self.cfg.tie_embeddings:
            nn.init.normal_(self.head.weight, std=std)

    def forward(
        self,
        tokens: Tensor,
        state: RetNetState | None = None,
        *,
        targets: Tensor | None = None,
        logits: str = "all",
        mode: str = "chunkwise",
        chunk_size: int | None = None,
        cu_seqlens: Tensor | None = None,
        reset: Tensor | None = None,
        context_parallel: object = None,
        backend: str = "auto",
    ) -> tuple[Tensor, RetNetState]:
        """Logits of the tokens that follow, or their loss.

        Args:
            tokens: (B, T), int32 or int64; or (B, T, E), vectors in place of the embedding's.
            state: carried from what came before; None for the start of a sequence.
            targets: (B, T), int64: the token that follows each token, -100 where none counts. The loss is
                computed some tokens at a time and never holds all logits.
            logits: the tokens whose logits are returned: "all", or "last", the last one of each sequence.
            mode, chunk_size, cu_seqlens, reset, context_parallel, backend: as in `RetNetDecoder`.
                With context_parallel, logits and loss are those of this rank's slice, and ``logits="last"``
                together with cu_seqlens raises.

        Returns:
            logits (B, T, V), or (B, V) with ``logits="last"`` ((S, V) for S packed sequences), or, with
            targets, the mean cross-entropy in nats, a scalar; and the state after the last token.

        Raises:
            TypeError, ValueError: tokens, targets or logits do not fit; and as `RetNetDecoder`.
        """
        check_tensor("RetNetLM()", "tokens", tokens)
        if not (tokens.is_floating_point() and tokens.dim() == 3):  # the decoder checks vectors
            check_tokens("RetNetLM()", "tokens", tokens, self.cfg.vocab_size)
        self._check_call(tokens, targets, logits, cu_seqlens)
        if logits == "last" and cu_seqlens is not None and context_parallel is not None:
            raise ValueError(
                'RetNetLM(): logits is "last" with cu_seqlens and context_parallel; it must be "all": '
                "a sequence's last token may be on another rank."
            )
        hidden, state = self.decoder(
            self._embed(tokens),
            state,
            mode=mode,
            chunk_size=chunk_size,
            cu_seqlens=cu_seqlens,
            reset=reset,
            context_parallel=context_parallel,
            backend=backend,
        )
        if targets is not None:
            pairs = hidden.flatten(0, 1), targets.flatten()
            return chunked_cross_entropy(self.head, *pairs, self.cfg.vocab_size), state
        if logits == "last":
            hidden = hidden[:, -1] if cu_seqlens is None else hidden[0, cu_seqlens[1:] - 1]
        return self.head(hidden), state

    generate = generate
    stream = stream
    save_pretrained = save_pretrained
    from_pretrained = classmethod(from_pretrained)

    def extra_repr(self) -> str:
        """Whether embeddings are tied and scaled, for ``print(model)``."""
        return f"tie_embeddings={self.cfg.tie_embeddings}, scale_embeddings={self.cfg.scale_embeddings}"

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded = tokens if tokens.is_floating_point() else self.embedding(tokens)
        return embedded * math.sqrt(self.cfg.decoder.embed_dim) if self.cfg.scale_embeddings else embedded

    def _check_call(
        self, tokens: Tensor, targets: Tensor | None, logits: str, cu_seqlens: Tensor | None
    ) -> None:
        """Raise unless targets and the choice of logits fit ``tokens``."""
        if logits not in ("all", "last"):
            raise ValueError(f'RetNetLM(): logits is {logits!r}; it must be "all" or "last".')
        if logits == "last":
            if targets is not None:
                raise ValueError('RetNetLM(): logits is "last" but targets ask for the loss of all tokens.')
            no_last = tokens.shape[1] == 0
            if cu_seqlens is not None and values_are_free(cu_seqlens):
                no_last = bool((cu_seqlens.diff() == 0).any())
            if no_last:
                raise ValueError('RetNetLM(): logits is "last" but a sequence has no tokens.')
        if targets is not None:
            check_tokens("RetNetLM()", "targets", targets, self.cfg.vocab_size, IGNORED)
            if targets.shape != tokens.shape[:2]:
                raise ValueError(
                    f"RetNetLM(): targets has shape {tuple(targets.shape)}; "
                    f"it must have that of tokens, {tuple(tokens.shape[:2])}."
                )


def check_tokens(where: str, name: str, tokens: object, vocab_size: int, ignored: int | None = None) -> None:
    """Raise unless ``tokens`` is (B, T) of integers below ``vocab_size``, or equal to ``ignored``."""
    check_tensor(where, name, tokens)
    assert isinstance(tokens, Tensor)
    dtypes = (torch.int64,) if ignored is not None else (torch.int32, torch.int64)
    if tokens.dtype not in dtypes:
        raise TypeError(f"{where}: {name} is {tokens.dtype}; it must be one of {dtypes}.")
    if tokens.dim() != 2:
        raise ValueError(f"{where}: {name} has shape {tuple(tokens.shape)}; it must be (B, T).")
    if not values_are_free(tokens):
        return
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if ignored is not None:
        wrong &= tokens != ignored
    if wrong.any():
        raise ValueError(
            f"{where}: {name} holds {tokens[wrong][0].item()}; each must be from 0 to {vocab_size - 1}."
        )

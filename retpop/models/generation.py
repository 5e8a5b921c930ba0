"""Text generation: one packed pass over prompts of different lengths, then one token per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from retpop.arguments import as_float, as_int, as_ints
from retpop.state import RetNetState

if TYPE_CHECKING:
    from retpop.models.language_model import RetNetLM

Prompts: TypeAlias = Tensor | Sequence[Tensor | Sequence[int]]


class GenerationStep(NamedTuple):
    """One new token for every row.

    Attributes:
        tokens: (B,), int64; a row that has ended gets ``eos`` again.
        ended: (B,), bool, whether the row has ended, with this token or before.
        state: the state before ``tokens``; ``model(tokens[:, None], state)`` continues from it, any number of
            times.
    """

    tokens: Tensor
    ended: Tensor
    state: RetNetState


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How `generate` draws a token from logits."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        where = "generate()"
        if not 0 <= as_float(where, "temperature", self.temperature) < math.inf:
            raise ValueError(
                f"generate(): temperature is {self.temperature}; it must be finite and at least 0 (greedy)."
            )
        if self.top_k is not None and as_int(where, "top_k", self.top_k) < 1:
            raise ValueError(f"generate(): top_k is {self.top_k}; it must be at least 1.")
        if self.top_p is not None and not 0 < as_float(where, "top_p", self.top_p) <= 1:
            raise ValueError(f"generate(): top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not isinstance(self.generator, torch.Generator | None):
            raise TypeError(f"generate(): generator is {self.generator!r}; it must be a torch.Generator.")

    def draw(self, logits: Tensor) -> Tensor:
        """A token for every row of logits (B, V): (B,), int64."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p is not None:
            probabilities = _nucleus(probabilities, self.top_p)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)


def generate(
    model: RetNetLM,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    generator: torch.Generator | None = None,
    state: RetNetState | None = None,
    mode: str = "chunkwise",
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """Continue prompts, without gradients; call ``model.eval()`` first if it has dropout.

    Args:
        model: the language model.
        prompts: B prompts of at least one token: a tensor (B, T), or a list of 1-D tensors or lists of ints
            of any lengths, which are read in one packed pass.
        max_new_tokens: tokens to add at most, at least 1.
        temperature: the divisor of the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens whose probabilities first sum to p only.
        eos: the token that ends a row; None: no token does.
        generator: of the random numbers; None: torch's own.
        state: carried from what came before the prompts, one row a prompt.
        mode, backend: of the pass over the prompts; as in `RetNetDecoder`.

    Returns:
        prompts with their continuations. For a tensor (B, T + n), n the most that a row needed; rows that end
        earlier are filled with ``eos``. For a list, a list of 1-D tensors, each up to its ``eos`` inclusive.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: top-p (nucleus) sampling: arXiv 1904.09751.
    """
    steps = stream(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos=eos,
        generator=generator,
        state=state,
        mode=mode,
        backend=backend,
    )
    new = torch.stack([step.tokens for step in steps], dim=1)
    if isinstance(prompts, Tensor):
        return torch.cat((prompts.to(new), new), dim=1)
    return [
        torch.cat((_as_tokens(prompt, new.device), _until(row, eos)))
        for prompt, row in zip(prompts, new, strict=True)
    ]


def stream(
    model: RetNetLM,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    generator: torch.Generator | None = None,
    state: RetNetState | None = None,
    mode: str = "chunkwise",
    backend: str = "auto",
) -> Iterator[GenerationStep]:
    """Continue prompts one token at a time; arguments and errors as `generate`.

    Returns:
        an iterator over at most ``max_new_tokens`` steps, fewer if all rows end. A row that has ended
        continues with ``eos`` as its token.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    max_new_tokens = as_int("generate()", "max_new_tokens", max_new_tokens)
    if max_new_tokens < 1:
        raise ValueError(f"generate(): max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if eos is not None and not 0 <= as_int("generate()", "eos", eos) < model.cfg.vocab_size:
        raise ValueError(f"generate(): eos is {eos}; it must be from 0 to {model.cfg.vocab_size - 1}.")
    tokens, cu_seqlens = _rows(prompts, model.embedding.weight.device)
    step = partial(model, logits="last", backend=backend)
    read = partial(step, tokens, state, mode=mode, cu_seqlens=cu_seqlens)
    return _steps(read, partial(step, mode="recurrent"), sampling, max_new_tokens, eos)


@torch.no_grad()
def _steps(
    read: Callable[[], tuple[Tensor, RetNetState]],
    step: Callable[[Tensor, RetNetState], tuple[Tensor, RetNetState]],
    sampling: Sampling,
    max_new_tokens: int,
    eos: int | None,
) -> Iterator[GenerationStep]:
    """Read the prompts, then alternate: draw a token, and run the model on it."""
    logits, state = read()
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for remaining in reversed(range(max_new_tokens)):
        new = sampling.draw(logits)
        if eos is not None:
            new = new.masked_fill(ended, eos)
            ended = ended | (new == eos)
        yield GenerationStep(new, ended, state)
        if remaining == 0 or (eos is not None and ended.all()):
            return
        logits, state = step(new[:, None], state)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities (B, V) with 0 for all but the likeliest tokens that first sum to ``top_p``."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before >= top_p, 0)
    return torch.zeros_like(probabilities).scatter(1, order, ordered)


def _rows(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as tokens for the model: (B, T), or (1, ΣT) and the boundaries."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.shape[1] == 0:
            raise ValueError(
                f"generate(): prompts has shape {tuple(prompts.shape)}; it must be (B, T) with T at least 1."
            )
        return prompts.to(device), None
    if not isinstance(prompts, Iterable):
        raise TypeError(f"generate(): prompts is {prompts!r}; it must be a tensor or a list of prompts.")
    rows = [_as_tokens(prompt, device) for prompt in prompts]
    lengths = [len(row) for row in rows]
    if not rows or 0 in lengths:
        raise ValueError(
            f"generate(): prompts have lengths {lengths}; at least one, and none empty, is needed."
        )
    bounds = torch.tensor([0, *lengths], device=device).cumsum(dim=0)
    return torch.cat(rows).unsqueeze(0), bounds


def _as_tokens(prompt: Tensor | Sequence[int], device: torch.device) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1:
            raise ValueError(f"generate(): a prompt has shape {tuple(prompt.shape)}; it must be (T,).")
        return prompt.to(device)
    return torch.tensor(as_ints("generate()", "a prompt", prompt), dtype=torch.int64, device=device)


def _until(row: Tensor, eos: int | None) -> Tensor:
    """The tokens (n,) up to the first ``eos`` inclusive."""
    if eos is None or not (row == eos).any():
        return row
    return row[: int((row == eos).int().argmax()) + 1]

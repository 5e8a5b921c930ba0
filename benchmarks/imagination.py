"""Imagining observations: a step of REM's decoder beside models that write token by token.

Shapes: "rem_8" and "rem_64" are steps of the decoder at those batches, from a state after 5 blocks: take in a
block, predict the next. "tokens" is a series over the K tokens of an observation. Contenders that write token
by token read the K tokens of an observation and an action one after another, as if they drew each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import decoder
from benchmarks.work import DTYPES, FORWARD, Contender, Group, Problem, Work, ours, product_flops

PAST_BLOCKS = 5
"""Blocks that a model remembers: the middle of a sequence of 10."""

TOKENS = (16, 64, 256)


def step_sizes(batch: int, tokens: int, **model: int) -> decoder.Sizes:
    """A step at a batch, for observations of so many tokens."""
    block = tokens + 1
    return decoder.Sizes(B=batch, N=1, L=block, M=tokens, offset=1, past=PAST_BLOCKS * block, **model)


SHAPES = {"tiny": step_sizes(1, 4, **decoder.TINY), "rem_8": step_sizes(8, 64), "rem_64": step_sizes(64, 64)}


def groups() -> Iterator[Group]:
    """Steps at each batch, and the series over K."""
    for shape, sizes in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            yield step_group(shape, sizes, dtype, by_token=sizes.B <= 8)
    for tokens in TOKENS:
        yield step_group("tokens", step_sizes(8, tokens), "float32", by_token=True, size=tokens)


def step_group(shape: str, sizes: decoder.Sizes, dtype: str, *, by_token: bool, size: int = 0) -> Group:
    """Every contender for an imagined observation."""
    contenders = decoder.by_all("pop", is_compiled=not size)
    if by_token:
        computes = "the same tokens, one after another"
        retnet = ours(retnet_by_token, ["torch"], computes=computes, model=True, states=1)["torch"]
        contenders["retnet, token by token"] = retnet
        contenders["transformer, token by token"] = Contender(
            make=transformer_by_token,
            reference=transformer_by_token,
            computes="attention with a cache of keys and values, one token after another",
            model=True,
        )
    return Group(
        op="imagination",
        shape=shape,
        mode="step",
        dtype=dtype,
        size=size,
        passes=(FORWARD,),
        problem=partial(problem, sizes, DTYPES[dtype]),
        contenders=contenders,
    )


def problem(sizes: decoder.Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """The decoder's, and a transformer's cache."""
    made = decoder.problem(sizes, dtype, device)
    cache = made.shared["transformer"].make_cache(sizes.B, sizes.past + sizes.L)
    return replace(made, tensors={**made.tensors, "cache": cache.permute(2, 0, 1, 3, 4, 5)})


def retnet_by_token(problem: Problem, *, backend: str) -> Work:
    """Our decoder without POP: the block's tokens one after another, a recurrent step each."""
    s, model, x = problem.sizes, problem.shared["ours"], problem.tensors["x"]
    start = decoder.state_of(problem)

    def run() -> tuple[Tensor, ...]:
        state, outs = start, []
        with problem.autocast():
            for token in x.split(1, dim=1):
                out, state = model(token, state, backend=backend)
                outs.append(out)
        return torch.cat(outs, dim=1), state.kv.transpose(0, 1)

    return Work(inputs=[x], run=run, flops=s.B * s.L * product_flops(model), graded=0, moves=False)


def transformer_by_token(problem: Problem) -> Work:
    """A transformer that looks at what it has seen through a cache."""
    s, model, x = problem.sizes, problem.shared["transformer"], problem.tensors["x"]
    cache = problem.tensors["cache"].permute(1, 2, 0, 3, 4, 5).contiguous()

    def run() -> tuple[Tensor]:
        with problem.autocast():
            outs = [model.step(token, cache, s.past + i) for i, token in enumerate(x.split(1, dim=1))]
        return (torch.cat(outs, dim=1),)

    return Work(inputs=[x], run=run, flops=s.B * s.L * product_flops(model), graded=0, moves=False)

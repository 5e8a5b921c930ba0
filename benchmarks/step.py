"""Decoding: what one token costs, at positions from 256 to 65,536.

REM's decoder carries a state of constant size; a transformer of its size reads a cache of keys and values
that grows with every token. "paper_token" is a batch of them on a GPU, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import decoder
from benchmarks.peers import yet_another_retnet
from benchmarks.work import (
    DTYPES,
    FORWARD,
    Contender,
    Group,
    Problem,
    Work,
    compile_call,
    leaf,
    ours,
    product_flops,
)

POSITIONS = (256, 1024, 4096, 16384, 65536)

SIZES = decoder.Sizes(B=1, N=1, L=1, M=0)

SHAPES = {
    "tiny": [replace(SIZES, past=past, **decoder.TINY) for past in (16, 64)],
    "position": [replace(SIZES, past=past) for past in POSITIONS],
}


def groups() -> Iterator[Group]:
    """A token at each position, beside others; and ours at all positions, timed in turn."""
    for shape, series in SHAPES.items():
        for sizes in series:
            yield group(shape, sizes)
    yield constant(SHAPES["position"])
    yield group("paper_token", replace(SIZES, B=64, past=65), "bfloat16", for_gpu=True)


def group(shape: str, sizes: decoder.Sizes, dtype: str = "float32", *, for_gpu: bool = False) -> Group:
    """Every contender for one token."""
    contenders = ours(by_us, ["torch", "compile", "triton", "triton-compile"], model=True, states=1)
    if yet_another_retnet.is_there():
        reference = contenders["torch"].reference
        contenders[yet_another_retnet.NAME] = Contender(make=theirs, reference=reference, model=True)
    contenders["transformer"] = Contender(
        make=transformer,
        reference=transformer,
        computes="attention with a cache of keys and values",
        model=True,
    )
    return Group(
        op="step",
        shape=shape,
        mode="recurrent",
        dtype=dtype,
        size=sizes.past,
        passes=(FORWARD,),
        problem=partial(problem, sizes, DTYPES[dtype]),
        contenders=contenders,
        for_gpu=for_gpu,
    )


def constant(series: list[decoder.Sizes]) -> Group:
    """Ours at every position: does a later token take longer?"""
    contenders = {
        f"torch, position {sizes.past}": ours(
            partial(at_position, past=sizes.past), ["torch"], model=True, states=1
        )["torch"]
        for sizes in series
    }
    return Group(
        op="step",
        shape="positions_in_turn",
        mode="recurrent",
        dtype="float32",
        passes=(FORWARD,),
        problem=partial(problem, series[0], torch.float32),
        contenders=contenders,
    )


def at_position(problem: Problem, *, past: int, backend: str) -> Work:
    """Ours, so many tokens after the start."""
    position = torch.full_like(problem.tensors["position"], past)
    return by_us(replace(problem, tensors={**problem.tensors, "position": position}), backend=backend)


def problem(sizes: decoder.Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """A token, and a memory of the tokens before it: a state and a cache."""
    s, models = sizes, decoder.make_models(sizes, device)
    kv = models["ours"].init_state(s.B).kv.transpose(0, 1)
    cache = models["transformer"].make_cache(s.B, s.past + 1)
    tensors = {
        "x": leaf(s.B, 1, s.embed_dim, dtype=torch.float32, device=device, grad=False),
        "kv": torch.randn_like(kv),
        "position": torch.full((s.B,), s.past, device=device),
        "cache": cache.permute(2, 0, 1, 3, 4, 5),
    }
    return Problem(sizes=s, dtype=dtype, tensors=tensors, shared=models)


def by_us(problem: Problem, *, backend: str, compiled: bool = False) -> Work:
    """`RetNetDecoder` on one token."""
    model, x, state = problem.shared["ours"], problem.tensors["x"], decoder.state_of(problem)
    call = compile_call(model, backend, problem.device) if compiled else model

    def run() -> tuple[Tensor, ...]:
        with problem.autocast():
            out, after = call(x, state, backend=backend)
        return out, after.kv.transpose(0, 1)

    flops = problem.sizes.B * product_flops(model)
    return Work(inputs=[x, problem.tensors["kv"]], run=run, flops=flops, graded=0, moves=False)


def theirs(problem: Problem) -> Work:
    """yet-another-retnet's recurrent pass."""
    s, model, x = problem.sizes, problem.shared["theirs"], problem.tensors["x"]
    states = list((s.embed_dim // s.num_heads) ** -0.5 * problem.tensors["kv"].transpose(0, 1))

    def run() -> tuple[Tensor]:
        out, _ = model.forward_recurrent(x[:, 0], s.past, states)
        return (out[:, None],)

    return replace(by_us(problem, backend="torch"), run=run)


def transformer(problem: Problem) -> Work:
    """A transformer, from its cache."""
    s, model, x = problem.sizes, problem.shared["transformer"], problem.tensors["x"]
    cache = problem.tensors["cache"].permute(1, 2, 0, 3, 4, 5)

    def run() -> tuple[Tensor]:
        with problem.autocast():
            return (model.step(x, cache, s.past),)

    return Work(inputs=[x, cache], run=run, flops=s.B * product_flops(model), graded=0, moves=False)

"""Decoding: what one token costs, at positions from 256 to 65,536.

REM's decoder carries a state of constant size; a transformer of its size looks at a cache of keys and values
that grows with every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import decoder
from benchmarks.peers import yet_another_retnet
from benchmarks.work import FORWARD, Contender, Group, Problem, Work, leaf, product_flops

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


def group(shape: str, sizes: decoder.Sizes) -> Group:
    """Everybody who decodes a token."""
    same = partial(Contender, reference=partial(ours, backend="reference"), model=True)
    contenders = {
        "torch": same(make=partial(ours, backend="torch"), states=1),
        "compile": same(make=partial(ours, backend="torch", compiler="inductor"), states=1),
        "triton": same(make=partial(ours, backend="triton"), states=1),
    }
    if yet_another_retnet.is_there():
        contenders[yet_another_retnet.NAME] = same(make=theirs)
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
        dtype="float32",
        size=sizes.past,
        passes=(FORWARD,),
        problem=partial(problem, sizes, torch.float32),
        contenders=contenders,
    )


def constant(series: list[decoder.Sizes]) -> Group:
    """Ours at every position: does a later token take longer?"""
    return Group(
        op="step",
        shape="positions_in_turn",
        mode="recurrent",
        dtype="float32",
        passes=(FORWARD,),
        problem=partial(problem, series[0], torch.float32),
        contenders={
            f"torch, position {sizes.past}": Contender(
                make=partial(ours_at, past=sizes.past, backend="torch"),
                reference=partial(ours_at, past=sizes.past, backend="reference"),
                model=True,
                states=1,
            )
            for sizes in series
        },
    )


def ours_at(problem: Problem, *, past: int, backend: str) -> Work:
    """Ours, so many tokens after the start."""
    position = torch.full_like(problem.tensors["position"], past)
    return ours(replace(problem, tensors={**problem.tensors, "position": position}), backend=backend)


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


def ours(problem: Problem, *, backend: str, compiler: str = "") -> Work:
    """`RetNetDecoder` on one token, under torch.compile if there is a ``compiler``."""
    model, x, state = problem.shared["ours"], problem.tensors["x"], decoder.state_of(problem)
    call = torch.compile(model, dynamic=False, fullgraph=True, backend=compiler) if compiler else model

    def run() -> tuple[Tensor, ...]:
        with problem.autocast():
            out, after = call(x, state, backend=backend)
        return out, after.kv.transpose(0, 1)

    return Work(
        inputs=[x, problem.tensors["kv"]], run=run, flops=problem.sizes.B * product_flops(model), graded=0
    )


def theirs(problem: Problem) -> Work:
    """yet-another-retnet's recurrent pass."""
    s, model, x = problem.sizes, problem.shared["theirs"], problem.tensors["x"]
    states = list((s.embed_dim // s.num_heads) ** -0.5 * problem.tensors["kv"].transpose(0, 1))

    def run() -> tuple[Tensor]:
        out, _ = model.forward_recurrent(x[:, 0], s.past, states)
        return (out[:, None],)

    return replace(ours(problem, backend="torch"), run=run)


def transformer(problem: Problem) -> Work:
    """A transformer, from its cache."""
    s, model, x = problem.sizes, problem.shared["transformer"], problem.tensors["x"]
    cache = problem.tensors["cache"].permute(1, 2, 0, 3, 4, 5)
    return Work(
        inputs=[x, cache],
        run=lambda: (model.step(x, cache, s.past),),
        flops=s.B * product_flops(model),
        graded=0,
    )

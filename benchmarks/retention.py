"""Retention in its three modes, beside yet-another-retnet's, attention, and flash-linear-attention.

Shapes: "rem_train" is the world model's sequence in training; "long" one long sequence, "long_64" and
"long_128" batches of them on a GPU; "token", "token_64" and "token_128" one token and a state, for some sizes
of a batch; "length" and "batch" are series, whose times over the length of a sequence or the rows of a batch
make a slope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import retpop
from benchmarks.floors import BACKWARD_FLOPS, chunk_flops
from benchmarks.peers import flash_linear_attention, yet_another_retnet
from benchmarks.work import (
    BOTH,
    DTYPES,
    FORWARD,
    Contender,
    Group,
    Problem,
    Work,
    compile_call,
    ours,
    randoms,
)

LONGEST_LOOP = 1500
"""Tokens up to which a gradient's reference is the loop over tokens; beyond, the torch backend in float64."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """B rows of T tokens, H heads of D features."""

    B: int
    T: int
    H: int
    D: int

    @property
    def text(self) -> str:
        """For tables."""
        return f"B{self.B} T{self.T} H{self.H} D{self.D}"


SHAPES = {
    "tiny": Sizes(B=1, T=70, H=2, D=16),
    "rem_train": Sizes(B=4, T=650, H=4, D=64),
    "long": Sizes(B=1, T=4096, H=4, D=64),
}

GPU_SHAPES = {f"long_{dim}": Sizes(B=8, T=4096, H=16, D=dim) for dim in (64, 128)}

GPU_TOKENS = {"token_64": Sizes(B=64, T=1, H=4, D=64), "token_128": Sizes(B=256, T=1, H=16, D=128)}

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)

LONGEST_ATTENTION, LONGEST_TRAINED = 8192, 16384
"""Tokens of a series up to which attention, quadratic in them, is timed, and up to which backward is."""

SERIES_CHUNK = 128
"""The chunk size of yet-another-retnet that a series over lengths is timed with."""

BATCHES = (1, 2, 4, 8, 16, 32)

TOKEN_BATCHES = (1, 8, 64)

MODES = ("chunkwise", "parallel", "recurrent")


def groups() -> Iterator[Group]:
    """Every mode at every shape, single tokens, and the two series."""
    for shape, sizes in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            for mode in MODES:
                # Token by token is for generating, without gradient; that and all pairs not for long inputs.
                if mode != "chunkwise" and shape == "long":
                    continue
                yield group(shape, sizes, mode, dtype, FORWARD if mode == "recurrent" else BOTH)
    for mode in MODES:
        yield token("tiny", replace(SHAPES["tiny"], T=1), mode)
        for rows in TOKEN_BATCHES:
            yield token("token", replace(SHAPES["rem_train"], B=rows, T=1), mode)
    row = SHAPES["long"]
    for length in LENGTHS:
        last = BOTH if length <= LONGEST_TRAINED else FORWARD
        yield group("length", replace(row, T=length), "chunkwise", "float32", last, size=length)
    for rows in BATCHES:
        sizes = replace(SHAPES["rem_train"], B=rows)
        yield group("batch", sizes, "chunkwise", "float32", BOTH, size=rows)
    for shape, sizes in GPU_SHAPES.items():
        yield group(shape, sizes, "chunkwise", "bfloat16", BOTH, for_gpu=True)
    for shape, sizes in GPU_TOKENS.items():
        yield token(shape, sizes, "recurrent", "bfloat16", for_gpu=True)


def group(shape: str, sizes: Sizes, mode: str, dtype: str, last: str, **options: Any) -> Group:
    """Every contender for retention in this mode at these sizes, with the passes up to ``last``."""
    size = options.get("size", 0)
    names = ["torch"]
    if mode != "recurrent" and not size:  # a loop over tokens would be unrolled
        names.append("compile")
    if mode == "chunkwise":  # the kernels have one mode
        names.append("triton")
    contenders = ours(partial(by_us, mode=mode), names, reference=reference, states=1)
    for name, run in yet_another_retnet.retentions(mode, SERIES_CHUNK if size else None).items():
        contenders[name] = Contender(make=partial(theirs, run=run), reference=reference)
    if mode == "chunkwise":
        if size <= LONGEST_ATTENTION:
            contenders["attention"] = Contender(
                make=attention, reference=attention, computes="causal attention"
            )
        for name, run in flash_linear_attention.retentions().items():
            contenders[name] = Contender(make=partial(theirs, run=run), reference=with_retnet_decays)
    return Group(
        op="retention",
        shape=shape,
        mode=mode,
        dtype=dtype,
        passes=(FORWARD,) if last == FORWARD else (FORWARD, BOTH),
        problem=partial(problem, sizes, DTYPES[dtype]),
        contenders=contenders,
        **options,
    )


def token(shape: str, sizes: Sizes, mode: str, dtype: str = "float32", *, for_gpu: bool = False) -> Group:
    """One token from a state, in ours by any mode; in others by the step that is made for it."""
    contenders = ours(partial(by_us, mode=mode), ["torch", "triton"], reference=reference, states=1)
    if yet_another_retnet.is_there():
        contenders[yet_another_retnet.NAME] = Contender(make=their_token, reference=reference)
    if mode == "recurrent":
        for name, step in flash_linear_attention.steps().items():
            contenders[name] = Contender(
                make=partial(fla_token, step=step), reference=with_retnet_decays, states=1
            )
    return Group(
        op="retention",
        shape=shape,
        mode=mode,
        dtype=dtype,
        size=sizes.B,
        passes=(FORWARD,),
        problem=partial(token_problem, sizes, DTYPES[dtype]),
        contenders=contenders,
        for_gpu=for_gpu,
    )


def problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Queries, keys and values, and the decays that yet-another-retnet has built in."""
    tokens = randoms("q k v", sizes.B, sizes.T, sizes.H, sizes.D, dtype=dtype, device=device)
    log_decay = retpop.log_spaced_decay(sizes.H).to(device)
    return Problem(sizes=sizes, dtype=dtype, tensors=tokens, shared={"log_decay": log_decay})


def token_problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """A token, and the state that came before it."""
    tokens = problem(sizes, dtype, device)
    state = randoms("state", sizes.B, sizes.H, sizes.D, sizes.D, dtype=torch.float32, device=device)
    return replace(tokens, tensors={**tokens.tensors, **state})


def by_us(problem: Problem, *, mode: str = "chunkwise", backend: str, compiled: bool = False) -> Work:
    """`retpop.retention`."""
    s = problem.sizes
    call = compile_call(retpop.retention, backend, problem.device) if compiled else retpop.retention
    *tokens, state = (problem.tensors.get(name) for name in ("q", "k", "v", "state"))
    log_decay = problem.shared["log_decay"]
    return Work(
        inputs=[*tokens, state],
        run=lambda: call(*tokens, log_decay, mode=mode, state=state, backend=backend),
        flops=s.B * s.H * chunk_flops(s.T, s.D, s.D),
        backward_flops=BACKWARD_FLOPS,
    )


def reference(problem: Problem) -> Work:
    """The definition, as a loop over tokens."""
    short = problem.sizes.T <= LONGEST_LOOP or not torch.is_grad_enabled()
    return by_us(problem, backend="reference" if short else "torch")


def with_retnet_decays(problem: Problem) -> Work:
    """The reference with the decays that flash-linear-attention has built in."""
    log_decay = retpop.retnet_decay(problem.sizes.H).to(problem.shared["log_decay"])
    return reference(replace(problem, shared={"log_decay": log_decay}))


def theirs(problem: Problem, *, run: Callable[..., Tensor]) -> Work:
    """A function of queries, keys and values (B, T, H, D)."""
    return replace(
        by_us(problem, backend="torch"), run=lambda: (run(*problem.tensors.values(), **problem.shared),)
    )


def their_token(problem: Problem) -> Work:
    """yet-another-retnet's recurrent step, in its convention: no dimension of tokens, c in the state."""
    q, k, v = (problem.tensors[name].squeeze(1) for name in "qkv")
    state = problem.sizes.D**-0.5 * problem.tensors["state"].detach()
    step = yet_another_retnet.step()
    return replace(
        by_us(problem, backend="torch"),
        run=lambda: step(q, k, v, state),
        answer=lambda: (step(q, k, v, state)[0].unsqueeze(1),),
    )


def fla_token(problem: Problem, *, step: Callable[..., tuple[Tensor, Tensor]]) -> Work:
    """flash-linear-attention's recurrent function on one token."""
    *tokens, state = problem.tensors.values()
    return replace(
        by_us(problem, backend="torch"),
        run=lambda: step(*tokens, initial_state=state, output_final_state=True),
    )


def attention(problem: Problem) -> Work:
    """Causal softmax attention by torch, the usual alternative to retention in a layer."""
    s, tokens = problem.sizes, list(problem.tensors.values())

    def run() -> tuple[Tensor]:
        q, k, v = (x.transpose(1, 2) for x in tokens)
        return (functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)

    return Work(inputs=tokens, run=run, flops=2 * s.B * s.H * s.T**2 * s.D, backward_flops=BACKWARD_FLOPS)

"""POP beside its alternatives: yet-another-retnet and flash-linear-attention in two passes.

Shapes: "rem_train" is a batch of REM's world model in training, "rem_imagine" a step of its imagination;
"paper_train" and "paper_imagine" are these at the paper's batch, for a GPU. Mode "pop" takes sequence and
predictions as separate tensors, "rows" one row of both, as a layer calls the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import retpop
from benchmarks import internals
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
    leaf,
    ours,
    randoms,
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """B rows of N blocks of L tokens, as many predictions of M tokens, H heads of D features.

    With ``offset`` 1 the predictions start after their blocks, from a state that is given: imagination.
    """

    B: int
    N: int
    L: int
    M: int
    H: int
    D: int
    offset: int = 0

    @property
    def text(self) -> str:
        """For tables."""
        return f"B{self.B} N{self.N} L{self.L} M{self.M} H{self.H} D{self.D}"

    @property
    def tokens(self) -> int:
        """Of a row, the predictions' included."""
        return self.N * (self.L + self.M)

    @property
    def flops(self) -> int:
        """Of POP, forward."""
        block = chunk_flops(self.L, self.D, self.D)
        pred = chunk_flops(self.M, self.D, self.D, takes_in=False)
        return self.B * self.H * self.N * (block + pred)


SHAPES = {
    "tiny": Sizes(B=1, N=2, L=5, M=4, H=2, D=16),
    "rem_train": Sizes(B=4, N=10, L=65, M=64, H=4, D=64),
    "rem_imagine": Sizes(B=8, N=1, L=65, M=64, H=4, D=64, offset=1),
}

GPU_SHAPES = {
    "paper_train": replace(SHAPES["rem_train"], B=64),
    "paper_imagine": replace(SHAPES["rem_imagine"], B=64),
}


def groups() -> Iterator[Group]:
    """Every shape in every dtype, from separate tensors and from rows."""
    for shape, sizes in (SHAPES | GPU_SHAPES).items():
        for dtype in ("float32", "bfloat16"):
            contenders = ours(by_us, reference=reference, states=1)
            if yet_another_retnet.is_there():
                contenders[yet_another_retnet.NAME] = Contender(make=two_passes, reference=reference)
            for name, call in flash_linear_attention.compositions().items():
                contenders[name] = Contender(make=partial(composed, call=call), reference=with_retnet_decays)
            by_rows = ours(rows, ["triton"], states=1)
            for mode, make, found in (("pop", problem, contenders), ("rows", row_problem, by_rows)):
                yield Group(
                    op="pop",
                    shape=shape,
                    mode=mode,
                    dtype=dtype,
                    passes=(FORWARD,) if sizes.offset else (FORWARD, BOTH),
                    problem=partial(make, sizes, DTYPES[dtype]),
                    contenders=found,
                    for_gpu=shape in GPU_SHAPES,
                )


def problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Six tensors, log-spaced decays and, for imagination, a state."""
    s = sizes
    main = randoms("q k v", s.B, s.N * s.L, s.H, s.D, dtype=dtype, device=device)
    pred = randoms("q_pred k_pred v_pred", s.B, s.N, s.M, s.H, s.D, dtype=dtype, device=device)
    tensors = main | pred
    if s.offset:
        tensors["state"] = leaf(s.B, s.H, s.D, s.D, dtype=torch.float32, device=device, grad=False)
    return Problem(
        sizes=s,
        dtype=dtype,
        tensors=tensors,
        shared={"log_decay": retpop.log_spaced_decay(s.H).to(device)},
    )


def by_us(problem: Problem, *, backend: str, compiled: bool = False) -> Work:
    """`retpop.pop_retention`."""
    s = problem.sizes
    call = compile_call(retpop.pop_retention, backend, problem.device) if compiled else retpop.pop_retention
    *tokens, state = (*problem.tensors.values(), *([] if s.offset else [None]))
    log_decay = problem.shared["log_decay"]
    return Work(
        inputs=[*tokens, state],
        run=lambda: call(*tokens, log_decay, block_size=s.L, offset=s.offset, state=state, backend=backend),
        flops=s.flops,
        backward_flops=BACKWARD_FLOPS,
        graded=2,
    )


def reference(problem: Problem) -> Work:
    """The definition, as a loop over tokens."""
    return by_us(problem, backend="reference")


def with_retnet_decays(problem: Problem) -> Work:
    """The reference with the decays that flash-linear-attention has built in."""
    log_decay = retpop.retnet_decay(problem.sizes.H).to(problem.shared["log_decay"])
    return reference(replace(problem, shared={"log_decay": log_decay}))


def row_problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Rows as a layer has them: queries and keys side by side once rotated, values out of a projection."""
    s = sizes
    made = (
        leaf(s.B, s.tokens, 2 * s.H, s.D, dtype=dtype, device=device, grad=False).chunk(2, dim=2)
        for _ in range(2)
    )
    (q, k), (v, _) = made
    tensors = {name: x.requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    if s.offset:
        tensors["state"] = leaf(s.B, s.H, s.D, s.D, dtype=torch.float32, device=device, grad=False)
    shared = {"log_decay": retpop.log_spaced_decay(s.H).to(device)}
    return Problem(sizes=s, dtype=dtype, tensors=tensors, shared=shared)


def rows(problem: Problem, *, backend: str) -> Work:
    """The kernels on rows; the reference takes them apart."""
    s, log_decay = problem.sizes, problem.shared["log_decay"]
    *row, state = (*problem.tensors.values(), *([] if s.offset else [None]))

    def by_definition() -> tuple[Tensor, Tensor]:
        parts = [x.split((s.N * s.L, s.N * s.M), dim=1) for x in row]
        main, pred = ([part[i] for part in parts] for i in range(2))
        pred = [x.unflatten(1, (s.N, s.M)) for x in pred]
        out, predicted, final = retpop.pop_retention(
            *main, *pred, log_decay, block_size=s.L, offset=s.offset, state=state, backend="reference"
        )
        return torch.cat([out, predicted.flatten(1, 2)], dim=1), final

    by_kernels = internals.pop_of_rows(log_decay, s.D**-0.5, (s.N, s.M), s.L, s.offset)
    return Work(
        inputs=[*row, state],
        run=by_definition if backend == "reference" else partial(by_kernels, *row, state),
        flops=s.flops,
        backward_flops=BACKWARD_FLOPS,
        graded=0 if s.offset else 1,
    )


def two_passes(problem: Problem) -> Work:
    """yet-another-retnet: a pass over the blocks that keeps all states, then one over all predictions."""
    s, work = problem.sizes, by_us(problem, backend="torch")
    *tokens, state = work.inputs
    if state is not None:  # as it keeps states: smaller, and in the queries' dtype
        state = (s.D**-0.5 * state).to(problem.dtype)
    return replace(
        work,
        run=lambda: yet_another_retnet.pop_retention(tokens[:3], tokens[3:], state, s.L, s.offset),
    )


def composed(problem: Problem, *, call: Callable[..., tuple[Tensor, Tensor]]) -> Work:
    """flash-linear-attention: a call a block, and one for all predictions."""
    s, work = problem.sizes, by_us(problem, backend="torch")
    *tokens, state = work.inputs
    return replace(work, run=lambda: call(tokens[:3], tokens[3:], state, s.L, s.offset))

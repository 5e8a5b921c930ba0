"""POP beside what it replaces: yet-another-retnet and flash-linear-attention in two passes.

Shapes: "rem_train" is a batch of REM's world model in training, "rem_imagine" a step of its imagination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import retpop
from benchmarks.audit.case import BACKWARD_FLOPS, chunk_flops
from benchmarks.peers import flash_linear_attention, yet_another_retnet
from benchmarks.work import BOTH, DTYPES, FORWARD, Contender, Group, Problem, Work, leaf, randoms


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
    "tiny": Sizes(B=2, N=3, L=5, M=4, H=2, D=16),
    "rem_train": Sizes(B=4, N=10, L=65, M=64, H=4, D=64),
    "rem_imagine": Sizes(B=8, N=1, L=65, M=64, H=4, D=64, offset=1),
}


def groups() -> Iterator[Group]:
    """Every shape in every dtype."""
    for shape, sizes in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            contenders = {
                "torch": _same(partial(ours, backend="torch"), states=1),
                "compile": _same(partial(ours, backend="torch", compiled=True), states=1),
                "triton": _same(partial(ours, backend="triton"), states=1),
            }
            if yet_another_retnet.is_there():
                contenders[yet_another_retnet.NAME] = _same(two_passes)
            for name, call in flash_linear_attention.compositions().items():
                contenders[name] = Contender(make=partial(composed, call=call), reference=with_retnet_decays)
            yield Group(
                op="pop",
                shape=shape,
                mode="pop",
                dtype=dtype,
                passes=(FORWARD,) if sizes.offset else (FORWARD, BOTH),
                problem=partial(problem, sizes, DTYPES[dtype]),
                contenders=contenders,
            )


def _same(make: Callable[[Problem], Work], states: int = 0) -> Contender:
    return Contender(make=make, reference=reference, states=states)


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


def ours(problem: Problem, *, backend: str, compiled: bool = False) -> Work:
    """`retpop.pop_retention`."""
    s = problem.sizes
    call = torch.compile(retpop.pop_retention, dynamic=False) if compiled else retpop.pop_retention
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
    return ours(problem, backend="reference")


def with_retnet_decays(problem: Problem) -> Work:
    """The reference with the decays that flash-linear-attention has built in."""
    log_decay = retpop.retnet_decay(problem.sizes.H).to(problem.shared["log_decay"])
    return reference(replace(problem, shared={"log_decay": log_decay}))


def two_passes(problem: Problem) -> Work:
    """yet-another-retnet: a pass over the blocks that keeps all states, then one over all predictions."""
    s, work = problem.sizes, ours(problem, backend="torch")
    *tokens, state = work.inputs
    if state is not None:  # as it keeps states: smaller, and in the queries' dtype
        state = (s.D**-0.5 * state).to(problem.dtype)
    return replace(
        work,
        run=lambda: yet_another_retnet.pop_retention(tokens[:3], tokens[3:], state, s.L, s.offset),
    )


def composed(problem: Problem, *, call: Callable[..., tuple[Tensor, Tensor]]) -> Work:
    """flash-linear-attention: a call a block, and one for all predictions."""
    s, work = problem.sizes, ours(problem, backend="torch")
    *tokens, state = work.inputs
    return replace(work, run=lambda: call(tokens[:3], tokens[3:], state, s.L, s.offset))

"""POP by kernels: `retpop::pop_fwd` and its backward, as `torch.library` ops.

They take the sequence and the predictions as separate tensors, or three rows (`retpop.ops.rows`), as a
layer's projection makes them. For rows they return a row, so nothing is split or joined in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retpop._torch import check
from retpop.arguments import state_dtype, without_autocast, zero_state
from retpop.ops import torch_backend
from retpop.ops.powers import DecayPowers
from retpop.ops.rows import PopSpec, split_row
from retpop.ops.torch_backend.eager import Pop
from retpop.ops.triton_backend.custom import (
    add_gradient,
    check_tokens,
    final_state,
    kernel_op,
    kernels,
    own,
    refuse_transforms,
)
from retpop.ops.triton_backend.known import KnownCalls


def pop(tokens: Sequence[Tensor], state: Tensor | None, spec: PopSpec) -> tuple[Tensor, ...]:
    """POP of three rows, or of sequence and prediction tensors; returns outputs and final state.

    The kernels compute an output for every query. Outputs are independent, so queries of unread tokens may be
    anything, and their outputs are dropped.
    """
    powers = spec.powers
    refuse_transforms(*tokens, powers.given, state)
    q, *rest = tokens
    if len(tokens) == 3 and q.shape[1] != rest[0].shape[1]:
        q = spec.all_tokens(q)
    *outs, final = pop_fwd(
        [q, *rest],
        powers.given,
        state,
        spec.reset,
        spec.predictions,
        spec.block_size,
        spec.offset,
        powers.scale,
        spec.out_dtype,
    )
    return *(outs if len(tokens) == 6 else map(spec.readers, outs)), final


class _Numbers(NamedTuple):
    """The numbers of both ops, in the order of their schemas; as in `PopSpec`, with the scale c."""

    predictions: Sequence[int]
    block_size: int
    offset: int
    scale: float
    out_dtype: torch.dtype | None

    def spec(self, tokens: Sequence[Tensor], log_decay: Tensor, reset: Tensor | None) -> PopSpec:
        """The spec that they make with the ops' tensors."""
        powers = DecayPowers(log_decay, self.scale, state_dtype(tokens[0].dtype))
        return PopSpec(
            powers, self.predictions, self.block_size, self.offset, reset, out_dtype=self.out_dtype
        )


def _split(rows: Sequence[Tensor | None], predictions: Sequence[int]) -> list[Tensor | None]:
    """The sequence's part of each row, then the predictions' part of each, as views."""
    pairs = [(None, None) if row is None else split_row(row, predictions) for row in rows]
    return [x for part in zip(*pairs, strict=True) for x in part]


def _launch(
    tokens: Sequence[Tensor],
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    *numbers: Any,
    with_states: bool = False,
) -> list[Any]:
    given = _Numbers(*numbers)
    launch = partial(kernels("pop_fwd").pop_fwd, with_states=with_states)
    arguments = (log_decay, state, reset, given.block_size, given.offset, given.scale)
    if len(tokens) == 6:
        return list(launch(*tokens, *arguments, out_dtype=given.out_dtype))
    v = tokens[2]
    row = torch.empty(v.shape, dtype=given.out_dtype or v.dtype, device=v.device)
    out, pred = split_row(row, given.predictions)
    _, _, *states = launch(*_split(tokens, given.predictions), *arguments, out=out, pred=pred)
    return [row, *states]


def _compute(
    tokens: Sequence[Tensor], log_decay: Tensor, state: Tensor | None, reset: Tensor | None, *numbers: Any
) -> list[Tensor]:
    spec = _Numbers(*numbers).spec(tokens, log_decay, reset)
    return [own(x) for x in torch_backend.pop(tokens, state, spec)]


def _fake(
    tokens: Sequence[Tensor], log_decay: Tensor, state: Tensor | None, reset: Tensor | None, *numbers: Any
) -> list[Tensor]:
    q, k, v = tokens[:3]
    check_tokens(q, k, v, 4)
    (num_predictions, size), block_size, offset, _, out_dtype = _Numbers(*numbers)
    length = q.shape[1]
    if len(tokens) == 6:
        _check_predictions(tokens)
    else:
        length -= num_predictions * size
        check(
            length >= 0,
            lambda: f"rows of {q.shape[1]} tokens do not hold {num_predictions} predictions of {size}",
        )
    check(
        block_size > 0 and length % block_size == 0,
        lambda: f"T={length} is not a whole number of blocks of {block_size}",
    )
    num_blocks = length // block_size
    check(
        offset >= 0 and num_predictions <= num_blocks + 1 - offset,
        lambda: f"P={num_predictions} predictions from offset {offset} do not fit N={num_blocks} blocks",
    )
    wanted = (q.shape[0], num_blocks)
    check(
        reset is None or reset.shape == wanted,
        lambda: f"reset is {None if reset is None else tuple(reset.shape)}; it must be {wanted}",
    )
    final = final_state(q, v, q.shape[0], log_decay, state)
    return [*(x.new_empty(x.shape, dtype=out_dtype) for x in tokens[2::3]), final]


def _check_predictions(tokens: Sequence[Tensor]) -> None:
    q, _, v, q_pred, k_pred, v_pred = tokens
    check_tokens(q_pred, k_pred, v_pred, 5)
    check(
        q_pred.shape[0] == q.shape[0] and q_pred.shape[3:] == q.shape[2:],
        lambda: f"q is {tuple(q.shape)} but q_pred is {tuple(q_pred.shape)}; they must share B, H and Dk",
    )
    check(
        v_pred.shape[4] == v.shape[3],
        lambda: f"v is {tuple(v.shape)} but v_pred is {tuple(v_pred.shape)}; they must share Dv",
    )


pop_fwd = kernel_op(
    "pop_fwd",
    "(Tensor[] tokens, Tensor log_decay, Tensor? state, Tensor? reset, SymInt[] predictions, "
    "SymInt block_size, SymInt offset, float scale, ScalarType? out_dtype) -> Tensor[]",
    launch=_launch,
    compute=_compute,
    fake=_fake,
)


def _launch_gradients(
    tokens: Sequence[Tensor],
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    states: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    """The kernels write both parts of a row's gradient in place."""
    *numbers, needs = rest
    predictions, block_size, offset, scale, _ = _Numbers(*numbers)
    launch = partial(kernels("pop_bwd").pop_bwd, states=states)
    options = (log_decay, state, reset)
    blocks = (block_size, offset, scale)
    of_decay, of_state = needs[len(tokens) : len(tokens) + 2]
    decay = None
    if of_decay:  # no kernel computes it
        only = [i == len(tokens) for i in range(len(needs))]
        with without_autocast(log_decay.device):
            decay = _compute_gradients(tokens, *options, grads, None, *numbers, only)[len(tokens)]
    if len(tokens) == 6:
        *found, grad_state = launch(*tokens, *options, *grads, *blocks, [*needs[:6], of_state])
        return [*found, decay, grad_state]
    rows = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(tokens, needs, strict=False)
    ]
    *_, grad_state = launch(
        *_split(tokens, predictions),
        *options,
        *_split(grads[:1], predictions),
        grads[1],
        *blocks,
        [*needs[:3], *needs[:3], of_state],
        out=_split(rows, predictions),
    )
    return [*rows, decay, grad_state]


def _compute_gradients(
    tokens: Sequence[Tensor],
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    states: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    *numbers, needs = rest
    q, _, v = tokens[:3]
    spec = _Numbers(*numbers).spec(tokens, log_decay, reset)
    state = zero_state(q, v, q.shape[0]) if state is None else state
    return torch_backend.gradients(Pop(spec), tokens, state, grads, needs[: len(tokens) + 2])


add_gradient(
    pop_fwd,
    "pop_bwd",
    "(Tensor[] tokens, Tensor log_decay, Tensor? state, Tensor? reset, Tensor?[] grads, Tensor? states, "
    "SymInt[] predictions, SymInt block_size, SymInt offset, float scale, ScalarType? out_dtype, "
    "bool[] needs) -> Tensor[]",
    launch=_launch_gradients,
    compute=_compute_gradients,
    num_tensors=4,
    keep=partial(_launch, with_states=True),
)

known_pop = KnownCalls(pop_fwd)

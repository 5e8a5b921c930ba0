"""`retpop::pop_fwd`, `pop_rows_fwd` and their backward, as `torch.library` ops.

The two compute the same. `pop_fwd` takes the sequence and the predictions as tensors of their own.
`pop_rows_fwd` takes rows of T sequence tokens with all P·M prediction tokens behind them, as a layer's
projection makes them, and returns such a row: nothing is split or joined in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retpop.ops import torch_backend, torch_backward, torch_forms, torch_forward
from retpop.ops.custom import (
    check_log_decay,
    check_state,
    check_tokens,
    gradient_op,
    gradients_like,
    kernel_op,
    kernels,
    own,
    selected,
    spread,
)
from retpop.ops.decay_powers import DecayPowers
from retpop.ops.dtypes import state_dtype
from retpop.ops.rows import PopSpec, split_row

Results = tuple[Tensor, Tensor, Tensor]


def _launch_pop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    block_size: int,
    offset: int,
    scale: float,
) -> Results:
    launch = kernels("pop_fwd").pop_fwd
    return launch(q, k, v, q_pred, k_pred, v_pred, log_decay, state, reset, block_size, offset, scale)


def _compute_pop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    block_size: int,
    offset: int,
    scale: float,
) -> Results:
    tokens = (q, k, v, q_pred, k_pred, v_pred)
    spec = _spec(log_decay, reset, q_pred.shape[1:3], block_size, offset, scale, q.dtype)
    out, pred, final = torch_backend.pop(tokens, state, spec)
    return out.contiguous(), pred.contiguous(), own(final, state)


def _fake_pop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    block_size: int,
    offset: int,
    scale: float,
) -> Results:
    check_tokens(q_pred, k_pred, v_pred, 5)
    torch._check(
        q_pred.shape[0] == q.shape[0] and q_pred.shape[3:] == q.shape[2:],
        lambda: f"q is {tuple(q.shape)} but q_pred is {tuple(q_pred.shape)}; they must share B, H and Dk",
    )
    torch._check(
        v_pred.shape[4] == v.shape[3],
        lambda: f"v is {tuple(v.shape)} but v_pred is {tuple(v_pred.shape)}; they must share Dv",
    )
    final = _fake_sequence(q, k, v, log_decay, state, reset, q.shape[1], q_pred.shape[1], block_size, offset)
    return v.new_empty(v.shape), v_pred.new_empty(v_pred.shape), final


def _fake_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    length: int,
    num_predictions: int,
    block_size: int,
    offset: int,
) -> Tensor:
    """Check what both forms share, and return the final state's fake."""
    check_tokens(q, k, v, 4)
    check_log_decay(log_decay, q.shape[2])
    torch._check(
        block_size > 0 and length % block_size == 0,
        lambda: f"T={length} is not a whole number of blocks of {block_size}",
    )
    num_blocks = length // block_size
    torch._check(
        offset >= 0 and num_predictions <= num_blocks + 1 - offset,
        lambda: f"P={num_predictions} predictions from offset {offset} do not fit N={num_blocks} blocks",
    )
    torch._check(
        reset is None or reset.shape == (q.shape[0], num_blocks),
        lambda: (
            f"reset is {None if reset is None else tuple(reset.shape)}; it must be "
            f"({q.shape[0]}, {num_blocks})"
        ),
    )
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    check_state(state, shape)
    return q.new_empty(shape, dtype=state_dtype(q.dtype))


pop_fwd = kernel_op(
    "pop_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor q_pred, Tensor k_pred, Tensor v_pred, Tensor log_decay, "
    "Tensor? state, Tensor? reset, SymInt block_size, SymInt offset, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    launch=_launch_pop,
    compute=_compute_pop,
    fake=_fake_pop,
)


def _spec(
    log_decay: Tensor,
    reset: Tensor | None,
    predictions: Sequence[int],
    block_size: int,
    offset: int,
    scale: float,
    dtype: torch.dtype,
) -> PopSpec:
    powers = DecayPowers(log_decay, scale, state_dtype(dtype))
    return PopSpec(powers, (predictions[0], predictions[1]), block_size, offset, reset)


def _explicit_gradients(
    tokens: Sequence[Tensor],
    state: Tensor | None,
    grads: Sequence[Tensor],
    grad_state: Tensor | None,
    spec: PopSpec,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those gradients that are needed, of q, k and v (of rows, or twice) and the state."""
    inputs = (*tokens, state)
    state = torch_forms.zero_state(tokens[0], tokens[2], tokens[0].shape[0]) if state is None else state
    grad_state = torch.zeros_like(state) if grad_state is None else grad_state
    _, states = torch_forward.pop(tokens, spec, state=state)
    found = torch_backward.pop(tokens, grads, grad_state, spec, states=states, needs=needs)
    return selected(found, inputs, needs)


def _compute_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    grad_out: Tensor | None,
    grad_pred: Tensor | None,
    grad_state: Tensor | None,
    block_size: int,
    offset: int,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    tokens = (q, k, v, q_pred, k_pred, v_pred)
    predictions = q_pred.shape[1], q_pred.shape[2]
    grads = [
        torch.zeros_like(x) if grad is None else grad for x, grad in ((v, grad_out), (v_pred, grad_pred))
    ]
    spec = _spec(log_decay, reset, predictions, block_size, offset, scale, q.dtype)
    return _explicit_gradients(tokens, state, grads, grad_state, spec, needs)


def _launch_gradients(*arguments: Any) -> list[Tensor]:
    return [grad for grad in kernels("pop_bwd").pop_bwd(*arguments) if grad is not None]


def _fake_gradients(*arguments: Any) -> list[Tensor]:
    return gradients_like((*arguments[:6], arguments[7]), arguments[-1])


pop_bwd = gradient_op(
    "pop_bwd",
    "(Tensor q, Tensor k, Tensor v, Tensor q_pred, Tensor k_pred, Tensor v_pred, Tensor log_decay, "
    "Tensor? state, Tensor? reset, Tensor? grad_out, Tensor? grad_pred, Tensor? grad_state, "
    "SymInt block_size, SymInt offset, float scale, bool[] needs) -> Tensor[]",
    launch=_launch_gradients,
    compute=_compute_gradients,
    fake=_fake_gradients,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    *tensors, ctx.block_size, ctx.offset, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 4, 5, 7)]
    found = pop_bwd(*ctx.saved_tensors, *grads, ctx.block_size, ctx.offset, ctx.scale, needs)
    *tokens, dstate = spread(found, needs)
    return *tokens, None, dstate, None, None, None, None


pop_fwd.register_autograd(_differentiate, setup_context=_save)


def _launch_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    predictions: Sequence[int],
    block_size: int,
    offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    launch = kernels("pop_fwd").pop_fwd
    row = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    (q, q_pred), (k, k_pred), (v, v_pred), (out, pred) = (split_row(x, predictions) for x in (q, k, v, row))
    _, _, final = launch(
        q,
        k,
        v,
        q_pred,
        k_pred,
        v_pred,
        log_decay,
        state,
        reset,
        block_size,
        offset,
        scale,
        out=out,
        pred=pred,
    )
    return row, final


def _compute_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    predictions: Sequence[int],
    block_size: int,
    offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    spec = _spec(log_decay, reset, predictions, block_size, offset, scale, q.dtype)
    row, final = torch_backend.pop((q, k, v), state, spec)
    return row.contiguous(), own(final, state)


def _fake_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    predictions: Sequence[int],
    block_size: int,
    offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    num_predictions, size = predictions
    length = q.shape[1] - num_predictions * size
    torch._check(
        length >= 0,
        lambda: f"rows of {q.shape[1]} tokens do not hold {num_predictions} predictions of {size}",
    )
    final = _fake_sequence(q, k, v, log_decay, state, reset, length, num_predictions, block_size, offset)
    return v.new_empty(v.shape), final


pop_rows_fwd = kernel_op(
    "pop_rows_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? reset, SymInt[] predictions, "
    "SymInt block_size, SymInt offset, float scale) -> (Tensor, Tensor)",
    launch=_launch_rows,
    compute=_compute_rows,
    fake=_fake_rows,
)


def _compute_row_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    grad_row: Tensor | None,
    grad_state: Tensor | None,
    predictions: Sequence[int],
    block_size: int,
    offset: int,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    grad_row = torch.zeros_like(v) if grad_row is None else grad_row
    spec = _spec(log_decay, reset, predictions, block_size, offset, scale, q.dtype)
    return _explicit_gradients((q, k, v), state, [grad_row], grad_state, spec, needs)


def _launch_row_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    grad_row: Tensor | None,
    grad_state: Tensor | None,
    predictions: Sequence[int],
    block_size: int,
    offset: int,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The kernels write both parts of each row's gradient where they belong."""
    rows = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((q, k, v), needs, strict=False)
    ]
    views = [(None, None) if row is None else split_row(row, predictions) for row in rows]
    (q, q_pred), (k, k_pred), (v, v_pred) = (split_row(x, predictions) for x in (q, k, v))
    grad_out, grad_pred = (None, None) if grad_row is None else split_row(grad_row, predictions)
    *_, dstate = kernels("pop_bwd").pop_bwd(
        q,
        k,
        v,
        q_pred,
        k_pred,
        v_pred,
        log_decay,
        state,
        reset,
        grad_out,
        grad_pred,
        grad_state,
        block_size,
        offset,
        scale,
        [*needs[:3], *needs[:3], needs[3]],
        out=[main for main, _ in views] + [pred for _, pred in views],
    )
    return [grad for grad in (*rows, dstate) if grad is not None]


def _fake_row_gradients(*arguments: Any) -> list[Tensor]:
    return gradients_like((*arguments[:3], arguments[4]), arguments[-1])


pop_rows_bwd = gradient_op(
    "pop_rows_bwd",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? reset, Tensor? grad_row, "
    "Tensor? grad_state, SymInt[] predictions, SymInt block_size, SymInt offset, float scale, bool[] needs) "
    "-> Tensor[]",
    launch=_launch_row_gradients,
    compute=_compute_row_gradients,
    fake=_fake_row_gradients,
)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.predictions, ctx.block_size, ctx.offset, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate_rows(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    found = pop_rows_bwd(
        *ctx.saved_tensors, *grads, ctx.predictions, ctx.block_size, ctx.offset, ctx.scale, needs
    )
    dq, dk, dv, dstate = spread(found, needs)
    return dq, dk, dv, None, dstate, None, None, None, None, None


pop_rows_fwd.register_autograd(_differentiate_rows, setup_context=_save_rows)

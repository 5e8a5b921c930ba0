"""The PyTorch backend: it chooses between eager and plain forms, and gives the eager ones their gradients.

In eager PyTorch, chunkwise mode, packed sequences and POP have gradients by explicit formulas (`eager`,
`packed`). Compilers, `torch.func` transforms, forward-mode AD and second derivatives must see every
operation; for them the `plain` forms run. The other modes are always plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from retpop import position
from retpop.arguments import (
    Inputs,
    are_batched,
    is_open_length,
    is_transformed,
    without_autocast,
    zero_state,
)
from retpop.ops.powers import DecayPowers
from retpop.ops.rows import PopSpec
from retpop.ops.torch_backend import eager, exported, packed, plain
from retpop.ops.torch_backend.plain import DEFAULT_CHUNK_SIZE
from retpop.position import Phases, Rotation

NAME = "torch"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class Form(Protocol):
    """An operation on tokens and a state, in plain operations and by formulas with explicit gradients."""

    @property
    def powers(self) -> DecayPowers:
        """The decays, with the scale c."""

    @property
    def reset(self) -> Tensor | None:
        """The mask that the formulas read beside their inputs, if any."""

    def with_powers(self, powers: DecayPowers) -> Form:
        """The same form with other powers."""

    def plain(self, tokens: Sequence[Tensor], state: Tensor) -> tuple[Tensor, ...]:
        """The outputs, one for every three tensors of tokens, and the final state."""

    def forward(
        self, tokens: Sequence[Tensor], state: Tensor, keep: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The outputs, the final state, and, with ``keep``, the states that `gradients` needs."""

    def gradients(
        self, tokens: Sequence[Tensor], grads: Sequence[Tensor], states: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The needed gradients of tokens, ln γ and state, from those of the results of `plain`."""


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    *,
    mode: str,
    state: Tensor | None,
    chunk_size: int | None,
    packing: packed.Packing | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Retention of inputs (B, T, H, D) in one of the three modes; returns outputs and final state."""
    out_dtype = out_dtype or v.dtype
    chunk_size = chunk_size or DEFAULT_CHUNK_SIZE
    if packing is not None and not packing.cuts_rows:
        state, packing = packing.restart(state), None
    form: Form
    if _is_one_operation(q, mode, packing):
        rows = q.shape[0] if packing is None else packing.num_sequences
        cuts = (None, None) if packing is None else (packing.cu_seqlens, packing.reset)
        state = zero_state(q, v, rows) if state is None else state
        return exported.chunkwise(
            q, k, v, powers.log_decay, state, *cuts, powers.scale, chunk_size, out_dtype
        )
    if packing is not None:
        state = zero_state(q, v, packing.num_sequences) if state is None else state
        if mode != "chunkwise" or packing.longest < 2:
            return packed.retention(
                q, k, v, powers, mode=mode, state=state, packing=packing, out_dtype=out_dtype
            )
        form = packed.Chunks(powers, packing.plan(chunk_size), out_dtype)
    elif mode != "chunkwise" or q.shape[1] < 2:
        return plain.retention(
            q, k, v, powers, mode=mode, state=state, chunk_size=chunk_size, out_dtype=out_dtype
        )
    else:
        state = zero_state(q, v, q.shape[0]) if state is None else state
        form = eager.Chunks(powers, chunk_size, out_dtype)
    out, final = _run(form, (q, k, v), state)
    return out, final


def pop(tokens: Sequence[Tensor], state: Tensor | None, spec: PopSpec) -> tuple[Tensor, ...]:
    """POP of three rows, or of sequence and prediction tensors; returns outputs and final state."""
    state = zero_state(tokens[0], tokens[2], tokens[0].shape[0]) if state is None else state
    return _run(eager.Pop(spec), tokens, state)


def gradients(
    form: Form,
    tokens: Sequence[Tensor],
    state: Tensor,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The needed gradients of a form's tokens, ln γ and state, from those of its results; None for zeros."""
    outs, final, states = form.forward(tokens, state, keep=True)
    above = [torch.zeros_like(x) if g is None else g for x, g in zip((*outs, final), grads, strict=True)]
    return form.gradients(tokens, above, states, needs)


def rotation(positions: Tensor, frequencies: Tensor, kind: str, num_heads: int) -> Rotation | Phases:
    """The rotation of tokens at ``positions``, for `rotate`."""
    if kind == "retnet" and not torch.compiler.is_compiling():
        return position.phases_at(positions, frequencies, num_heads)
    return position.rotation_at(positions, frequencies, kind)


def rotate(
    q: Tensor, k: Tensor, rotation: Rotation | Phases, kind: str, spec: PopSpec | None = None
) -> tuple[Tensor, Tensor]:
    """`retpop.position.rotate` of both; with ``spec`` of rows, q perhaps a short one."""
    own = rotation if spec is None else type(rotation)(*(spec.readers(x) for x in rotation))
    return position.rotate(q, own, kind), position.rotate(k, rotation, kind)


def head_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, kind: str, eps: float) -> Tensor:
    """Each head of (..., H, Dv) normalised over its features; statistics in float32 or wider.

    Args:
        x: the heads' outputs.
        weight, bias: (H, Dv), or None.
        kind: "groupnorm" (mean and variance) or "rmsnorm" (root mean square).
        eps: added to the variance or to the mean square.

    Source: RetNet, arXiv 2307.08621, equation 8 (GroupNorm, one group a head).
    """
    normalize = F.layer_norm if kind == "groupnorm" else F.rms_norm
    x = normalize(x, x.shape[-1:], eps=eps)
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def gated_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    eps: float,
    activation: str,
) -> Tensor:
    """``activation`` of the gate, times `head_norm` of x: all (..., H, Dv); the result in gate's dtype."""
    if gate.is_cpu:  # on a part of a projection's output, activations take two to three times as long
        gate = gate.contiguous()
    y = ACTIVATIONS[activation](gate) * head_norm(x, weight, bias, kind=kind, eps=eps)
    return y if y.dtype == gate.dtype else y.to(gate.dtype)


def describe(inputs: Inputs, shape: Sequence[int], mode: str, block_size: int | None) -> str:
    """The form that runs, for people."""
    return f"{mode} form"


def _is_one_operation(q: Tensor, mode: str, packing: packed.Packing | None) -> bool:
    """Whether a graph, or a call without values, holds the whole operation (see `exported`)."""
    if packing is not None:
        return not packing.is_known
    return mode != "parallel" and is_open_length(q.shape[1]) and not is_transformed()


def _run(form: Form, tokens: Sequence[Tensor], state: Tensor) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling() or _is_watched():
        return form.plain(tokens, state)
    inputs = *tokens, form.powers.log_decay, state
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        results: tuple[Tensor, ...] = _ByFormula.apply(_without_graph(form), *inputs)
        return results
    outs, final, _ = form.forward(tokens, state, keep=False)
    return *outs, final


def _is_watched() -> bool:
    """Whether plain operations must be visible: to a transform, forward-mode AD or a trace."""
    return is_transformed() or torch.jit.is_tracing()


def _without_graph(form: Form) -> Form:
    powers = form.powers
    return form.with_powers(powers.of(powers.log_decay.detach())) if powers.log_decay.requires_grad else form


class _ByFormula(torch.autograd.Function):
    """A form with its gradients; it keeps its inputs and the states between blocks."""

    @staticmethod
    def forward(ctx: Any, form: Form, *inputs: Tensor) -> tuple[Tensor, ...]:
        *tokens, _, state = inputs
        outs, final, states = form.forward(tokens, state, keep=True)
        ctx.form = form
        ctx.save_for_backward(*inputs, states, form.reset)  # so that later writes into them are noticed
        needs = ctx.needs_input_grad[1:]
        carried = needs[1] or needs[2] or any(needs[-2:])  # keys, values, ln γ and state
        own = [any(needs[3 * i : 3 * i + 3]) for i in range(len(outs))]
        results = zip((*outs, final), (*own, False), strict=True)
        ctx.mark_non_differentiable(*(x for x, needed in results if not (needed or carried)))
        return *outs, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, states, _ = ctx.saved_tensors
        with without_autocast(states.device):
            # Second derivatives and batched gradients go by autograd through the plain form.
            if torch.is_grad_enabled() or _is_watched() or are_batched(grads):
                found = _plain_gradients(ctx.form, inputs, grads)
            else:
                found = ctx.form.gradients(inputs[:-2], grads, states, ctx.needs_input_grad[1:])
        return None, *found


def _plain_gradients(
    form: Form, inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    with torch.enable_grad():
        *tokens, log_decay, state = inputs = [x.view_as(x) for x in inputs]  # even of one tensor twice
        results = form.with_powers(form.powers.of(log_decay)).plain(tokens, state)
        pairs = [pair for pair in zip(results, grads, strict=True) if pair[0].requires_grad]
    if not pairs:  # for example with no tokens
        return [None] * len(inputs)
    wanted = [x for x in inputs if x.requires_grad]
    results, grads = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(results, wanted, grads, create_graph=torch.is_grad_enabled(), allow_unused=True)
    )
    return [next(found) if x.requires_grad else None for x in inputs]

"""POP, parallel observation prediction: the public function."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from retpop.arguments import Inputs, cast_inputs, state_dtype, without_autocast
from retpop.ops import triton_backend
from retpop.ops.checks import check_blocks, check_pop, check_reset
from retpop.ops.dispatch import choose_backend, may_run_kernels
from retpop.ops.powers import DecayPowers, default_scale
from retpop.ops.rows import PopSpec
from retpop.ops.slices import Slices, op_facts


def pop_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    *,
    block_size: int,
    offset: int = 0,
    state: Tensor | None = None,
    scale: float | None = None,
    reset: Tensor | None = None,
    context_parallel: object = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Parallel observation prediction: retention over blocks, and prediction blocks that branch off from it.

    The sequence is N blocks of L tokens; B_n is the state after n of them. There are P prediction blocks of
    M tokens each; prediction p runs from B_(p+offset) and leaves no trace in the sequence:

        o_(p,i) = c · q_i ( γ^(i+1) B_(p+offset) + Σ_{j<=i} γ^(i-j) k_jᵀ v_j )

    Gradients flow from the predictions through the block states into the sequence. Training a world model
    takes offset 0 and P = N; imagination one block and one prediction after it, N = P = offset = 1.

    Args:
        q, k: queries and keys of the sequence, (B, T, H, Dk) with T = N·L; N may be 0.
        v: its values, (B, T, H, Dv).
        q_pred, k_pred: queries and keys of the predictions, (B, P, M, H, Dk); P and M may be 0.
        v_pred: their values, (B, P, M, H, Dv).
        log_decay: ln γ per head, (H,), float32 or float64, at most 0; -inf is γ = 0. It is used in the
            state's dtype, so pass it in float64 with float64 inputs. It may require a gradient.
        block_size: L, at least 1; divides T.
        offset: the block boundary at which prediction 0 starts, 0 <= offset <= N; P <= N + 1 - offset.
        state: B_0, (B, H, Dk, Dv), float32 (float64 with float64 inputs), or None for zeros.
        scale: c; None: Dk^-0.5.
        reset: (B, N), bool: blocks that start a new episode. Where reset[:, n], B_n is set to 0 before block
            n and its prediction read it. reset[:, 0] drops the given state; B_N is never reset.
        context_parallel: a process group whose ranks hold whole blocks of the sequences, in rank order, each
            with the predictions that start from its own blocks; see `retpop.distributed.context_parallel`.
        backend: "auto", "torch", "triton" or "reference"; see `retpop.explain_backend`.

    Returns:
        out: (B, T, H, Dv), in v's dtype.
        pred: (B, P, M, H, Dv), in v's dtype.
        state: B_N, (B, H, Dk, Dv), float32 (float64 with float64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what was wanted.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: REM, arXiv 2402.05643, section 3.2.
    """
    given = ((q, k, v, q_pred, k_pred, v_pred), log_decay, state, reset)
    options = (block_size, offset, scale, backend)
    may_repeat = context_parallel is None and may_run_kernels(backend, q)
    if may_repeat:
        results = triton_backend.known_pop.run(given, log_decay, options)
        if results is not None:
            return tuple(results)
    q, k, v, q_pred, k_pred, v_pred = tokens = cast_inputs(q, k, v, q_pred, k_pred, v_pred)
    where = "pop_retention()"
    check_pop(where, q, k, v, q_pred, k_pred, v_pred, log_decay, state=state, scale=scale)
    block_size, offset = check_blocks(where, q.shape[1], q_pred.shape[1], block_size, offset)
    check_reset(where, reset, "q", q, block_size)
    inputs = Inputs(q.device, q.dtype, q.shape[-1], v.shape[-1])
    chosen, _ = choose_backend(where, backend, inputs)
    powers = DecayPowers(log_decay, default_scale(scale, q.shape[-1]), state_dtype(q.dtype))
    spec = PopSpec(powers, (q_pred.shape[1], q_pred.shape[2]), block_size, offset, reset)
    if may_repeat and chosen is triton_backend:
        numbers = (spec.predictions, block_size, offset, powers.scale, None)
        triton_backend.known_pop.keep(given, options, (*tokens, powers.given), numbers)
    run = partial(chosen.pop, tokens, spec=spec)
    with without_autocast(q.device):
        if context_parallel is None:
            out, pred, final = run(state=state)
        else:
            facts = op_facts(k, v, state)
            slices = Slices.of(where, context_parallel, q, facts, reset, block_size)
            out, pred, final = slices.run(run, k, v, state, powers)
    return out, pred, final

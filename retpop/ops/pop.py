"""POP, parallel observation prediction: the public function, and the unchecked one that layers call."""

from __future__ import annotations

from torch import Tensor

from retpop.ops import reference, torch_backend, triton_backend
from retpop.ops.autocast import cast_inputs, without_autocast
from retpop.ops.checks import check_pop
from retpop.ops.decay_powers import DecayPowers, default_scale
from retpop.ops.dispatch import BackendName, choose_backend
from retpop.ops.dtypes import state_dtype
from retpop.ops.rows import join_row, split_row
from retpop.ops.torch_forms import PopSpec
from retpop.ops.triton_backend import Inputs


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
            state's dtype, so float64 inputs want it in float64.
        block_size: L, at least 1; divides T.
        offset: the block boundary at which prediction 0 starts, 0 <= offset <= N; P <= N + 1 - offset.
        state: B_0, (B, H, Dk, Dv), float32 (float64 with float64 inputs), or None for zeros.
        scale: c; None: Dk^-0.5.
        reset: (B, N), bool: a block that starts a new episode, B_n := 0 where reset[:, n], before anything
            reads B_n. reset[:, 0] drops the given state; B_N is never reset.
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
    q, k, v, q_pred, k_pred, v_pred = cast_inputs(q, k, v, q_pred, k_pred, v_pred)
    check_pop(
        q,
        k,
        v,
        q_pred,
        k_pred,
        v_pred,
        log_decay,
        block_size=block_size,
        offset=offset,
        state=state,
        scale=scale,
        reset=reset,
    )
    inputs = Inputs(q.device, q.dtype, q.shape[-1], v.shape[-1])
    chosen, _ = choose_backend("pop_retention()", backend, inputs)
    powers = DecayPowers(log_decay, default_scale(scale, q.shape[-1]), state_dtype(q.dtype))
    return run_pop(
        (q, k, v),
        (q_pred, k_pred, v_pred),
        powers,
        block_size=block_size,
        offset=offset,
        state=state,
        reset=reset,
        backend=chosen,
    )


def run_pop(
    main: tuple[Tensor, Tensor, Tensor],
    pred: tuple[Tensor, Tensor, Tensor],
    powers: DecayPowers,
    *,
    block_size: int,
    offset: int,
    state: Tensor | None,
    reset: Tensor | None,
    backend: BackendName,
) -> tuple[Tensor, Tensor, Tensor]:
    """`pop_retention` after its checks, of (q, k, v) twice, on a backend that has been chosen."""
    q, k, v, q_pred, k_pred, v_pred = cast_inputs(*main, *pred)
    with without_autocast(q.device):
        if backend == "reference":
            return reference.pop_retention(
                q,
                k,
                v,
                q_pred,
                k_pred,
                v_pred,
                powers.log_decay,
                block_size=block_size,
                offset=offset,
                state=state,
                scale=powers.scale,
                reset=reset,
            )
        if backend == "triton":
            return triton_backend.pop_retention(
                q,
                k,
                v,
                q_pred,
                k_pred,
                v_pred,
                powers,
                block_size=block_size,
                offset=offset,
                state=state,
                reset=reset,
            )
        return torch_backend.pop_retention(
            q,
            k,
            v,
            q_pred,
            k_pred,
            v_pred,
            powers,
            block_size=block_size,
            offset=offset,
            state=state,
            reset=reset,
        )


def run_pop_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    *,
    predictions: tuple[int, int],
    block_size: int,
    offset: int,
    state: Tensor | None,
    reset: Tensor | None,
    backend: BackendName,
    main_out: str = "all",
) -> tuple[Tensor, Tensor]:
    """`run_pop` of rows (B, T + P·M, H, D), see `retpop.ops.rows`: a row of outputs, and the final state.

    With ``main_out="last"``, for the torch backend alone, queries and outputs are short rows.
    """
    if backend == "triton":
        q, k, v = cast_inputs(q, k, v)
        return triton_backend.pop_rows(
            q,
            k,
            v,
            powers,
            predictions=predictions,
            block_size=block_size,
            offset=offset,
            state=state,
            reset=reset,
        )
    if backend == "torch":
        q, k, v = cast_inputs(q, k, v)
        spec = PopSpec(powers, predictions, block_size, offset, reset, main_out)
        with without_autocast(q.device):
            return torch_backend.pop_rows(q, k, v, spec, state=state)
    (q, q_pred), (k, k_pred), (v, v_pred) = (split_row(x, predictions) for x in (q, k, v))
    out, pred, state = run_pop(
        (q, k, v),
        (q_pred, k_pred, v_pred),
        powers,
        block_size=block_size,
        offset=offset,
        state=state,
        reset=reset,
        backend=backend,
    )
    return join_row(out, pred), state

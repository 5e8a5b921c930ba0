"""Retention: the public function."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from retpop.arguments import Inputs, cast_inputs, state_dtype, without_autocast
from retpop.ops import triton_backend
from retpop.ops.checks import check_retention
from retpop.ops.dispatch import choose_backend, may_run_kernels
from retpop.ops.powers import DecayPowers, default_scale
from retpop.ops.slices import Slices, op_facts
from retpop.ops.torch_backend.packed import Packing


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    mode: str = "chunkwise",
    state: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    context_parallel: object = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Retention: a linear recurrence with a fixed decay per head.

        S_n = γ S_{n-1} + k_nᵀ v_n,    o_n = c · q_n S_n

    Args:
        q, k: queries and keys, (B, T, H, Dk), float64, float32, float16 or bfloat16; T may be 0.
        v: values, (B, T, H, Dv), of the same dtype.
        log_decay: ln γ per head, (H,), float32 or float64, at most 0; -inf is γ = 0. It is used in the
            state's dtype, so pass it in float64 with float64 inputs. It may require a gradient.
        mode: "parallel" (quadratic in T, one matrix product), "chunkwise" (linear in T) or "recurrent" (a
            loop over T). All give the same outputs and the same state.
        state: (B, H, Dk, Dv), float32 (float64 with float64 inputs), carried from what came before, or None
            for the start of a sequence.
        scale: c; None: Dk^-0.5.
        chunk_size: tokens in a chunk of the chunkwise mode, a power of two, at least 16; None: 64. The
            Triton backend ignores it: its kernels choose their chunks by the GPU.
        cu_seqlens: boundaries of S sequences packed into one row, (S + 1,), int32 or int64, from 0 to T. B is
            then 1 and states are (S, H, Dk, Dv); an empty sequence's state passes through.
        reset: (B, T), bool: where reset[:, t], the state is set to 0 before token t, as if the sequence
            were cut there; reset[:, 0] drops the given state.
        context_parallel: a process group whose ranks hold slices of the sequences, in rank order; see
            `retpop.distributed.context_parallel`. cu_seqlens then has the boundaries in the whole row.
        backend: "auto", "torch", "triton" or "reference"; see `retpop.explain_backend`.

    Returns:
        out: (B, T, H, Dv), in v's dtype.
        state: after the last token, (B, H, Dk, Dv), float32 (float64 with float64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what came and what was wanted.
        RuntimeError: the named backend cannot run here; the message says why.

    Source: RetNet, arXiv 2307.08621, equations 5 (parallel), 6 (recurrent), 7 (chunkwise).
    """
    given, options = (q, k, v, log_decay, state, cu_seqlens, reset), (mode, scale, chunk_size, backend)
    may_repeat = cu_seqlens is reset is context_parallel is None and may_run_kernels(backend, q)
    if may_repeat:
        results = triton_backend.known_retention.run(given, log_decay, options)
        if results is not None:
            return results
    q, k, v = cast_inputs(q, k, v)
    decays = check_retention(
        q,
        k,
        v,
        log_decay,
        mode=mode,
        state=state,
        scale=scale,
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
        reset=reset,
    )
    inputs = Inputs(q.device, q.dtype, q.shape[-1], v.shape[-1])
    chosen, _ = choose_backend("retention()", backend, inputs)
    powers = DecayPowers(log_decay, default_scale(scale, q.shape[-1]), state_dtype(q.dtype), decays)
    if may_repeat and chosen is triton_backend:
        used = (q, k, v, powers.given)
        triton_backend.known_retention.keep(given, options, used, (powers.scale, None))
    slices = None
    if context_parallel is not None:
        facts = op_facts(k, v, state)
        slices = Slices.of("retention()", context_parallel, q, facts, reset, cu_seqlens=cu_seqlens)
        cu_seqlens = slices.cu_seqlens
    cut = cu_seqlens is not None or reset is not None
    run = partial(
        chosen.retention,
        q,
        k,
        v,
        powers,
        mode=mode,
        chunk_size=None if chunk_size is None else int(chunk_size),
        packing=Packing("retention()", cu_seqlens, q.shape[1], reset) if cut else None,
    )
    with without_autocast(q.device):
        if slices is None:
            return run(state=state)
        out, final = slices.run(run, k, v, state, powers)
    return out, final

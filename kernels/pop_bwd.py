"""POP, backward: gradients of queries, keys and values, of their prediction twins and of the first state.

With S_i the state after token i, g_i the gradient of output o_i and G_j that of the state after token j:

    dq_i = c g_i S_iᵀ          dk_j = v_j G_jᵀ          dv_j = k_j G_j

dq has the form of an output o_i = c q_i S_i, so it is the forward kernel itself on (g, v, k) with the
states transposed. dk and dv come from reverse sweeps (pop_bwd_sweep.py): one for both where a program holds
all of E, at head dims up to 64, or 128 (`configs_bwd`); beyond, one each, in slices like the forward's. A
sweep for both cannot be sliced, since dk is a sum over Dv and floats are never added atomically. A small
batch is split at the block boundaries, as in pop_fwd. If the forward was split too, it has found the state
before each block, and given them, dq is one launch.

In one pass states are recomputed and not saved by the forward. Counted in tensors of all tokens, dq moves 4
(g, v, k, dq) and the sweep for both 6, where 7 have to move. With saved states the forward would move 5
instead of 4, and one sweep for all three gradients 8 instead of 10: 13 instead of 14 in all at REM's shape.
But each layer would keep a quarter more in memory for the backward, and a program two states instead of one
in its registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from .configs import padded, pred_tiles
from .configs_bwd import PopBwdConfig, Sweep, pop_bwd_config, sweeps_for
from .launch import (
    Launch,
    Target,
    Tensors,
    dot_precision,
    launched,
    named_strides,
    target_of,
    token_strides,
    with_contiguous_rows,
    zero,
)
from .pop_bwd_sweep import pop_bwd_kernel
from .pop_fwd import plan_pop_fwd
from .split import plan_scan

_INPUTS = ("q", "k", "v", "q_pred", "k_pred", "v_pred", "state")

_READ = ("q", "q_pred", "k", "k_pred", "v", "v_pred", "g", "g_pred")
"""The token tensors that a sweep reads, g the outputs' gradient."""


def plan_pop_bwd(
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
    *,
    states: Tensor | None = None,
    out: Sequence[Tensor | None] | None = None,
    config: PopBwdConfig | None = None,
    target: Target | None = None,
) -> tuple[list[Launch], list[Tensor | None]]:
    """The launches of `pop_bwd`, and the tensors that they fill."""
    grads = _allocate((q, k, v, q_pred, k_pred, v_pred, state), needs, out)
    results = list(grads.values())
    if grad_pred is None:
        # Predictions without a gradient pass none on, so they are left out.
        zero(*(grads[name] for name in ("q_pred", "k_pred", "v_pred")))
        q_pred, k_pred, v_pred = q_pred[:, :0], k_pred[:, :0], v_pred[:, :0]
        grad_pred = v_pred if grad_out is None else v_pred.to(grad_out.dtype)
        grads |= dict.fromkeys(("q_pred", "k_pred", "v_pred"))
    B, T, H, Dk = q.shape
    Dv = v.shape[-1]
    N = T // block_size
    P, M = q_pred.shape[1:3] if q_pred.numel() > 0 else (0, 0)
    num_boundaries = max(N, P + offset if P > 0 else 0)
    if B * num_boundaries == 0 or (grad_out is None and P == 0 and grad_state is None):
        zero(*results)
        if grads["state"] is not None and grad_state is not None:
            grads["state"].copy_(grad_state)
        return [], results
    target = target or target_of(q.device)
    precision = dot_precision(q.dtype, target.architecture, (Dk, Dv))
    lengths = (block_size if N > 0 else 1, M)
    if config is None:
        config = pop_bwd_config(
            pairs=B * H,
            num_blocks=N,
            lengths=lengths,
            head_dims=(Dk, Dv),
            dtype=q.dtype,
            precision=precision,
            **target._asdict(),
        )
    g, g_pred = grad_out, grad_pred
    if g is None:
        g = torch.zeros(Dv, dtype=grad_pred.dtype, device=v.device).expand(v.shape)
    launches: list[Launch] = []
    with_q = grads["q"] is not None and grad_out is not None
    with_q_pred = grads["q_pred"] is not None and P > 0
    if with_q or with_q_pred:
        twins = [x if with_q_pred else x[:, :0] for x in (g_pred, v_pred, k_pred)]
        launches, _ = plan_pop_fwd(
            *(g, v, k, *twins, log_decay),
            None if state is None else state.mT,
            *(reset, block_size, offset, scale),
            states=None if states is None else states.mT,
            out=grads["q"],
            pred=grads["q_pred"],
            wanted=(with_q, with_q_pred, False),
            config=config.queries,
            target=target,
        )
    zero(None if with_q else grads["q"], None if with_q_pred else grads["q_pred"])
    read = (q, q_pred, k, k_pred, v, v_pred, g, g_pred)
    tokens = dict(zip(_READ, map(with_contiguous_rows, read), strict=True))
    common = {
        **{"p_log_decay": log_decay.contiguous(), "scale": scale, "N": N, "L": lengths[0], "P": P, "M": M},
        **{"offset": offset, "num_boundaries": num_boundaries, "H": H, "PRECISION": precision},
    }
    sought = {f"d{name}": grads[name] for name in ("k", "k_pred", "v", "v_pred")}
    if all(grads[name] is None for name in ("k", "v", "state")):
        # The gradients of k_pred and v_pred come from their own predictions only.
        common |= {"N": 0, "L": 0, "offset": 0, "num_boundaries": P}
        sweeps = _plan_alone(tokens | sought, common, config)
    else:
        sweeps = _plan_sweeps(tokens | sought, common, reset, grad_state, grads["state"], config)
    return launches + sweeps, results


def _allocate(
    inputs: Sequence[Tensor | None], needs: Sequence[bool], out: Sequence[Tensor | None] | None
) -> dict[str, Tensor | None]:
    """By name, a tensor for each gradient that is needed: that of `out`, or a new one."""
    views = dict(zip(_INPUTS, out or (), strict=False))
    grads = dict.fromkeys(_INPUTS)
    for name, x, need in zip(_INPUTS, inputs, needs, strict=True):
        if need and x is not None:
            view = views.get(name)
            grads[name] = torch.empty(x.shape, dtype=x.dtype, device=x.device) if view is None else view
    return grads


def _plan_alone(tokens: Tensors, common: dict[str, Any], config: PopBwdConfig) -> list[Launch]:
    """The sweeps for gradients of k_pred and v_pred alone: each prediction is a program of its own."""
    if common["P"] == 0:
        return []
    return [_launch(sweep, common, None, None, None, split=True) for sweep in sweeps_for(tokens, config)]


def _plan_sweeps(
    tokens: Tensors,
    common: dict[str, Any],
    reset: Tensor | None,
    after: Tensor | None,
    before: Tensor | None,
    config: PopBwdConfig,
) -> list[Launch]:
    """The reverse sweeps that fill dk and dv in `tokens`, and `before`, the gradient of the first state.

    Args:
        tokens: by role; dk and dv with their twins are None where not wanted.
        common: arguments that all kernels share.
        reset: (B, N) or None.
        after, before: the gradients of the last and of the first state, (B, H, Dk, Dv), or None.
        config: which sweeps, and how each divides its work.
    """
    sweeps = sweeps_for(tokens, config)
    nothing = {name: None for name in tokens if name.startswith(("dk", "dv"))}
    only_states = Sweep(config.states, {**tokens, **nothing}, swapped=False)
    if not config.split:
        sweeps = sweeps or ([only_states] if before is not None else [])
        befores = [before, None]
        return [
            _launch(sweep, common, reset, after, found, split=False)
            for sweep, found in zip(sweeps, befores, strict=False)
        ]
    if not sweeps and before is None:
        return []
    (B, T, H, Dk), Dv, boundaries = tokens["q"].shape, tokens["v"].shape[-1], common["num_boundaries"]
    added = torch.empty((B * boundaries, H, Dk, Dv), dtype=torch.float32, device=tokens["q"].device)
    shared = {
        **{"p_log_decay": common["p_log_decay"], "p_bounds": None, "H": H, "T": T, "num_sequences": B},
        **{"stretch": common["L"], "per_sequence": boundaries, "SEQUENCES": 0, "EARLY": False},
    }
    scan, ends = plan_scan(added, after, before, shared, reset=reset, reverse=True)
    added, ends = (x.unflatten(0, (B, boundaries)) for x in (added, ends))
    return [
        _launch(only_states, common, None, None, added, split=True),
        scan,
        *(_launch(sweep, common, None, ends, None, split=True) for sweep in sweeps),
    ]


def _launch(
    sweep: Sweep,
    common: dict[str, Any],
    reset: Tensor | None,
    after: Tensor | None,
    before: Tensor | None,
    *,
    split: bool,
) -> Launch:
    """One reverse sweep; `after` and `before` are (B, H, Dk, Dv), in a split (B, boundaries, H, Dk, Dv)."""
    config, tokens = sweep.config, sweep.tokens
    if sweep.swapped:
        after, before = (None if x is None else x.mT for x in (after, before))
    B, Dk, Dv = tokens["q"].shape[0], tokens["q"].shape[-1], tokens["g"].shape[-1]
    programs = B * common["H"] * cdiv(Dv, config.cols_v)
    return Launch(
        kernel=pop_bwd_kernel,
        grid=(programs * common["num_boundaries"] if split else programs,),
        arguments={
            **common,
            **{f"p_{name}": x for name, x in tokens.items()},
            **token_strides(tokens),
            **{"p_after": after, "p_before": before, "p_reset": reset},
            **_state_strides("after", after),
            **_state_strides("before", before),
            **named_strides("reset", reset, "bn"),
            **{"DK": Dk, "DV": Dv, "COLS_K": padded(Dk), "COLS_V": config.cols_v, "TILE": config.tile},
            **{"PRED_TILES": pred_tiles(common["M"], config.tile), "SCALE_V": config.scale_v, "SPLIT": split},
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _state_strides(name: str, states: Tensor | None) -> dict[str, int]:
    if states is not None and states.dim() == 5:
        return named_strides(name, states, "bnhkv")
    return {**named_strides(name, states, "bhkv"), f"stride_{name}_n": 0}


def pop_bwd(
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
    *,
    states: Tensor | None = None,
    out: Sequence[Tensor | None] | None = None,
    config: PopBwdConfig | None = None,
) -> list[Tensor | None]:
    """Gradients of `pop_fwd`.

    Args:
        q, k, v, q_pred, k_pred, v_pred, log_decay, state, reset, block_size, offset, scale: as in `pop_fwd`.
        grad_out, grad_pred, grad_state: of its results, in their shapes; the first two in one dtype, the
            tokens' or float32, the last in float32; None for zeros.
        needs: which gradients to find: of q, k, v, q_pred, k_pred, v_pred, state.
        states: before all blocks, as `pop_fwd` returns them; None: they are found again.
        out: where to write the first six, each with a contiguous last dim, or None for a new tensor. They may
            be views of one tensor, but not of one that is read here.
        config: how to cut the reverse sweeps, or None for `configs_bwd.pop_bwd_config`.

    Returns:
        One gradient for each of `needs`, in the dtype and shape of what it belongs to; None where not needed.

    Raises:
        ValueError: a head dim is larger than the kernels hold.
    """
    tokens = (q, k, v, q_pred, k_pred, v_pred)
    arguments = (log_decay, state, reset, grad_out, grad_pred, grad_state, block_size, offset, scale)
    views = None if out is None else tuple(out)
    grads: list[Tensor | None] = launched(
        plan_pop_bwd,
        *tokens,
        *arguments,
        tuple(needs),
        states=states,
        target=target_of(q.device),
        out=views,
        config=config,
    )
    return grads

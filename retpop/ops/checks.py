"""Checks of the operations' arguments; messages name function, argument, the value and what was wanted.

Shapes, dtypes and devices are always checked. Values (NaN, sign, order) are read only in eager mode on CPU
tensors, so that no check synchronises a GPU or breaks a traced graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from retpop.arguments import (
    DECAY_DTYPES,
    INPUT_DTYPES,
    as_int,
    check_chunk_size,
    check_tensor,
    free_values,
    state_dtype,
)

MODES = ("parallel", "chunkwise", "recurrent")
MAIN_OUT = ("all", "last")


class Named(NamedTuple):
    """An argument and the name a message calls it by."""

    name: str
    value: Tensor


def check_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    mode: str,
    state: Tensor | None,
    scale: float | None,
    chunk_size: int | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
) -> list[float] | None:
    """Check the arguments of `retention`; return the log-decays' values if reading them is free."""
    where = "retention()"
    plain = scale is chunk_size is cu_seqlens is reset is None and mode in MODES
    # One quick test accepts valid arguments, because a single token is fast; the steps below find the fault.
    if not (plain and _fit(q, k, v, log_decay, state)):
        check_inputs(where, Named("q", q), Named("k", k), Named("v", v), "BTHD")
        check_log_decay(where, log_decay, q)
        check_scale(where, scale)
        check_mode(where, mode, chunk_size)
        rows = q.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens(where, cu_seqlens, "q", q)
            rows = cu_seqlens.shape[0] - 1
        check_reset(where, reset, "q", q)
        check_state(where, state, q, (rows, q.shape[2], q.shape[3], v.shape[3]))
    return check_decay_values(where, log_decay)


def check_pop(
    where: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None,
    scale: float | None,
) -> None:
    """Check the arguments of `pop_retention`, but for those of `check_blocks` and `check_reset`."""
    check_inputs(where, Named("q", q), Named("k", k), Named("v", v), "BTHD")
    check_inputs(where, Named("q_pred", q_pred), Named("k_pred", k_pred), Named("v_pred", v_pred), "BPMHD")
    for main, pred in (
        (Named("q", q), Named("q_pred", q_pred)),
        (Named("v", v), Named("v_pred", v_pred)),
    ):
        _check_same_kind(where, main, pred)
        for dim, axis, pred_axis in (("B", 0, 0), ("H", 2, 3), ("D", 3, 4)):
            if main.value.shape[axis] != pred.value.shape[pred_axis]:
                raise ValueError(
                    f"{where}: {pred.name} has {dim}={pred.value.shape[pred_axis]} but {main.name} has "
                    f"{dim}={main.value.shape[axis]} ({main.name} {_shape(main.value)}, "
                    f"{pred.name} {_shape(pred.value)}); they must share B, H and D."
                )
    check_log_decay(where, log_decay, q)
    check_decay_values(where, log_decay)
    check_scale(where, scale)
    check_state(where, state, q, (q.shape[0], q.shape[2], q.shape[3], v.shape[3]))


def check_layout(where: str, name: str, value: Tensor, layout: str) -> None:
    """Check that ``value`` is a floating-point tensor with one dimension for each letter of ``layout``."""
    check_tensor(where, name, value)
    if value.dim() != len(layout):
        raise ValueError(
            f"{where}: {name} has {value.dim()} dimensions {_shape(value)}; "
            f"it must have {len(layout)}, ({', '.join(layout)})."
        )
    if value.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"{where}: {name} is {value.dtype}; it must be float64, float32, float16 or bfloat16."
        )


def check_inputs(where: str, q: Named, k: Named, v: Named, layout: str) -> None:
    """Check that q, k and v agree in dtype, device and shape, except in the last dimension of v."""
    for name, value in (q, k, v):
        check_layout(where, name, value, layout)
    shared = layout[:-1]
    for other, dims in ((k, layout), (v, shared)):
        _check_same_kind(where, q, other)
        if other.value.shape[: len(dims)] == q.value.shape[: len(dims)]:
            continue
        for axis, dim in enumerate(dims):
            if other.value.shape[axis] != q.value.shape[axis]:
                rule = "q and k must have the same shape" if other is k else f"must share {_listed(shared)}"
                names = "" if other is k else f"{_listed([q.name, k.name, v.name])} "
                raise ValueError(
                    f"{where}: {other.name} has {dim}={other.value.shape[axis]} but {q.name} has "
                    f"{dim}={q.value.shape[axis]} ({q.name} {_shape(q.value)}, "
                    f"{other.name} {_shape(other.value)}); {names}{rule}."
                )
    for name, value in (q, v):
        if value.shape[-1] < 1 or value.shape[-2] < 1:
            raise ValueError(f"{where}: {name} is {_shape(value)}; H and D must be at least 1.")


def check_log_decay(where: str, log_decay: Tensor, q: Tensor) -> None:
    """Check ln γ except its values: (H,), float32 or float64."""
    check_tensor(where, "log_decay", log_decay)
    num_heads = q.shape[-2]
    if log_decay.shape != (num_heads,):
        raise ValueError(
            f"{where}: log_decay has shape {_shape(log_decay)}; it must be (H,) = ({num_heads},), one a head."
        )
    if log_decay.dtype not in DECAY_DTYPES:
        raise TypeError(
            f"{where}: log_decay is {log_decay.dtype}; it must be float32 or float64: in lower precision "
            "a decay near 1 is lost."
        )
    if log_decay.device != q.device:
        raise ValueError(f"{where}: log_decay is on {log_decay.device} but q is on {q.device}.")


def check_decay_values(where: str, log_decay: Tensor) -> list[float] | None:
    """Check that ln γ is at most 0, and return its values, if reading them is free."""
    values = free_values(log_decay)
    for value in values or ():
        if not value <= 0:  # NaN fails the comparison too
            raise ValueError(f"{where}: log_decay holds {value}; ln γ must be at most 0 and not NaN.")
    return values


def check_scale(where: str, scale: object) -> None:
    """Check the output scale: None or a finite number, NumPy's included."""
    if scale is None or isinstance(scale, torch.SymFloat):
        return
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"{where}: scale is {type(scale).__name__}; it must be a number or None.")
    if not math.isfinite(scale):
        raise ValueError(f"{where}: scale is {scale}; it must be finite.")


def check_mode(where: str, mode: str, chunk_size: object) -> int | None:
    """Check the mode, and that only chunkwise mode has a chunk size; returns the size as an int."""
    if mode not in MODES:
        raise ValueError(f"{where}: mode is {mode!r}; it must be one of {MODES}.")
    if chunk_size is None:
        return None
    if mode != "chunkwise":
        raise ValueError(
            f"{where}: chunk_size is {chunk_size} but mode is {mode!r}; only chunkwise has chunks."
        )
    return check_chunk_size(where, chunk_size)


def check_cu_seqlens(where: str, cu_seqlens: Tensor, name: str, x: Tensor) -> None:
    """Check the boundaries of packed sequences except their values: (S + 1,), with B = 1."""
    check_tensor(where, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: cu_seqlens is {cu_seqlens.dtype}; it must be int32 or int64.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{where}: cu_seqlens has shape {_shape(cu_seqlens)}; it must be (S + 1,).")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{where}: cu_seqlens is on {cu_seqlens.device} but {name} is on {x.device}.")
    if x.shape[0] != 1:
        raise ValueError(
            f"{where}: cu_seqlens was given but {name} has B={x.shape[0]}; packed input has B=1."
        )


def check_bounds(where: str, bounds: list[int], length: int) -> None:
    """Check the values of `cu_seqlens`, once they have been read: rising from 0 to T."""
    if bounds[0] != 0:
        raise ValueError(f"{where}: cu_seqlens starts at {bounds[0]}; it must start at 0.")
    if bounds[-1] != length:
        raise ValueError(
            f"{where}: cu_seqlens ends at {bounds[-1]} but there are T={length} tokens; they must agree."
        )
    if bounds != sorted(bounds):
        raise ValueError(
            f"{where}: cu_seqlens falls somewhere in {_abridged(bounds)}; it must never decrease."
        )


def check_state(where: str, state: Tensor | None, q: Tensor, shape: tuple[int, ...]) -> None:
    """Check a state of the op: its shape, device, and dtype float32 (float64 with float64 inputs)."""
    if state is None:
        return
    check_tensor(where, "state", state)
    if state.shape != shape:
        raise ValueError(
            f"{where}: state has shape {_shape(state)}; it must be {shape}, "
            "(B or number of packed sequences, H, Dk, Dv)."
        )
    wanted = state_dtype(q.dtype)
    if state.dtype != wanted:
        raise TypeError(f"{where}: state is {state.dtype}; with inputs in {q.dtype} it must be {wanted}.")
    if state.device != q.device:
        raise ValueError(f"{where}: state is on {state.device} but the inputs are on {q.device}.")


def check_blocks(
    where: str, length: int, num_predictions: int, block_size: object, offset: object
) -> tuple[int, int]:
    """Check that T is N whole blocks and that the P predictions start at boundaries that exist.

    Returns block_size and offset as ints.
    """
    size, first = as_int(where, "block_size", block_size), as_int(where, "offset", offset)
    if size < 1:
        raise ValueError(f"{where}: block_size is {size}; it must be at least 1.")
    if length % size:
        raise ValueError(f"{where}: T={length} is not a whole number of blocks of block_size {size}.")
    num_blocks = length // size
    if not 0 <= first <= num_blocks:
        raise ValueError(
            f"{where}: offset is {first}; with N={num_blocks} blocks it must be 0 to {num_blocks}."
        )
    if num_predictions > num_blocks + 1 - first:
        raise ValueError(
            f"{where}: P={num_predictions} predictions from offset {first} need as many boundaries, but "
            f"N={num_blocks} blocks leave N + 1 - offset = {num_blocks + 1 - first}."
        )
    return size, first


def check_main_out(where: str, main_out: str) -> None:
    """Check the choice of the sequence's outputs."""
    if main_out not in MAIN_OUT:
        raise ValueError(f"{where}: main_out is {main_out!r}; it must be one of {MAIN_OUT}.")


def check_reset(
    where: str, reset: Tensor | None, name: str, x: Tensor, block_size: int | None = None
) -> None:
    """Check the mask of tokens, (B, T), or of blocks, (B, N), that start a new episode: bool."""
    if reset is None:
        return
    check_tensor(where, "reset", reset)
    if reset.dtype != torch.bool:
        raise TypeError(f"{where}: reset is {reset.dtype}; it must be bool.")
    layout, length = ("(B, T)", x.shape[1]) if block_size is None else ("(B, N)", x.shape[1] // block_size)
    wanted = (x.shape[0], length)
    if tuple(reset.shape) != wanted:
        raise ValueError(f"{where}: reset has shape {_shape(reset)}; it must be {layout} = {wanted}.")
    if reset.device != x.device:
        raise ValueError(f"{where}: reset is on {reset.device} but {name} is on {x.device}.")


def _fit(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> bool:
    """Whether retention's tensors are valid, by one quick test."""
    if not (isinstance(q, Tensor) and isinstance(v, Tensor) and len(q.shape) == len(v.shape) == 4):
        return False
    (rows, length, heads, key_dim), value_dim = q.shape, v.shape[3]
    dtype, device = q.dtype, q.device
    return (
        isinstance(k, Tensor)
        and k.shape == q.shape
        and v.shape == (rows, length, heads, value_dim)
        and heads > 0
        and key_dim > 0
        and value_dim > 0
        and dtype in INPUT_DTYPES
        and dtype == k.dtype == v.dtype
        and isinstance(log_decay, Tensor)
        and log_decay.shape == (heads,)
        and log_decay.dtype in DECAY_DTYPES
        and device == k.device == v.device == log_decay.device
        and (
            state is None
            or (
                isinstance(state, Tensor)
                and state.shape == (rows, heads, key_dim, value_dim)
                and state.dtype == state_dtype(dtype)
                and state.device == device
            )
        )
    )


def _check_same_kind(where: str, first: Named, other: Named) -> None:
    if other.value.dtype != first.value.dtype:
        raise TypeError(
            f"{where}: {other.name} is {other.value.dtype} but {first.name} is {first.value.dtype}; "
            "the inputs must share one dtype."
        )
    if other.value.device != first.value.device:
        raise ValueError(
            f"{where}: {other.name} is on {other.value.device} but {first.name} is on {first.value.device}; "
            "the inputs must share one device."
        )


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _listed(names: Iterable[str]) -> str:
    *rest, last = dict.fromkeys(names)
    return ", ".join(rest) + " and " + last


def _abridged(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, ...]"

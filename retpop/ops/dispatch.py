"""Which backend runs a call: the only place that chooses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from retpop.ops import triton_backend
from retpop.ops.autocast import dtype_after
from retpop.ops.checks import MODES, check_blocks, check_layout
from retpop.ops.triton_backend import Inputs

BackendName = Literal["reference", "torch", "triton"]
BACKENDS = ("auto", "torch", "triton", "reference")


def choose_backend(where: str, backend: str, inputs: Inputs) -> tuple[BackendName, str]:
    """The backend that runs, and why.

    Args:
        where: the public function that asks; begins an error's message.
        backend: "auto", or the name of one; a named backend is never replaced by another.
        inputs: what is to be run.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    if backend == "reference":
        return "reference", "it was asked for by name"
    if backend == "torch":
        return "torch", "it was asked for by name"
    if backend not in BACKENDS:
        raise ValueError(f"{where}: backend is {backend!r}; it must be one of {BACKENDS}.")
    if backend == "auto" and inputs.device.type != "cuda":
        return "torch", f'"auto" takes it on {inputs.device.type}'
    reason = triton_backend.why_unavailable(*inputs)
    if backend == "triton":
        if reason is not None:
            raise RuntimeError(f'{where}: backend="triton" cannot run: {reason}; "torch" or "auto" can.')
        return "triton", "it was asked for by name"
    reason = reason or triton_backend.why_transformed()
    if reason is not None:
        return "torch", f'"auto" takes it because {reason}'
    return "triton", '"auto" takes it on such a GPU'


def explain_backend(
    q: Tensor,
    v: Tensor | None = None,
    *,
    mode: str = "chunkwise",
    block_size: int | None = None,
    backend: str = "auto",
) -> str:
    """Say which backend and which form would run for queries like ``q``, and why.

    Args:
        q: queries, (B, T, H, Dk); only their shape, dtype and device matter.
        v: values, (B, T, H, Dv); None: Dv is Dk.
        mode: "parallel", "chunkwise", "recurrent" or "pop".
        block_size: with "pop", tokens in a block and, it is assumed, in a prediction; None: left open.
        backend: as the op's argument.

    Returns:
        One sentence, for example ``torch backend, chunkwise form on cpu in float32: ...``.

    Raises:
        TypeError, ValueError, RuntimeError: as the op itself would.
    """
    where = "explain_backend()"
    for tensor_name, tensor in (("q", q), ("v", q if v is None else v)):
        check_layout(where, tensor_name, tensor, "BTHD")
    if mode not in (*MODES, "pop"):
        raise ValueError(f"{where}: mode is {mode!r}; it must be one of {(*MODES, 'pop')}.")
    if block_size is not None:
        if mode != "pop":
            raise ValueError(
                f"{where}: block_size is {block_size} but mode is {mode!r}; only pop has blocks."
            )
        check_blocks(where, q.shape[1], 0, block_size, 0)
    value_dim = q.shape[-1] if v is None else v.shape[-1]
    inputs = Inputs(q.device, dtype_after(q.device, q.dtype), q.shape[-1], value_dim)
    name, reason = choose_backend(where, backend, inputs)
    form = "token-by-token form" if name == "reference" else f"{mode} form"
    if name == "triton":
        form = triton_backend.describe(inputs, q.shape[:3], mode, block_size)
    dtype = str(inputs.dtype).removeprefix("torch.")
    return f"{name} backend, {form} on {q.device.type} in {dtype}: {reason}."

"""Which backend runs a call: the only place that chooses."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from retpop.ops import triton_backend
from retpop.ops.checks import MODES, check_layout

BackendName = Literal["reference", "torch"]
BACKENDS = ("auto", "torch", "triton", "reference")


def choose_backend(where: str, backend: str) -> tuple[BackendName, str]:
    """The backend that runs, and why.

    Args:
        where: the public function that asks; begins an error's message.
        backend: "auto", or the name of one; a named backend is never replaced by another.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    if backend == "reference":
        return "reference", "it was asked for by name"
    if backend == "torch":
        return "torch", "it was asked for by name"
    reason = triton_backend.why_unavailable()
    if backend == "triton":
        raise RuntimeError(f'{where}: backend="triton" cannot run: {reason}; "torch" or "auto" can.')
    if backend == "auto":
        return "torch", f'"auto" takes it because {reason}'
    raise ValueError(f"{where}: backend is {backend!r}; it must be one of {BACKENDS}.")


def explain_backend(q: Tensor, *, mode: str = "chunkwise", backend: str = "auto") -> str:
    """Say which backend and which form would run for queries like ``q``, and why.

    Args:
        q: queries, (B, T, H, Dk); only their shape, dtype and device matter.
        mode: "parallel", "chunkwise", "recurrent" or "pop".
        backend: as the op's argument.

    Returns:
        One sentence, for example ``torch backend, chunkwise form on cpu in float32: ...``.

    Raises:
        TypeError, ValueError, RuntimeError: as the op itself would.
    """
    where = "explain_backend()"
    check_layout(where, "q", q, "BTHD")
    if mode not in (*MODES, "pop"):
        raise ValueError(f"{where}: mode is {mode!r}; it must be one of {(*MODES, 'pop')}.")
    name, reason = choose_backend(where, backend)
    form = "token-by-token" if name == "reference" else mode
    dtype = str(q.dtype).removeprefix("torch.")
    return f"{name} backend, {form} form on {q.device.type} in {dtype}: {reason}."

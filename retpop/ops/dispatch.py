"""The backends, and the only place that chooses between them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor

from retpop._torch import constant_in_graphs
from retpop.arguments import Inputs, dtype_after
from retpop.ops import reference_backend, torch_backend, triton_backend
from retpop.ops.checks import MODES, Named, check_blocks, check_inputs
from retpop.ops.powers import DecayPowers
from retpop.ops.rows import PopSpec
from retpop.ops.torch_backend.packed import Packing
from retpop.ops.triton_backend.custom import interpreting, kernels, why_transformed
from retpop.position import Phases, Rotation

LARGEST_HEAD_DIM = 256

AMD_ARCHITECTURES = ("gfx942",)
"""AMD GPUs with the matrix cores and the shared memory that the kernels need."""


class Backend(Protocol):
    """A backend: a module with these functions, which take checked inputs outside of autocast."""

    NAME: str
    """The name by which a user chooses it."""

    def retention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        powers: DecayPowers,
        *,
        mode: str,
        state: Tensor | None,
        chunk_size: int | None,
        packing: Packing | None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Retention of (B, T, H, D); of packed sequences (1, T, H, D), with states (S, H, Dk, Dv).

        The outputs are in ``out_dtype``; None: the values'.
        """

    def pop(self, tokens: Sequence[Tensor], state: Tensor | None, spec: PopSpec) -> tuple[Tensor, ...]:
        """POP of three rows, or of the sequence's three tensors and the predictions' three.

        Returns:
            The outputs, as rows or as two tensors, and the final state. With ``spec.main_out == "last"`` the
            rows of queries and of outputs are short (`retpop.ops.rows`).
        """

    def rotation(
        self, positions: Tensor, frequencies: Tensor, kind: str, num_heads: int
    ) -> Rotation | Phases:
        """`retpop.position.rotation_at`, or `phases_at`, as this backend's `rotate` wants it."""

    def rotate(
        self, q: Tensor, k: Tensor, rotation: Any, kind: str, spec: PopSpec | None = None
    ) -> tuple[Tensor, Tensor]:
        """`retpop.position.rotate` of q and k (B, T, H, Dk); with ``spec`` of rows, q perhaps a short one.

        Pass the resulting queries to the same backend's `retention` or `pop`.
        """

    def gated_norm(
        self,
        x: Tensor,
        gate: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        kind: str,
        eps: float,
        activation: str,
    ) -> Tensor:
        """`retpop.ops.torch_backend.gated_norm`."""

    def describe(self, inputs: Inputs, shape: Sequence[int], mode: str, block_size: int | None) -> str:
        """The form that would run (B, T, H) tokens, in words."""


_BACKENDS: tuple[Backend, ...] = (torch_backend, triton_backend, reference_backend)
_BY_NAME = {backend.NAME: backend for backend in _BACKENDS}
NAMES = ("auto", *_BY_NAME)


def may_run_kernels(backend: object, q: object) -> bool:
    """Whether an eager call with these arguments, not yet checked, may end in the Triton backend."""
    if torch.compiler.is_compiling() or not isinstance(q, Tensor):
        return False
    return q.is_cuda if backend == "auto" else backend == "triton"


def choose_backend(where: str, backend: str, inputs: Inputs) -> tuple[Backend, str]:
    """The backend that runs, and the reason.

    Args:
        where: the public function, which begins an error's message.
        backend: "auto", or the name of one; a named backend is never replaced by another.
        inputs: device, dtype and head dims of the call.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    if backend in ("torch", "reference"):
        return _BY_NAME[backend], "it was asked for by name"
    if backend not in NAMES:
        raise ValueError(f"{where}: backend is {backend!r}; it must be one of {NAMES}.")
    if backend == "auto" and inputs.device.type != "cuda":
        return torch_backend, f'"auto" takes it on {inputs.device.type}'
    # Where a compiler traces sizes as symbols, those of a head become numbers: kernels are compiled for them.
    head_dims = index(inputs.key_dim), index(inputs.value_dim)
    reason = why_unavailable(inputs.device, inputs.dtype, *head_dims)
    if backend == "triton":
        if reason is not None:
            raise RuntimeError(f'{where}: backend="triton" cannot run: {reason}; "torch" or "auto" can.')
        return triton_backend, "it was asked for by name"
    reason = reason or why_transformed()
    if reason is not None:
        return torch_backend, f'"auto" takes it because {reason}'
    return triton_backend, '"auto" takes it on such a GPU'


@constant_in_graphs
def why_unavailable(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Half a sentence on why the Triton backend cannot run such inputs, or None if it can."""
    if not _has_triton():
        return "Triton is not installed"
    if device.type == "cpu" and not interpreting():
        return "the inputs are on a CPU, where kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda", "meta"):
        return f"the inputs are on {device.type}, for which there are no kernels"
    if device.type == "cuda":
        reason = _why_not_on_gpu(device)
        if reason is not None:
            return reason
    if dtype == torch.float64:
        return "the inputs are torch.float64, and the kernels compute in float32"
    if max(key_dim, value_dim) > LARGEST_HEAD_DIM:
        return f"a head has {max(key_dim, value_dim)} features, and the kernels hold up to {LARGEST_HEAD_DIM}"
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _why_not_on_gpu(device: torch.device) -> str | None:
    architecture = kernels("launch").architecture_of(device)
    if torch.version.hip is not None:
        if architecture not in AMD_ARCHITECTURES:
            return f"the GPU is {architecture}; of AMD's, kernels are for {' and '.join(AMD_ARCHITECTURES)}"
    else:
        properties = torch.cuda.get_device_properties(device)
        if properties.major < 8:
            capability = f"{properties.major}.{properties.minor}"
            return f"the GPU has compute capability {capability}, and the kernels need 8.0"
    reason: str | None = kernels("gpus").why_wrong(architecture)
    return reason


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
        block_size: with "pop", tokens in a block and, as assumed here, in a prediction; None: unspecified.
        backend: as the op's argument.

    Returns:
        One sentence, for example ``torch backend, chunkwise form on cpu in float32: ...``.

    Raises:
        TypeError, ValueError, RuntimeError: as the op itself would.
    """
    where = "explain_backend()"
    v = q if v is None else v
    check_inputs(where, Named("q", q), Named("q", q), Named("v", v), "BTHD")
    if mode not in (*MODES, "pop"):
        raise ValueError(f"{where}: mode is {mode!r}; it must be one of {(*MODES, 'pop')}.")
    if block_size is not None:
        if mode != "pop":
            raise ValueError(
                f"{where}: block_size is {block_size} but mode is {mode!r}; only pop has blocks."
            )
        check_blocks(where, q.shape[1], 0, block_size, 0)
    inputs = Inputs(q.device, dtype_after(q.device, q.dtype), q.shape[-1], v.shape[-1])
    chosen, reason = choose_backend(where, backend, inputs)
    form = chosen.describe(inputs, q.shape[:3], mode, block_size)
    dtype = str(inputs.dtype).removeprefix("torch.")
    return f"{chosen.NAME} backend, {form} on {q.device.type} in {dtype}: {reason}."

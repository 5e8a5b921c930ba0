"""The Triton backend: whether its kernels can run here, and its operations as the layers and ops call them.

The operations themselves, with their fakes and gradients, are in `retention_ops`, `pop_ops` and `row_ops`;
this module is the door to them. Every mode of retention comes to the same kernels: a single token to
`retpop::retention_step`, anything longer, whatever its mode, to the chunked `retpop::retention_fwd`.

Triton and `retpop.kernels` are imported when an operation first runs, never before.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from retpop.ops.custom import interpreting, kernels
from retpop.ops.decay_powers import DecayPowers
from retpop.ops.packed import Packing
from retpop.ops.pop_ops import pop_fwd, pop_rows_fwd
from retpop.ops.retention_ops import retention_fwd, retention_step
from retpop.ops.row_ops import norm_gate_fwd, rotary_fwd
from retpop.position import Rotation

LARGEST_HEAD_DIM = 256

AMD_ARCHITECTURES = ("gfx942",)
"""AMD's GPUs with the matrix cores and the shared memory that the kernels are laid out for."""


class Inputs(NamedTuple):
    """What decides which backend can run.

    Attributes:
        device, dtype: of the tokens, after autocast.
        key_dim, value_dim: of a head.
    """

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int


def why_unavailable(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Half a sentence that says why the Triton backend cannot run such inputs, or None where it can."""
    if find_spec("triton") is None:
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


# What `torch.compiler.assume_constant_result` does, without its import of the whole compiler: a graph that is
# being compiled calls this as it stands and keeps the answer.
why_unavailable.__dict__["_dynamo_marked_constant"] = True


def _why_not_on_gpu(device: torch.device) -> str | None:
    gpus = kernels("gpus")
    architecture = gpus.architecture_of(device)
    if torch.version.hip is not None:
        if architecture not in AMD_ARCHITECTURES:
            return f"the GPU is {architecture}; of AMD's, kernels are for {' and '.join(AMD_ARCHITECTURES)}"
    else:
        properties = torch.cuda.get_device_properties(device)
        if properties.major < 8:
            capability = f"{properties.major}.{properties.minor}"
            return f"the GPU has compute capability {capability}, and the kernels need 8.0"
    reason: str | None = gpus.why_wrong(architecture)
    return reason


def why_transformed() -> str | None:
    """Half a sentence that names a transform of torch.func, or forward-mode AD, at work; else None.

    The kernels' operations have a gradient and nothing else; forward-mode AD would find a zero tangent there.
    """
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (grad, jvp, vmap, ...) is at work"
    return "forward-mode AD is at work" if forward_ad._current_level >= 0 else None


def describe(inputs: Inputs, shape: Sequence[int], mode: str, block_size: int | None) -> str:
    """Which kernel would run (B, T, H) tokens, and how it would go about it; for people."""
    batch, length, heads = shape
    configs, gpus = kernels("configs"), kernels("gpus")
    architecture = gpus.architecture_of(inputs.device)
    common = {
        "head_dims": (inputs.key_dim, inputs.value_dim),
        "dtype": inputs.dtype,
        "precision": gpus.dot_precision(inputs.dtype, architecture),
        "architecture": architecture,
        "multiprocessors": gpus.multiprocessors_of(inputs.device),
    }
    if mode == "pop":
        if block_size is None:
            return "kernel pop_fwd"
        num_blocks, lengths = length // block_size, (block_size, block_size)
        pop = configs.pop_config(pairs=batch * heads, num_blocks=num_blocks, lengths=lengths, **common)
        schedule = "the block states first" if pop.split else "in one pass"
        return f"kernel pop_fwd, tiles of {pop.tile} tokens, {schedule},"
    if length == 1:
        return "kernel retention_step"
    plain = configs.retention_config(tokens=batch * length, sequences=batch, num_heads=heads, **common)
    schedule = "in one sweep" if plain.stretch is None else f"split into stretches of {plain.stretch} tokens"
    return f"kernel retention_fwd, chunks of {plain.rows} tokens, {schedule},"


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    powers: DecayPowers,
    *,
    state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """Retention of (B, T, H, D); with ``packing`` of (1, T, H, D), and states (S, H, Dk, Dv)."""
    _refuse_transforms(q, k, v, state)
    if packing is None and q.shape[1] == 1:
        tokens = (x.squeeze(1) for x in (q, k, v))
        out, final = retention_step(*tokens, powers.log_decay, state, powers.scale)
        return out.unsqueeze(1), final
    cu_seqlens = None if packing is None else packing.cu_seqlens
    return retention_fwd(q, k, v, powers.log_decay, state, cu_seqlens, powers.scale)


def pop_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pred: Tensor,
    k_pred: Tensor,
    v_pred: Tensor,
    powers: DecayPowers,
    *,
    block_size: int,
    offset: int,
    state: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """POP of tokens (B, N·L, H, D) and predictions (B, P, M, H, D); outputs, predictions, final state."""
    _refuse_transforms(q, k, v, q_pred, k_pred, v_pred, state)
    return pop_fwd(
        q,
        k,
        v,
        q_pred,
        k_pred,
        v_pred,
        powers.log_decay,
        state,
        reset,
        block_size,
        offset,
        powers.scale,
    )


def pop_rows(
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
) -> tuple[Tensor, Tensor]:
    """POP of rows (B, T + P·M, H, D), ``predictions`` = (P, M); a row of outputs, and the final state."""
    _refuse_transforms(q, k, v, state)
    return pop_rows_fwd(
        q, k, v, powers.log_decay, state, reset, predictions, block_size, offset, powers.scale
    )


def rotated(q: Tensor, k: Tensor, rotation: Rotation, kind: str) -> tuple[Tensor, Tensor]:
    """`retpop.position.rotate` of queries and keys (B, T, H, Dk)."""
    _refuse_transforms(q, k)
    return rotary_fwd(q, k, rotation.cos, rotation.sin, kind, False)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float
) -> Tensor:
    """silu(gate) ⊙ norm(x), both (..., H, Dv), in x's dtype; kind "groupnorm" or "rmsnorm"."""
    _refuse_transforms(x, gate, weight, bias)
    return norm_gate_fwd(x, gate, weight, bias, kind, eps)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    reason = why_transformed()
    if reason is None:
        return
    if torch._C._are_functorch_transforms_active() or any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError(f'backend="triton" cannot run: {reason}; backend="torch" can.')

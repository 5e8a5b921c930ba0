"""The Triton backend: whether its kernels can run here, and its operations as the layers and ops call them.

The operations themselves, with their fakes and gradients, are in `retention_ops`, `pop_ops` and `row_ops`;
this module is the door to them. Every mode of retention comes to the same kernels: a single token to
`retpop::retention_step`, anything longer, whatever its mode, to the chunked `retpop::retention_fwd`.

Triton and `retpop.kernels` are imported when an operation first runs, never before.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from retpop.ops.custom import interpreting, kernels
from retpop.ops.decay_powers import DecayPowers
from retpop.ops.dtypes import Inputs
from retpop.ops.gated_norm import gated_norm as plain_gated_norm
from retpop.ops.packed import Packing
from retpop.ops.pop_ops import pop_fwd, pop_rows_fwd
from retpop.ops.retention_ops import retention_fwd, retention_step
from retpop.ops.row_ops import norm_gate_fwd, rotary_fwd
from retpop.ops.rows import PopSpec
from retpop.position import Rotation

NAME = "triton"

LARGEST_HEAD_DIM = 256

AMD_ARCHITECTURES = ("gfx942",)
"""AMD's GPUs with the matrix cores and the shared memory that the kernels are laid out for."""


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
    mode: str,
    state: Tensor | None,
    chunk_size: int | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """Retention of (B, T, H, D), by the same kernels in every mode; the chunks are their own."""
    _refuse_transforms(q, k, v, powers.log_decay, state)
    if packing is None and q.shape[1] == 1:
        tokens = (x.squeeze(1) for x in (q, k, v))
        out, final = retention_step(*tokens, powers.log_decay, state, powers.scale)
        return out.unsqueeze(1), final
    cu_seqlens = None if packing is None else packing.cu_seqlens
    return retention_fwd(q, k, v, powers.log_decay, state, cu_seqlens, powers.scale)


def pop(tokens: Sequence[Tensor], state: Tensor | None, spec: PopSpec) -> tuple[Tensor, ...]:
    """POP of three rows, or of the sequence's three tensors and the predictions'; outputs, final state.

    Kernels answer every query. Each has its own answer, so those of tokens that nobody reads may be anything,
    and what comes of them is dropped.
    """
    powers = spec.powers
    _refuse_transforms(*tokens, powers.log_decay, state)
    options = (powers.log_decay, state, spec.reset)
    numbers = (spec.block_size, spec.offset, powers.scale)
    if len(tokens) == 6:
        return pop_fwd(*tokens, *options, *numbers)
    q, k, v = tokens
    q = q if q.shape[1] == k.shape[1] else spec.all_tokens(q)
    row, final = pop_rows_fwd(q, k, v, *options, spec.predictions, *numbers)
    return spec.readers(row), final


def rotate(
    q: Tensor, k: Tensor, rotation: Rotation, kind: str, spec: PopSpec | None = None
) -> tuple[Tensor, Tensor]:
    """`retpop.position.rotate` of both; with ``spec`` of rows, of which q comes back in full."""
    _refuse_transforms(q, k)
    q = q if spec is None else spec.all_tokens(q)
    return rotary_fwd(q, k, rotation.cos, rotation.sin, kind, False)


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
    """`retpop.ops.gated_norm.gated_norm`; in one pass for "silu", in torch operations for the others."""
    if activation != "silu":
        return plain_gated_norm(x, gate, weight, bias, kind=kind, eps=eps, activation=activation)
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

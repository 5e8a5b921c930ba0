"""The Triton backend: its operations as layers and ops call them.

Every mode of retention runs the same kernels. Triton and `retpop.kernels` are imported when an operation
first runs, never before.
"""

from __future__ import annotations

from collections.abc import Sequence

from retpop.arguments import Inputs
from retpop.ops.triton_backend.custom import kernels
from retpop.ops.triton_backend.layer import gated_norm as gated_norm
from retpop.ops.triton_backend.layer import rotate as rotate
from retpop.ops.triton_backend.layer import rotation as rotation
from retpop.ops.triton_backend.pooled_retention import pooled_retention as pooled_retention
from retpop.ops.triton_backend.pop import known_pop as known_pop
from retpop.ops.triton_backend.pop import pop as pop
from retpop.ops.triton_backend.retention import known_retention as known_retention
from retpop.ops.triton_backend.retention import retention as retention

NAME = "triton"


def describe(inputs: Inputs, shape: Sequence[int], mode: str, block_size: int | None) -> str:
    """The kernel that would run (B, T, H) tokens and its schedule, in words."""
    batch, length, heads = shape
    configs, launch = kernels("configs"), kernels("launch")
    architecture = launch.architecture_of(inputs.device)
    head_dims = inputs.key_dim, inputs.value_dim
    common = {
        "head_dims": head_dims,
        "dtype": inputs.dtype,
        "precision": launch.dot_precision(inputs.dtype, architecture, head_dims),
        "architecture": architecture,
        "multiprocessors": launch.multiprocessors_of(inputs.device),
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

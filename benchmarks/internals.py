"""The only private names of the library, and of Triton, in the benchmarks: kernels as the layers call them.

They are imported when they are called: the library may be another checkout's (`benchmarks.against`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

EPS = 1e-6


def pop_of_rows(
    log_decay: Tensor, scale: float, predictions: tuple[int, int], block_size: int, offset: int
) -> Callable[..., tuple[Tensor, ...]]:
    """POP of rows as a layer calls it, whose decoder has prepared all but the tensors.

    ``predictions`` is (P, M). It takes queries, keys and values (B, T + P·M, H, D), each a sequence with its
    predictions behind it, and the state or None, and returns a row of outputs and the final state.
    """
    from retpop.ops import triton_backend
    from retpop.ops.powers import DecayPowers
    from retpop.ops.rows import PopSpec

    powers = DecayPowers(log_decay, scale, torch.float32)
    spec = PopSpec(powers, predictions, block_size, offset, None)
    return lambda q, k, v, state: triton_backend.pop((q, k, v), state, spec)


def gated_norm(x: Tensor, gate: Tensor) -> Tensor:
    """silu(gate) times the norm of each head's features, (B, T, H, D)."""
    from retpop.ops import triton_backend

    return triton_backend.gated_norm(x, gate, None, None, kind="groupnorm", eps=EPS, activation="silu")


def rotation_of(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotations of tokens 0, 1, ..., each (1, T, 1, D)."""
    from retpop.position import rotary_frequencies, rotation_at

    made = rotation_at(torch.arange(tokens)[None], rotary_frequencies("retnet", head_dim), "retnet")
    return made.cos.to(device), made.sin.to(device)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, T, H, D), rotated."""
    from retpop.ops import triton_backend
    from retpop.position import Rotation

    return triton_backend.rotate(q, k, Rotation(cos, sin), "retnet")


@contextmanager
def stub_driver() -> Iterator[None]:
    """A GPU of sm_90 that does nothing, and kernels that are compiled at once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from retpop.ops import dispatch
    from retpop.ops.triton_backend import custom

    class Stub(CompiledKernel):
        module = function = packed_metadata = src = None
        name = "stub"

        def __init__(self) -> None:
            self._run = lambda *arguments: None

        def _init_handles(self) -> None:
            pass

    def compiled(kernel: JITFunction, key: str, *arguments: object) -> Stub:
        return kernel.device_caches[0][0].setdefault(key, Stub())

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    before = driver._active
    driver.set_active(Driver())
    try:
        with ExitStack() as stack:
            for module in (dispatch, custom):  # as on a GPU, kernels may run
                stack.enter_context(mock.patch.object(module, "interpreting", _always))
            stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compiled))
            yield
    finally:
        driver.set_active(before)


def _always() -> bool:
    return True

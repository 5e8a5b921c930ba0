"""The instrument that counts traffic, on kernels whose traffic is known, and each fault that it must see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.kernel_audit.traffic import AuditError, audit, footprint

BLOCK = 16


@triton.jit
def scale_kernel(p_x, p_y, n, shift, BLOCK: tl.constexpr, OTHER: tl.constexpr, GUARDED: tl.constexpr):
    """y_i = 2 x_(i+shift)."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o_x < n
    if GUARDED:
        if OTHER:
            b_x = tl.load(p_x + o_x + shift, mask=mask, other=0.0)
        else:
            b_x = tl.load(p_x + o_x + shift, mask=mask)
        tl.store(p_y + o_x, 2 * b_x, mask=mask)
    else:
        tl.store(p_y + o_x, 2 * tl.load(p_x + o_x + shift))


@triton.jit
def product_kernel(p_a, p_b, p_c, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """C = A B."""
    o_m, o_k, o_n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    b_a = tl.load(p_a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.load(p_b + o_k[:, None] * N + o_n[None, :])
    b_c = tl.dot(b_a, b_b, input_precision="ieee")
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], b_c)


@triton.jit
def flag_kernel(p_flag, p_y, n):
    """y_0 = 1 if there is a flag and it is set, else 0; with a scalar mask, and an `other` of 0."""
    flag = tl.load(p_flag, mask=n > 0, other=0)
    tl.store(p_y, flag.to(tl.float32))


@triton.jit
def fold_kernel(p_y, BLOCK: tl.constexpr, INTO: tl.constexpr):
    """Several lanes write to one element."""
    o_y = tl.arange(0, BLOCK)
    tl.store(p_y + o_y % INTO, o_y.to(tl.float32))


@triton.jit
def atomic_kernel(p_y):
    """y_0 += 1."""
    tl.atomic_add(p_y, 1.0)


def scale(x: Tensor, y: Tensor, *, n: int, shift: int = 0, other: bool = True, guarded: bool = True) -> None:
    scale_kernel[(triton.cdiv(n, BLOCK),)](x, y, n, shift, BLOCK=BLOCK, OTHER=other, GUARDED=guarded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_are_those_of_the_unmasked_lanes(dtype: torch.dtype) -> None:
    x = torch.randn(37, dtype=dtype)
    with audit() as counts:
        y = torch.empty_like(x)
        scale(x, y, n=37)
        scale(x, torch.empty_like(x), n=20)
    torch.testing.assert_close(y, 2 * x)
    assert counts.loaded == counts.stored == (37 + 20) * x.element_size()
    assert (counts.launches, counts.programs, counts.flops) == (2, 5, 0)
    assert counts.by_kernel["scale_kernel"].bytes == counts.bytes


def test_flops_are_those_of_the_dots() -> None:
    a, b = torch.randn(16, 32), torch.randn(32, 64)
    with audit() as counts:
        c = torch.empty(16, 64)
        product_kernel[(1,)](a, b, c, M=16, K=32, N=64)
    torch.testing.assert_close(c, a @ b)
    assert counts.flops == 2 * 16 * 32 * 64
    assert counts.bytes == 4 * (16 * 32 + 32 * 64 + 16 * 64)


def test_reading_again_counts_again() -> None:
    x = torch.randn(16)
    with audit() as counts:
        for _ in range(3):
            scale(x, torch.empty_like(x), n=16)
    assert counts.loaded == 3 * 64


@pytest.mark.parametrize("flags", [0, 1])
def test_scalars_and_an_other_of_zero(flags: int) -> None:
    """Triton's interpreter takes a scalar `other` of 0 for none at all; the kernel did name one."""
    with audit() as counts:
        y = torch.empty(1)
        flag_kernel[(1,)](torch.ones(flags, dtype=torch.bool), y, flags)
    assert y.item() == flags
    assert (counts.loaded, counts.stored) == (flags, 4)


FAULTS: dict[str, tuple[str, Callable[[], object]]] = {
    "past the end": ("outside", lambda: scale(torch.zeros(20), torch.empty(32), n=20, guarded=False)),
    "before the start": ("outside", lambda: scale(torch.zeros(20), torch.empty(20), n=20, shift=-1)),
    "in the gap of a view": (
        "outside",
        lambda: scale(torch.zeros(16, 2)[:, 0], torch.empty(16), n=16),
    ),
    "of another tensor of the storage": (
        "outside",
        lambda: scale(torch.zeros(32)[:16], torch.empty(16), n=16, shift=16),
    ),
    "no other": ("without `other`", lambda: scale(torch.zeros(20), torch.empty(20), n=20, other=False)),
    "two lanes, one element": ("stores an element twice", lambda: fold_kernel[(1,)](torch.empty(16), 16, 8)),
    "two programs, one element": (
        "stores an element twice",
        lambda: fold_kernel[(2,)](torch.empty(16), 16, 16),
    ),
    "unwritten memory": (
        "nothing has written",
        lambda: scale(torch.empty(16), torch.empty(16), n=16),
    ),
    "an atomic": ("atomic", lambda: atomic_kernel[(2,)](torch.zeros(1))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_access_is_named(fault: str) -> None:
    words, run = FAULTS[fault]
    with pytest.raises(AuditError, match=rf"kernel: .*{words}"), audit():
        run()


def test_a_race_between_programs_is_a_fault() -> None:
    buffer = torch.zeros(48)
    with audit():
        scale(buffer[:32], buffer[:32], n=32)  # in place: each program reads and writes its own
    with pytest.raises(AuditError, match="loads what another program"), audit():
        scale(buffer[:32], buffer[16:], n=32)
    with pytest.raises(AuditError, match="stores what another program"), audit():
        scale(buffer[16:], buffer[:32], n=32)
    with audit(races=False):
        scale(buffer[:32], buffer[16:], n=32)
        scale(buffer[16:], buffer[:32], n=32)
        fold_kernel[(2,)](torch.empty(16), 16, 8)


def test_outputs_count_as_unwritten_until_they_are_written() -> None:
    x, y = torch.zeros(16), torch.zeros(16)
    with audit(outputs=[y]):
        scale(x, y, n=16)
        scale(y, x, n=16)
    with pytest.raises(AuditError, match="nothing has written"), audit(outputs=[y]):
        scale(y, x, n=16)


def test_the_hooks_are_gone_afterwards() -> None:
    with pytest.raises(AuditError), audit():
        scale(torch.zeros(20), torch.empty(20), n=20, other=False)
    scale(torch.zeros(20), torch.empty(20), n=20, other=False)


def test_footprint_of_views() -> None:
    rows = torch.zeros(4, 6, dtype=torch.float16)
    assert footprint(rows[1:3, 2:4]).tolist() == [16, 18, 28, 30]
    assert footprint(rows[0, :1].expand(3, 5)).tolist() == [0]
    assert footprint(rows[:0]).size == 0

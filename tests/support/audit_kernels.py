"""Small kernels for the tests of `benchmarks.kernel_audit`: what they compile to is known."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks"])
def loop_kernel(
    p_a,
    p_b,
    p_c,
    blocks,
    stride_a,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr = False,
):
    """C = Σ_n A_n B_n over blocks n: products, and loads that can run ahead, in one loop.

    SCALED: of 2 A_n, which the product on sm_90 then reads from registers.
    """
    o_m, o_k, o_n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    b_c = tl.zeros((M, N), tl.float32)
    for n in range(blocks):
        first = n.to(tl.int64) * K
        b_a = tl.load(p_a + o_m[:, None] * stride_a.to(tl.int64) + first + o_k[None, :])
        b_b = tl.load(p_b + (first + o_k[:, None]) * N + o_n[None, :])
        if SCALED:
            b_a *= 2
        b_c = tl.dot(b_a, b_b, b_c, input_precision=PRECISION)
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], b_c)


@triton.jit
def narrow_kernel(p_x, p_y, stride_x, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """y_i = x_(i * stride), the offset in 64 bits if WIDE, else in 32."""
    i_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        i_x = i_x.to(tl.int64)
    tl.store(p_y + i_x, tl.load(p_x + i_x * stride_x))


@triton.jit
def turning_kernel(p_a, p_b, p_c, SIZE: tl.constexpr, SECOND: tl.constexpr):
    """C = (A Bᵀ)ᵀ B of square matrices; if SECOND, the turned product is the second factor: A (A Bᵀ)ᵀ."""
    o_row = tl.arange(0, SIZE)
    o_tile = o_row[:, None] * SIZE + o_row[None, :]
    b_a, b_b = tl.load(p_a + o_tile), tl.load(p_b + o_tile)
    b_turned = tl.trans(tl.dot(b_a, tl.trans(b_b)).to(b_a.dtype))
    b_c = tl.dot(b_a, b_turned) if SECOND else tl.dot(b_turned, b_b)
    tl.store(p_c + o_tile, b_c)

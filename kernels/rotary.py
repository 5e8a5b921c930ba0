"""Rotary positions: queries and keys rotated by an angle a token, in one launch and one pass over memory.

Feature x and its partner y, a pair, rotate by the angle φ of their token and their pair:

    x' = x cos φ - y sin φ
    y' = y cos φ + x sin φ

Pairs are neighbours (2i, 2i + 1) in "retnet" and half a head apart (i, i + Dk/2) in "rope". The inverse
rotates by -φ; it is also the transpose, so it maps gradients of q' and k' to gradients of q and k.

Grid: one dimension. A program owns TOKENS of the B · T tokens, reads their cosines and sines once, and
rotates all heads of q and of k with them; they are float32, and so is the arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import row_config
from .launch import Launch, launched, named_strides, with_contiguous_rows


@triton.jit
def rotated_pair(b_x, b_y, b_cos, b_sin):
    """(x cos φ - y sin φ, y cos φ + x sin φ)."""
    return b_x * b_cos - b_y * b_sin, b_y * b_cos + b_x * b_sin


@triton.jit
def rotate_tile(
    p_in,
    p_out,
    o_in,
    o_out,
    m_token,
    b_cos,
    b_sin,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Rotate one head of one tile of tokens; o_in and o_out are the offsets of its rows."""
    if NEIGHBOURS:
        # One load of whole rows, whose pairs each thread then holds: two strided loads would read twice.
        o_d = tl.arange(0, 2 * PAIRS)
        mask = m_token[:, None] & (o_d < D)[None, :]
        b_pairs = tl.load(p_in + o_in[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x, b_y = tl.split(tl.reshape(b_pairs, (b_pairs.shape[0], PAIRS, 2)))
        b_x, b_y = rotated_pair(b_x, b_y, b_cos, b_sin)
        b_pairs = tl.reshape(tl.join(b_x, b_y), (b_pairs.shape[0], 2 * PAIRS))
        tl.store(p_out + o_out[:, None] + o_d[None, :], b_pairs.to(p_out.dtype.element_ty), mask=mask)
    else:
        o_d = tl.arange(0, PAIRS)
        mask = m_token[:, None] & (o_d < D // 2)[None, :]
        p_x = p_in + o_in[:, None] + o_d[None, :]
        b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        b_y = tl.load(p_x + D // 2, mask=mask, other=0.0).to(tl.float32)
        b_x, b_y = rotated_pair(b_x, b_y, b_cos, b_sin)
        p_x = p_out + o_out[:, None] + o_d[None, :]
        tl.store(p_x, b_x.to(p_out.dtype.element_ty), mask=mask)
        tl.store(p_x + D // 2, b_y.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "T"])
def rotary_fwd_kernel(
    p_q,
    p_k,
    p_cos,
    p_sin,
    p_q_out,
    p_k_out,
    num_tokens,
    T,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_angle_b,
    stride_angle_t,
    H: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """(x cos φ - y sin φ, y cos φ + x sin φ) of every pair of q and k, TOKENS tokens a program."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    i_row = first + tl.arange(0, TOKENS)
    m_token = i_row < num_tokens
    # One division of a 64-bit scalar; those of the tile are then 32-bit ones.
    i_near = (first % T).to(tl.int32) + tl.arange(0, TOKENS)
    i_batch = first // T + i_near // T
    i_token = (i_near % T).to(tl.int64)

    # The cosine of a pair stands at both its features, the sine with its sign: read the second feature's.
    o_pair = tl.arange(0, PAIRS)
    o_angle = 2 * o_pair + 1 if NEIGHBOURS else o_pair + D // 2
    o_angle = (i_batch * stride_angle_b + i_token * stride_angle_t)[:, None] + o_angle[None, :]
    m_angle = m_token[:, None] & (o_pair < D // 2)[None, :]
    b_cos = tl.load(p_cos + o_angle, mask=m_angle, other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=m_angle, other=0.0)
    if INVERSE:
        b_sin = -b_sin

    o_q = i_batch * stride_q_b + i_token * stride_q_t
    o_k = i_batch * stride_k_b + i_token * stride_k_t
    o_out = i_row * H * D
    for h in range(H):
        i_head = tl.cast(h, tl.int64)
        rotate_tile(
            p_q,
            p_q_out,
            o_q + i_head * stride_q_h,
            o_out + i_head * D,
            m_token,
            b_cos,
            b_sin,
            D,
            PAIRS,
            NEIGHBOURS,
        )
        rotate_tile(
            p_k,
            p_k_out,
            o_k + i_head * stride_k_h,
            o_out + i_head * D,
            m_token,
            b_cos,
            b_sin,
            D,
            PAIRS,
            NEIGHBOURS,
        )


def rotary_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated, as by `retpop.position.rotate`; with ``inverse``, rotated back.

    Args:
        q, k: (B, T, H, Dk), Dk even.
        cos, sin: (B or 1, T, 1, Dk), float32, of `retpop.position.rotation_at`.
        kind: "retnet" (neighbouring pairs) or "rope" (pairs half a head apart).
        inverse: rotate by the opposite angle.

    Returns:
        q and k rotated, contiguous.
    """
    outputs: tuple[Tensor, Tensor] = launched(plan_rotary_fwd, q, k, cos, sin, kind, inverse=inverse)
    return outputs


def plan_rotary_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, *, inverse: bool = False
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launch of `rotary_fwd`, and the tensors it writes."""
    batch, length, heads, dim = q.shape
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    if q_out.numel() == 0:
        return [], (q_out, k_out)
    q, k = with_contiguous_rows(q), with_contiguous_rows(k)
    cos, sin = cos.contiguous(), sin.contiguous()  # so that one stride serves both
    config = row_config(dim)
    arguments = {
        "p_q": q,
        "p_k": k,
        "p_cos": cos,
        "p_sin": sin,
        "p_q_out": q_out,
        "p_k_out": k_out,
        "num_tokens": batch * length,
        "T": length,
        **named_strides("q", q, "bth"),
        **named_strides("k", k, "bth"),
        "stride_angle_b": cos.stride(0) if cos.shape[0] > 1 else 0,
        "stride_angle_t": cos.stride(1),
        "H": heads,
        "D": dim,
        "PAIRS": config.cols // 2,
        "TOKENS": config.rows,
        "NEIGHBOURS": kind == "retnet",
        "INVERSE": inverse,
    }
    grid = (triton.cdiv(batch * length, config.rows),)
    launch = Launch(
        kernel=rotary_fwd_kernel, grid=grid, arguments=arguments, num_warps=config.num_warps, num_stages=1
    )
    return [launch], (q_out, k_out)

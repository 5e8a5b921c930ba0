"""What every retention kernel is made of: masked tiles, powers of γ, and one chunk's outputs and state.

A tile is (rows, columns) in registers: rows are tokens (or the Dk of a state), columns a head dim that is
padded to a power of two. Rows past the end and padded columns are loaded as zeros, so they add nothing to any
product, and they are not stored. Row offsets are int64. With S the state before a chunk of n tokens:

    o_i = c γ^(i+1) q_i S + Σ_{j<=i} c γ^(i-j) (q_i·k_j) v_j     `chunk_output`
    S'  = γ^n S + Σ_j γ^(n-1-j) k_jᵀ v_j                         `chunk_state`

Powers of γ come from exponents that are masked first, never as a quotient; the formulas are those of
`retpop.ops.decay_powers`, in float32.

PRECISION is `tl.dot`'s input_precision, "ieee" or "tf32"; it counts for float32 tiles only.
"""

import triton
import triton.language as tl

# γ = 0 is a log-decay of -inf, and 0 · -inf is NaN. exp(-1e5) is 0 and 0 · -1e5 is 0.
LOG_ZERO = tl.constexpr(-1e5)

# As a float16 operand a state's largest number is scaled to half of what float16 holds, and a wider token
# tile's to 1, which leaves room for its products with other tokens: they are operands too.
LARGEST_STATE = tl.constexpr(32768.0)
LARGEST_TOKEN = tl.constexpr(1.0)

# A tile of zeros is scaled as if it held this.
SMALLEST = tl.constexpr(1e-20)


@triton.jit
def load_tile(
    p_rows,
    stride_row,
    num_rows,
    first_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    first_row=0,
):
    """Rows first_row.. below num_rows, columns first_col.., of the matrix at p_rows; zeros elsewhere.

    The matrix has D columns. A row index that a loop moves belongs into first_row, not into p_rows: then
    offsets are not the same each time, and the compiler does not keep them all in registers, 8 bytes for each
    load.
    """
    o_row = first_row + tl.arange(0, ROWS)[:, None]
    o_col = first_col + tl.arange(0, COLS)[None, :]
    m_tile = o_row < num_rows
    if D % COLS != 0:
        m_tile = m_tile & (o_col < D)
    return tl.load(p_rows + o_row.to(tl.int64) * stride_row + o_col, mask=m_tile, other=0.0)


@triton.jit
def store_tile(
    p_rows,
    b_tile,
    stride_row,
    num_rows,
    first_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    first_row=0,
):
    """Write what `load_tile` would read, in the memory's dtype."""
    o_row = first_row + tl.arange(0, ROWS)[:, None]
    o_col = first_col + tl.arange(0, COLS)[None, :]
    m_tile = o_row < num_rows
    if D % COLS != 0:
        m_tile = m_tile & (o_col < D)
    p_tile = p_rows + o_row.to(tl.int64) * stride_row + o_col
    tl.store(p_tile, b_tile.to(p_rows.dtype.element_ty), mask=m_tile)


@triton.jit
def load_log_decay(p_log_decay, i_h):
    """ln γ of head i_h, -inf made finite."""
    return tl.maximum(tl.load(p_log_decay + i_h), LOG_ZERO)


@triton.jit
def decay_within(log_decay, scale, ROWS: tl.constexpr):
    """c γ^(i-j) for i >= j, else 0: (ROWS, ROWS)."""
    o_row = tl.arange(0, ROWS)
    steps = o_row[:, None] - o_row[None, :]
    return tl.where(steps >= 0, scale * tl.exp(log_decay * tl.maximum(steps, 0)), 0.0)


@triton.jit
def decay_from_start(log_decay, scale, ROWS: tl.constexpr):
    """c γ^(i+1), what row i sees of the state before the chunk: (ROWS, 1)."""
    return (scale * tl.exp(log_decay * (tl.arange(0, ROWS) + 1)))[:, None]


@triton.jit
def decay_to_end(log_decay, length, ROWS: tl.constexpr):
    """γ^(length-1-j), what is left of row j after a chunk of `length` rows; 1 for rows past it: (ROWS, 1)."""
    return tl.exp(log_decay * tl.maximum(length - 1 - tl.arange(0, ROWS), 0))[:, None]


@triton.jit
def decay_across(log_decay, length):
    """γ^length = whole + rest, with whole 1 from γ^length = 1/2 on and 0 below: see `advance`."""
    exponent = log_decay * length
    gamma = tl.exp(exponent)
    near_one = gamma >= 0.5
    return tl.where(near_one, 1.0, 0.0), tl.where(near_one, _expm1_near_zero(exponent), gamma)


@triton.jit
def _expm1_near_zero(x):
    """exp(x) - 1 for -ln 2 <= x <= 0, to 1.2e-7 of its value (Triton has no expm1)."""
    x = tl.maximum(x, -0.7)  # elsewhere it is not used, and need only be finite
    series = 1.0
    for n in tl.static_range(9, 1, -1):
        series = 1.0 + series * x * (1.0 / n)
    return x * series


@triton.jit
def advance(b_state, whole, rest, b_added):
    """γ^n S + added as whole · S + (rest · S + added).

    Where γ^n is near 1, whole is 1 and rest = γ^n - 1, so that only random rounding errors remain; a product
    with a rounded γ^n errs every time in the same direction.
    """
    return whole * b_state + (rest * b_state + b_added)


@triton.jit
def as_operand(b_tile, dtype: tl.constexpr, LARGEST: tl.constexpr = LARGEST_STATE):
    """A tile as an operand in a token tile's dtype, and the factor that was taken out of it.

    The factor is 1 except on the way to float16, which is narrower: the state of a slow decay outgrows it (it
    grows as 1/(1-γ)), and the gradient of an output that did so underflows.
    """
    grow = 1.0
    if dtype == tl.float16 and b_tile.dtype != dtype:
        grow = tl.maximum(tl.max(tl.abs(b_tile)), SMALLEST) / LARGEST
        b_tile = b_tile * (1.0 / grow)
    return b_tile.to(dtype), grow


@triton.jit
def chunk_output(b_q, b_k, b_v, b_operand, grow, b_from_start, b_within, PRECISION: tl.constexpr):
    """Outputs of a chunk whose state before it is b_operand · grow (from `as_operand`): (rows, Dv), float32.

    from_start · (q S) + (q kᵀ ∘ within) v; the scores are rounded to the dtype of v.
    """
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_within
    b_out = tl.dot(b_q, b_operand, input_precision=PRECISION) * (b_from_start * grow)
    return tl.dot(b_scores.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)


@triton.jit
def chunk_state(
    b_state,
    b_k,
    b_v,
    b_to_end,
    whole,
    rest,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr = False,
    grow_v=1.0,
):
    """The state after a chunk: `advance` with kᵀ (to_end · v) added, which is accumulated onto rest · S.

    grow_v: the factor that was taken out of v (by `as_operand`).
    SCALE_V: v takes the powers of γ, otherwise k; the sums are the same. Scaling v leaves kᵀ in shared
    memory, from where sm_90's tensor cores read it; on an architecture without them it would cost v its async
    copy.
    """
    if SCALE_V:
        b_v = (b_v * b_to_end).to(b_v.dtype)
    else:
        b_k = (b_k * b_to_end).to(b_k.dtype)
    b_added = tl.dot(tl.trans(b_k), b_v, rest * b_state / grow_v, input_precision=PRECISION)
    return whole * b_state + b_added * grow_v

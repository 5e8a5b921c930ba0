"""The building blocks of retention and POP: masked tiles, powers of γ, a chunk's outputs, state, gradients.

A tile is (rows, columns) in registers: rows are tokens (or the Dk of a state), columns a head dim that is
padded to a power of two. Rows past the end and padded columns are loaded as zeros, so they add nothing to any
product, and they are not stored. Row offsets are int64. With S the state before a chunk of n tokens:

    o_i = c γ^(i+1) q_i S + Σ_{j<=i} c γ^(i-j) (q_i·k_j) v_j     `chunk_output`
    S'  = γ^n S + Σ_j γ^(n-1-j) k_jᵀ v_j                         `chunk_state`

`pass_tile` does both with a tile in memory, and `pull_tile` the same backwards.

Powers of γ come from exponents that are masked first, never as a quotient; the formulas are those of
`retpop.ops.powers`, in float32.

PRECISION is `tl.dot`'s input_precision, of `launch.dot_precision`; it counts for float32 tiles only.
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

    The matrix has D columns. Pass a row index that changes in a loop as first_row, not as part of p_rows: the
    compiler would keep offsets that stay the same in registers, 8 bytes for each load.
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
def load_state(p_state, strides, first_col, ROWS: tl.constexpr, COLS: tl.constexpr, DK, DV, first_row=0):
    """Rows first_row.. and columns first_col.. of a state of DK rows and DV columns, with any two strides."""
    o_row = (first_row + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    o_col = (first_col + tl.arange(0, COLS))[None, :].to(tl.int64)
    m_state = (o_row < DK) & (o_col < DV)
    return tl.load(p_state + o_row * strides[0] + o_col * strides[1], mask=m_state, other=0.0)


@triton.jit
def store_state(p_state, b_state, strides, first_col, ROWS: tl.constexpr, COLS: tl.constexpr, DK, DV):
    """Write what `load_state` would read."""
    o_row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    o_col = (first_col + tl.arange(0, COLS))[None, :].to(tl.int64)
    m_state = (o_row < DK) & (o_col < DV)
    tl.store(p_state + o_row * strides[0] + o_col * strides[1], b_state, mask=m_state)


@triton.jit
def token_stride(stride, other, UNIT: tl.constexpr):
    """A token stride from one in units, or the other where it is None: equal strides share registers."""
    return other if stride is None else (stride if UNIT == 1 else tl.cast(stride, tl.int64) * UNIT)


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
    """c γ^(i+1), the weight of the state before the chunk for row i: (ROWS, 1)."""
    return (scale * tl.exp(log_decay * (tl.arange(0, ROWS) + 1)))[:, None]


@triton.jit
def decay_to_end(log_decay, length, ROWS: tl.constexpr):
    """γ^(length-1-j), the weight of row j after a chunk of `length` rows; 1 for rows past it: (ROWS, 1)."""
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
def chunk_powers(log_decay, scale, length, ROWS: tl.constexpr):
    """The powers of γ for a chunk of `length` tokens: from_start, within, to_end, whole, rest."""
    whole, rest = decay_across(log_decay, length)
    b_from_start = decay_from_start(log_decay, scale, ROWS)
    b_within = decay_within(log_decay, scale, ROWS)
    return b_from_start, b_within, decay_to_end(log_decay, length, ROWS), whole, rest


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
def chunk_output(b_q, b_k, b_v, b_operand, grow, b_from_start, b_within, PRECISION: tl.constexpr, pair=None):
    """Outputs of a chunk whose state before it is b_operand · grow (from `as_operand`): (rows, Dv), float32.

    from_start · (q S) + (q kᵀ ∘ within) v; the scores are rounded to the dtype of v.

    pair: tiles K and V and a factor: the state is S + factor · Kᵀ V, and q (Kᵀ V) is found as (q Kᵀ) V; or
    None.
    """
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_within
    b_out = tl.dot(b_q, b_operand, input_precision=PRECISION)
    if pair is not None:
        b_read = tl.dot(b_q, tl.trans(pair[0]), input_precision=PRECISION).to(b_v.dtype)
        b_out = tl.dot(b_read, pair[1], b_out * (grow / pair[2]), input_precision=PRECISION)
        grow = pair[2]
    b_out = b_out * (b_from_start * grow)
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

    With 16-bit tokens kᵀ (to_end · v) is accumulated onto γ^n · S instead, and S need not be held beside the
    sum. A rounded γ^n errs in the same direction at every chunk: by at most 9e-5 of the state at γ = 1 - 1e-5
    and chunks of 64 tokens, where a token is rounded by up to 4e-3 (bfloat16) or 5e-4.

    grow_v: the factor that was taken out of v (by `as_operand`).
    SCALE_V: v takes the powers of γ, otherwise k; the sums are the same. Scaling v leaves kᵀ in shared
    memory, from where sm_90's tensor cores read it; on an architecture without them it would cost v its async
    copy.
    """
    if SCALE_V:
        b_v = (b_v * b_to_end).to(b_v.dtype)
    else:
        b_k = (b_k * b_to_end).to(b_k.dtype)
    if b_v.dtype == tl.float32:
        b_added = tl.dot(tl.trans(b_k), b_v, rest * b_state / grow_v, input_precision=PRECISION)
        b_state = whole * b_state + b_added * grow_v
    else:
        b_state = (whole + rest) * b_state / grow_v
        b_state = tl.dot(tl.trans(b_k), b_v, b_state, input_precision=PRECISION) * grow_v
    return b_state


@triton.jit
def pass_tile(
    pointers,
    strides,
    place,
    b_state,
    powers,
    here,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    TAKE_IN: tl.constexpr,
    earlier=None,
    ahead=1.0,
):
    """Write the outputs of one tile, given the state before it; return the state after it if TAKE_IN.

    With ``earlier``, the tile's state is ahead · S + earlier[0]ᵀ earlier[1]. A pair for the next tile is then
    returned too, and a tile that is not ``here`` may have rows: they have outputs, and S stays as it is.

    Args:
        pointers, strides: of q, k, v and the output (None: none is found); strides are those of tokens.
        place: first row; ends of the rows that exist, and of those with outputs; first column of the slice.
        b_state: the state before the tile.
        powers: from `chunk_powers`.
        here: whether the tile exists; where not, its rows must be masked, and the state stays as it is.
        COLUMNS: COLS_K, COLS_V, DK, DV.
    """
    p_q, p_k, p_v, p_out = pointers
    stride_q, stride_k, stride_v, stride_out = strides
    first_row, end_row, end_out, first_col = place
    b_from_start, b_within, b_to_end, whole, rest = powers
    COLS_K: tl.constexpr = COLUMNS[0]
    COLS_V: tl.constexpr = COLUMNS[1]
    DK: tl.constexpr = COLUMNS[2]
    DV: tl.constexpr = COLUMNS[3]
    if p_out is not None:
        # Ahead of the loads: otherwise sm_90's registers hold both forms of the state at once.
        b_operand, grow = as_operand(b_state, p_k.dtype.element_ty)
        b_q = load_tile(p_q, stride_q, end_out, 0, ROWS, COLS_K, DK, first_row)
    b_k = load_tile(p_k, stride_k, end_row, 0, ROWS, COLS_K, DK, first_row)
    b_v = load_tile(p_v, stride_v, end_row, first_col, ROWS, COLS_V, DV, first_row)
    if p_out is not None:
        b_q, grow_q = as_operand(b_q, b_k.dtype, LARGEST_TOKEN)
        pair = None if earlier is None else (earlier[0], earlier[1], 1.0)
        grow = grow * ahead
        b_out = chunk_output(b_q, b_k, b_v, b_operand, grow, b_from_start, b_within, PRECISION, pair)
        store_tile(p_out, b_out * grow_q, stride_out, end_out, first_col, ROWS, COLS_V, DV, first_row)
    if TAKE_IN:
        whole = tl.where(here, whole, 1.0)
        rest = tl.where(here, rest, 0.0)
        if earlier is not None:
            pair = (b_k, (b_v * b_to_end).to(b_v.dtype))
            b_k, b_v = tl.where(here, b_k, 0.0), tl.where(here, b_v, 0.0)
        b_state = chunk_state(b_state, b_k, b_v, b_to_end, whole, rest, PRECISION, SCALE_V)
    return b_state if earlier is None else (b_state, pair)


@triton.jit
def pull_tile(
    pointers,
    strides,
    place,
    b_grad,
    b_seen,
    powers,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE_V: tl.constexpr,
    later=None,
    ahead=1.0,
):
    """Write dk and dv (where their pointers are) of one tile; return the gradient of the state before it.

    The outputs' gradient may be wider than the other tokens; so may q, if the two have changed places.

    With ``later``, dk and dv see E + later[2] · later[0]ᵀ later[1], what the tile adds to E is ahead times as
    much, and the same for the tile before is returned too.

    Args:
        pointers, strides: of q, k, v, the outputs' gradient, dk and dv; strides are those of tokens.
        place: first row; ends of the rows that exist, and of those with dk and with dv; first column of the
            slice of Dv.
        b_grad, b_seen: E, which is carried on, and E as dk and dv see it.
        powers: to_end, within (transposed), from_start, whole, rest.
        COLUMNS: COLS_K, COLS_V, DK, DV.
    """
    p_q, p_k, p_v, p_g, p_dk, p_dv = pointers
    stride_q, stride_k, stride_v, stride_g, stride_dk, stride_dv = strides
    first_row, end_row, end_dk, end_dv, first_col = place
    b_to_end, b_within, b_from_start, whole, rest = powers
    COLS_K: tl.constexpr = COLUMNS[0]
    COLS_V: tl.constexpr = COLUMNS[1]
    DK: tl.constexpr = COLUMNS[2]
    DV: tl.constexpr = COLUMNS[3]
    TYPE_Q: tl.constexpr = p_q.dtype.element_ty
    TYPE_G: tl.constexpr = p_g.dtype.element_ty
    TYPE: tl.constexpr = TYPE_G if TYPE_G.primitive_bitwidth < TYPE_Q.primitive_bitwidth else TYPE_Q
    b_operand, grow = as_operand(b_seen, TYPE)
    b_q = load_tile(p_q, stride_q, end_row, 0, ROWS, COLS_K, DK, first_row)
    b_g = load_tile(p_g, stride_g, end_row, first_col, ROWS, COLS_V, DV, first_row)
    b_q, grow_q = as_operand(b_q, TYPE, LARGEST_TOKEN)
    b_g, grow_g = as_operand(b_g, TYPE, LARGEST_TOKEN)
    grow_g = grow_q * grow_g  # each sum below has a factor of both
    grow = grow / grow_g
    if p_dv is not None:
        b_k = load_tile(p_k, stride_k, end_dv, 0, ROWS, COLS_K, DK, first_row)
        pair = None if later is None else (later[0], later[1], later[2] / grow_g)
        b_dv = chunk_output(b_k, b_q, b_g, b_operand, grow, b_to_end, b_within, PRECISION, pair)
        store_tile(p_dv, b_dv * grow_g, stride_dv, end_dv, first_col, ROWS, COLS_V, DV, first_row)
    if p_dk is not None:
        b_v = load_tile(p_v, stride_v, end_dk, first_col, ROWS, COLS_V, DV, first_row)
        pair = None if later is None else (later[1], later[0], later[2] / grow_g)
        b_operand = tl.trans(b_operand)
        b_dk = chunk_output(b_v, b_g, b_q, b_operand, grow, b_to_end, b_within, PRECISION, pair)
        store_tile(p_dk, b_dk * grow_g, stride_dk, end_dk, 0, ROWS, COLS_K, DK, first_row)
    b_ahead = b_from_start * ahead
    b_grad = chunk_state(b_grad, b_q, b_g, b_ahead, whole, rest, PRECISION, SCALE_V, grow_g)
    return b_grad if later is None else (b_grad, (b_q, (b_g * b_from_start).to(TYPE), grow_g))


@triton.jit
def chosen(is_pred, p_main, p_pred, o_pred):
    """The main tokens' pointer or, o_pred elements on, the predictions'; the other where one is None."""
    if p_main is None:
        p_here = p_pred + o_pred
    elif p_pred is None:
        p_here = p_main
    else:
        p_here = tl.where(is_pred, p_pred + o_pred, p_main)
    return p_here


@triton.jit
def end_of(is_pred, end_row, p_main, p_pred):
    """end_row, but 0 for tokens whose pointer is None."""
    if p_main is None:
        end_row = tl.where(is_pred, end_row, 0)
    elif p_pred is None:
        end_row = tl.where(is_pred, 0, end_row)
    return end_row

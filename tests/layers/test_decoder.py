"""The decoder: every law of retention again, through layers, residuals, positions and carried states."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from module_cases import assert_same_state, make_decoder, pop_block_by_block, random_state
from retention_cases import MODES, assert_same_gradients, gradients, mode_options, normal
from torch import Tensor, nn
from torch.nn import functional as F

from retpop import RetNetConfig, RetNetState

# Built once for the laws that try many shapes.
DECODER = make_decoder()
ROPE = make_decoder(position="rope", norm="rmsnorm", ffn="glu", norm_first=False, final_norm=True)

VARIANTS = [
    {},
    {"norm_first": False},
    {"final_norm": True},
    {"norm_first": False, "final_norm": True, "norm": "rmsnorm"},
    {"norm": "rmsnorm", "norm_eps": 0.1},
    {"ffn": "glu"},
    {"ffn": "glu", "activation": "gelu", "bias": False},
    {"activation": "relu", "num_layers": 3},
]


def norm_by_hand(x: Tensor, norm: nn.Module, cfg: RetNetConfig) -> Tensor:
    if cfg.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * norm.weight
    return x if getattr(norm, "bias", None) is None else x + norm.bias


def feed_forward_by_hand(x: Tensor, layer: nn.Module, cfg: RetNetConfig) -> Tensor:
    activation = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[cfg.activation]
    hidden = layer.in_proj(x)
    if cfg.ffn == "glu":
        hidden = activation(hidden[..., : cfg.ffn_dim]) * hidden[..., cfg.ffn_dim :]
    else:
        hidden = activation(hidden)
    return layer.out_proj(hidden)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_residual_stack(options: dict[str, object]) -> None:
    """x + f(norm(x)), or x + norm(f(x)); each layer with its own slice of the state."""
    decoder = make_decoder(**options)
    cfg, x, state = decoder.cfg, normal(2, 19, 12, seed=0), random_state(decoder, 2)
    hidden, kvs = x, []
    for index, block in enumerate(decoder.layers):
        own = RetNetState(state.kv[index : index + 1], state.position)
        if cfg.norm_first:
            mixed, own = block.retention(norm_by_hand(hidden, block.retention_norm, cfg), own)
            hidden = hidden + mixed
            normed = norm_by_hand(hidden, block.feed_forward_norm, cfg)
            hidden = hidden + feed_forward_by_hand(normed, block.feed_forward, cfg)
        else:
            mixed, own = block.retention(hidden, own)
            hidden = hidden + norm_by_hand(mixed, block.retention_norm, cfg)
            fed = feed_forward_by_hand(hidden, block.feed_forward, cfg)
            hidden = hidden + norm_by_hand(fed, block.feed_forward_norm, cfg)
        kvs.append(own.kv)
    if cfg.final_norm:
        hidden = norm_by_hand(hidden, decoder.final_norm, cfg)
    out, after = decoder(x, state)
    torch.testing.assert_close(out, hidden, rtol=1e-11, atol=1e-11)
    assert_same_state(after, RetNetState(torch.cat(kvs), state.position + 19), 1e-11)


@pytest.mark.parametrize("mode", MODES)
@given(
    B=st.integers(0, 3),
    T=st.integers(0, 36),
    cut=st.integers(0, 36),
    with_state=st.booleans(),
    other_variant=st.booleans(),
)
def test_modes_agree_and_a_cut_with_carried_state_is_the_whole(
    mode: str, B: int, T: int, cut: int, with_state: bool, other_variant: bool
) -> None:
    decoder = ROPE if other_variant else DECODER
    x, state = normal(B, T, 12, seed=T), random_state(decoder, B) if with_state else None
    cut = min(cut, T)
    whole, after = decoder(x, state, backend="reference")
    first, between = decoder(x[:, :cut], state, **mode_options(mode))
    second, final = decoder(x[:, cut:], between, **mode_options(mode))
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-9, atol=1e-9)
    assert_same_state(final, after, 1e-9)
    assert final.position.tolist() == [(5 + 7 * b if with_state else 0) + T for b in range(B)]


@given(
    B=st.integers(0, 3),
    N=st.integers(0, 4),
    L=st.integers(1, 4),
    M=st.integers(0, 5),
    choice=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    with_state=st.booleans(),
    with_reset=st.booleans(),
    other_variant=st.booleans(),
)
@example(2, 3, 4, 3, (0, 3), True, True, False)  # training
@example(2, 1, 4, 3, (1, 1), True, False, False)  # imagination
@example(2, 4, 2, 5, (2, 3), True, True, True)
def test_pop_is_block_by_block_passes(
    B: int,
    N: int,
    L: int,
    M: int,
    choice: tuple[int, int],
    with_state: bool,
    with_reset: bool,
    other_variant: bool,
) -> None:
    decoder = ROPE if other_variant else DECODER
    offset = choice[0] % (N + 1)
    P = choice[1] % (N + 2 - offset)
    x, x_pred = normal(B, N * L, 12, seed=N), normal(B, P, M, 12, seed=M + 50)
    state = random_state(decoder, B) if with_state else None
    reset = normal(B, N, seed=9) > 0.3 if with_reset else None
    arguments = {"block_size": L, "offset": offset, "reset": reset}
    out, pred, after = decoder.pop(x, x_pred, state, **arguments)
    expected = pop_block_by_block(decoder, x, x_pred, state, **arguments)
    assert (out.shape, pred.shape) == (x.shape, x_pred.shape)
    torch.testing.assert_close(out, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pred, expected[1], rtol=1e-9, atol=1e-9)
    assert_same_state(after, expected[2], 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 17, 1], [0], [1, 1], [20]])
def test_packed_sequences_are_separate_calls(mode: str, with_state: bool, lengths: list[int]) -> None:
    x, rows = normal(1, sum(lengths), 12, seed=0), len(lengths)
    edges = [0, *accumulate(lengths)]
    state = random_state(DECODER, rows) if with_state else None
    out, after = DECODER(x, state, cu_seqlens=torch.tensor(edges, dtype=torch.int32), **mode_options(mode))
    outs, states = [], []
    for s in range(rows):
        own = None if state is None else state.select(slice(s, s + 1))
        alone, own = DECODER(x[:, edges[s] : edges[s + 1]], own)
        outs.append(alone)
        states.append(own)
    torch.testing.assert_close(out, torch.cat(outs, dim=1), rtol=1e-10, atol=1e-10)
    assert_same_state(after, RetNetState.cat(states), 1e-10)


@pytest.mark.parametrize("offset", [0, 1])
def test_every_gradient_of_pop(offset: int) -> None:
    """Weights, inputs and the given state: as through block-by-block passes."""
    x, x_pred = normal(2, 6, 12, seed=0).requires_grad_(), normal(2, 2, 4, 12, seed=1).requires_grad_()
    kv = random_state(DECODER, 2).kv.requires_grad_()
    state = RetNetState(kv, torch.tensor([4, 9]))
    reset = torch.tensor([[False, True], [False, False]])
    arguments = {"block_size": 3, "offset": offset, "reset": reset}
    leaves = [x, x_pred, kv, *DECODER.parameters()]
    found = []
    for out, pred, after in (
        DECODER.pop(x, x_pred, state, **arguments),
        pop_block_by_block(DECODER, x, x_pred, state, **arguments),
    ):
        found.append(gradients((out, pred, after.kv), leaves))
    assert_same_gradients(found[0], found[1], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_later_token_changes_nothing_earlier(mode: str) -> None:
    x = normal(2, 20, 12, seed=0)
    before, _ = DECODER(x, **mode_options(mode))
    for t in (0, 15, 16, 19):
        changed = x.clone()
        changed[:, t] += 1.0
        after, _ = DECODER(changed, **mode_options(mode))
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[:, t], before[:, t])


def test_rows_do_not_touch_each_other() -> None:
    x, state = normal(3, 9, 12, seed=0), random_state(DECODER, 3)
    out, after = DECODER(x, state)
    rows = torch.tensor([2, 0])
    part, part_after = DECODER(x[rows], state.select(rows))
    torch.testing.assert_close(part, out[rows], rtol=1e-11, atol=1e-11)
    assert_same_state(part_after, after.select(rows), 1e-11)


def test_predictions_leave_no_trace_in_the_sequence() -> None:
    x, state = normal(2, 6, 12, seed=0), random_state(DECODER, 2)
    alone, after = DECODER(x, state)
    out, _, same = DECODER.pop(x, normal(2, 3, 4, 12, seed=1), state, block_size=3)
    torch.testing.assert_close(out, alone, rtol=1e-11, atol=1e-11)
    assert_same_state(same, after, 1e-11)


def test_imagination_in_one_pass_a_step_is_two_passes() -> None:
    state = two_pass_state = random_state(DECODER, 2)
    for step in range(3):
        x, u = normal(2, 5, 12, seed=step), normal(2, 1, 4, 12, seed=100)
        _, pred, state = DECODER.pop(x, u, state, block_size=5, offset=1)
        _, two_pass_state = DECODER(x, two_pass_state)
        _, predicted, unchanged = DECODER.pop(x[:, :0], u, two_pass_state, block_size=5)
        torch.testing.assert_close(pred, predicted, rtol=1e-10, atol=1e-10)
        assert_same_state(state, two_pass_state, 1e-10)
        assert_same_state(unchanged, two_pass_state, 0)


def test_positions_count_from_the_last_reset() -> None:
    state = random_state(DECODER, 3, start=100)
    reset = torch.tensor([[False, False, False], [True, False, False], [True, False, True]])
    _, _, after = DECODER.pop(
        normal(3, 12, 12, seed=0), normal(3, 0, 0, 12, seed=0), state, block_size=4, reset=reset
    )
    assert after.position.tolist() == [112, 12, 4]


def test_the_first_reset_drops_the_given_state() -> None:
    state = RetNetState(torch.full((2, 2, 2, 4, 10), torch.nan).double(), torch.tensor([50, 60]))
    x, u = normal(2, 6, 12, seed=0), normal(2, 3, 2, 12, seed=1)
    reset = torch.tensor([[True, False], [True, False]])
    dropped = DECODER.pop(x, u, state, block_size=3, reset=reset)
    fresh = DECODER.pop(x, u, block_size=3)
    for a, b in zip(dropped[:2], fresh[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert_same_state(dropped[2], fresh[2], 1e-12)


def test_state_reset_is_a_new_beginning() -> None:
    state, x = random_state(DECODER, 2), normal(2, 5, 12, seed=0)
    out, _ = DECODER(x, state.reset(torch.tensor([True, False])))
    torch.testing.assert_close(out[:1], DECODER(x[:1])[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1:], DECODER(x, state)[0][1:], rtol=1e-12, atol=1e-12)


def test_no_tokens_change_nothing() -> None:
    state = random_state(DECODER, 2)
    for mode in MODES:
        out, same = DECODER(torch.zeros(2, 0, 12).double(), state, mode=mode)
        assert out.shape == (2, 0, 12)
        assert_same_state(same, state, 0)
        _, zeros = DECODER(torch.zeros(2, 0, 12).double(), mode=mode)
        assert_same_state(zeros, DECODER.init_state(2), 0)


def test_gradcheck_of_pop() -> None:
    decoder = make_decoder(num_layers=1)
    x, u = normal(1, 4, 12, seed=0).requires_grad_(), normal(1, 2, 2, 12, seed=1).requires_grad_()

    def run(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, pred, state = decoder.pop(x, u, block_size=2, reset=torch.tensor([[False, True]]))
        return out, pred, state.kv

    assert torch.autograd.gradcheck(run, (x, u), fast_mode=True)

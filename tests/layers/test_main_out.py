"""`pop(..., main_out="last")`: the last token of each block, as if all had come out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from module_cases import assert_same_state, make_decoder, make_module, random_state, small_config
from retention_cases import assert_same_gradients, gradients, normal
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from retpop import MultiScaleRetention, RetNetState

DECODERS = {
    "plain": make_decoder(),
    "norm last": make_decoder(
        position="rope", norm="rmsnorm", ffn="glu", norm_first=False, final_norm=True, bias=False
    ),
    "one layer": make_decoder(num_layers=1, position=None, head_norm="rmsnorm", head_norm_affine=True),
}
LAYER = make_module(MultiScaleRetention, small_config())


@given(
    name=st.sampled_from([*DECODERS, "layer"]),
    backend=st.sampled_from(["torch", "reference"]),
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 4), st.integers(0, 5)),
    choice=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    with_state=st.booleans(),
    with_reset=st.booleans(),
)
@example("plain", "torch", (2, 3, 4, 3), (0, 3), True, True)  # training
@example("norm last", "torch", (2, 1, 4, 3), (1, 1), True, False)  # imagination
@example("plain", "torch", (2, 0, 4, 3), (0, 1), True, False)
@example("plain", "reference", (2, 3, 4, 3), (1, 3), True, True)
def test_they_are_those_of_the_full_call(
    name: str,
    backend: str,
    sizes: tuple[int, int, int, int],
    choice: tuple[int, int],
    with_state: bool,
    with_reset: bool,
) -> None:
    module = DECODERS.get(name, LAYER)
    B, N, L, M = sizes
    offset = choice[0] % (N + 1)
    P = choice[1] % (N + 2 - offset)
    x, x_pred = normal(B, N * L, 12, seed=N), normal(B, P, M, 12, seed=M + 50)
    state = random_state(module, B) if with_state else None
    reset = normal(B, N, seed=9) > 0.3 if with_reset else None
    arguments = {"block_size": L, "offset": offset, "reset": reset, "backend": backend}
    out, pred, after = module.pop(x, x_pred, state, main_out="last", **arguments)
    expected, expected_pred, expected_after = module.pop(x, x_pred, state, **arguments)
    assert (out.shape, pred.shape) == ((B, N, 12), x_pred.shape)
    torch.testing.assert_close(out, expected[:, L - 1 :: L], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pred, expected_pred, rtol=1e-10, atol=1e-10)
    assert_same_state(after, expected_after, 1e-10)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", DECODERS)
def test_every_gradient(name: str, offset: int) -> None:
    """Through the last tokens, the predictions and the state, to weights, inputs and the state given."""
    decoder = DECODERS[name]
    x, x_pred = normal(2, 6, 12, seed=0).requires_grad_(), normal(2, 2, 4, 12, seed=1).requires_grad_()
    kv = random_state(decoder, 2).kv.requires_grad_()
    state = RetNetState(kv, torch.tensor([4, 9]))
    arguments = {"block_size": 3, "offset": offset, "reset": torch.tensor([[False, True], [False, False]])}
    out, pred, after = decoder.pop(x, x_pred, state, main_out="last", **arguments)
    all_out, all_pred, all_after = decoder.pop(x, x_pred, state, **arguments)
    leaves = [x, x_pred, kv, *decoder.parameters()]
    found = gradients((out, pred, after.kv), leaves)
    expected = gradients((all_out[:, 2::3], all_pred, all_after.kv), leaves)
    assert_same_gradients(found, expected, 1e-9)


class LinearRows(TorchFunctionMode):
    """Counts the tokens that go through linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.linear:
            self.counts.append(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


def test_only_these_tokens_pass_through_the_rest_of_the_last_layer() -> None:
    """All of them give keys and values; one a block, and predictions, have queries, gate and feed-forward."""
    x, x_pred = normal(2, 12, 12, seed=0), normal(2, 3, 2, 12, seed=1)
    with LinearRows() as rows:
        DECODERS["plain"].pop(x, x_pred, block_size=4, main_out="last")
    everything, short = 2 * (12 + 6), 2 * (3 + 6)
    first_layer = [everything] * 4  # projection, output, feed-forward in and out
    assert rows.counts == [*first_layer, short, everything, everything, short, short, short, short]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_a_graph_break() -> None:
    decoder = make_decoder(torch.float32)
    x, x_pred = (normal(*shape, 12, seed=0, dtype=torch.float32) for shape in ((2, 6), (2, 2, 4)))
    compiled = torch.compile(decoder.pop, fullgraph=True, backend="eager")
    actual = compiled(x, x_pred, block_size=3, main_out="last")
    expected = decoder.pop(x, x_pred, block_size=3, main_out="last")
    for a, e in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)

"""The decoder as a module: how it starts, trains, is copied, stored, cast, transformed and compiled."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from module_cases import assert_same_state, make_decoder, make_module, random_state, small_config
from retention_cases import assert_same_gradients, gradients, normal
from torch import Tensor
from torch.utils import _pytree as pytree

import retpop
from retpop import RetNetConfig, RetNetDecoder
from retpop.layers import decoder as decoder_module
from retpop.layers import retention

DECODER = make_decoder()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_init_state(dtype: torch.dtype, expected: torch.dtype) -> None:
    decoder = make_decoder(dtype)
    state = decoder.init_state(3)
    assert (state.kv.shape, state.kv.dtype) == ((2, 3, 2, 4, 10), expected)
    assert (state.position.tolist(), state.position.dtype) == ([0, 0, 0], torch.int64)
    assert not state.kv.any()
    x = normal(3, 5, 12, seed=0, dtype=dtype)
    assert torch.equal(decoder(x, state)[0], decoder(x)[0])
    assert decoder.init_state(0).kv.shape == (2, 0, 2, 4, 10)
    assert decoder.init_state(2, device="meta").kv.device.type == "meta"
    assert decoder.init_state(2, dtype=expected).kv.dtype is expected
    other = torch.float32 if expected is torch.float64 else torch.float64
    with pytest.raises(TypeError, match=rf"init_state\(\): dtype is {other}; it must be {expected}"):
        decoder.init_state(2, dtype=other)
    assert decoder.layers[0].retention.init_state(2).kv.shape == (1, 2, 2, 4, 10)


class DropoutRecorder:
    """Stands in for dropout: remembers the shapes it was given and how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], float, bool]] = []

    def __call__(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        self.calls.append((tuple(x.shape), p, training))
        return x


def test_dropout_is_at_four_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the retention output, after its projection, in the FFN's hidden layer, after the FFN."""
    recorder = DropoutRecorder()
    for module in (decoder_module, retention):
        monkeypatch.setattr(module, "dropout", recorder)
    decoder = make_decoder(dropout=0.3, num_layers=1)
    for training in (True, False):
        recorder.calls.clear()
        decoder.train(training)(normal(2, 5, 12, seed=0))
        shapes = [(2, 5, 2, 10), (2, 5, 12), (2, 5, 16), (2, 5, 12)]
        assert recorder.calls == [(shape, 0.3, training) for shape in shapes]


def test_dropout_draws_for_sequence_and_predictions_independently() -> None:
    """A prediction block equal to the first block gets its own masks; without dropout the two are equal."""
    decoder = make_decoder(dropout=0.4)
    x = normal(2, 5, 12, seed=0)
    out, pred, _ = decoder.pop(x, x.unsqueeze(1), block_size=5)
    torch.testing.assert_close(pred[:, 0], out, rtol=1e-11, atol=1e-11)
    torch.manual_seed(0)
    out, pred, _ = decoder.train().pop(x, x.unsqueeze(1), block_size=5)
    assert not torch.isclose(pred[:, 0], out).any(dim=-1).all()
    assert not torch.equal(decoder(x)[0], decoder(x)[0])


def test_dropout_off_in_eval_and_at_zero() -> None:
    x = normal(2, 9, 12, seed=0)
    plain = make_decoder()
    assert torch.equal(make_decoder(dropout=0.4)(x)[0], plain(x)[0])
    assert torch.equal(plain.train()(x)[0], plain.eval()(x)[0])


def test_repeats_are_bitwise_equal_and_dropout_follows_the_seed() -> None:
    decoder = make_decoder(torch.float32, dropout=0.2).train()
    x = normal(2, 40, 12, seed=0, dtype=torch.float32)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        out, state = decoder(x)
        results.append([out, *gradients((out, state.kv), list(decoder.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.1)]
)
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    decoder = make_decoder(dtype)
    x, u = normal(2, 60, 12, seed=0, dtype=dtype), normal(2, 3, 4, 12, seed=1, dtype=dtype)
    results = decoder.pop(x, u, block_size=20)
    expected = copy.deepcopy(decoder).double().pop(x.double(), u.double(), block_size=20)
    assert [t.dtype for t in results[:2]] == [dtype, dtype]
    assert results[2].kv.dtype is torch.float32
    for a, e in [*zip(results[:2], expected[:2], strict=True), (results[2].kv, expected[2].kv)]:
        error = (a.double() - e).square().mean().sqrt() / e.square().mean().sqrt()
        assert error < tolerance


def test_layers_start_with_weights_of_their_own() -> None:
    torch.manual_seed(0)
    decoder = RetNetDecoder(small_config(num_layers=3))
    for name, first in decoder.layers[0].named_parameters():
        if "norm" in name or "bias" in name:
            continue
        for other in decoder.layers[1:]:
            assert not torch.equal(first, dict(other.named_parameters())[name])
    torch.manual_seed(0)
    again = RetNetDecoder(small_config(num_layers=3))
    for a, b in zip(decoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_initial_weights_of_the_feed_forward() -> None:
    """Glorot-uniform by the width of each half of a gated layer; biases zero."""
    torch.manual_seed(0)
    cfg = RetNetConfig(embed_dim=64, num_heads=4, num_layers=1, ffn_dim=96, ffn="glu")
    feed_forward = RetNetDecoder(cfg).layers[0].feed_forward
    for weight in (*feed_forward.in_proj.weight.chunk(2), feed_forward.out_proj.weight):
        limit = math.sqrt(6 / sum(weight.shape))
        assert 0.98 * limit < weight.abs().max() <= limit
    assert not feed_forward.in_proj.bias.any()


def test_initial_weights_of_a_plain_feed_forward() -> None:
    torch.manual_seed(0)
    cfg = RetNetConfig(embed_dim=64, num_heads=4, num_layers=1, ffn_dim=96)
    weight = RetNetDecoder(cfg).layers[0].feed_forward.in_proj.weight
    limit = math.sqrt(6 / (64 + 96))
    assert 0.98 * limit < weight.abs().max() <= limit


def test_a_chunk_size_in_the_call_goes_before_the_configuration_s() -> None:
    """Seen by the last bit: other chunks round differently."""
    x = normal(1, 100, 12, seed=0, dtype=torch.float32)
    short, long = (make_decoder(torch.float32, chunk_size=size) for size in (16, 64))
    assert not torch.equal(short(x)[0], long(x)[0])
    assert torch.equal(short(x, chunk_size=64)[0], long(x)[0])
    assert torch.equal(long(x, chunk_size=16)[0], short(x)[0])


def test_a_checkpoint_holds_weights_only_and_restores_the_model() -> None:
    other = make_module(RetNetDecoder, small_config(), seed=1)
    assert set(other.state_dict()) == {name for name, _ in other.named_parameters()}
    other.load_state_dict(DECODER.state_dict())
    x = normal(1, 5, 12, seed=0)
    assert torch.equal(other(x)[0], DECODER(x)[0])


def test_copies_compute_the_same() -> None:
    x = normal(1, 5, 12, seed=0)
    for copied in (copy.deepcopy(DECODER), pickle.loads(pickle.dumps(DECODER))):
        assert torch.equal(copied(x)[0], DECODER(x)[0])


def test_made_on_the_meta_device_and_filled_later() -> None:
    empty = RetNetDecoder(small_config(), device="meta", dtype=torch.float64)
    assert {tensor.device.type for tensor in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(DECODER.state_dict())
    x = normal(1, 5, 12, seed=0)
    assert torch.equal(filled(x)[0], DECODER(x)[0])


def test_shapes_on_the_meta_device() -> None:
    decoder = RetNetDecoder(small_config(), device="meta")
    x, u = torch.zeros(2, 10, 12, device="meta"), torch.zeros(2, 3, 4, 12, device="meta")
    out, state = decoder(x)
    assert (out.shape, state.kv.shape) == ((2, 10, 12), (2, 2, 2, 4, 10))
    out, pred, _ = decoder.pop(
        x, u, state, block_size=5, reset=torch.zeros(2, 2, dtype=torch.bool, device="meta")
    )
    assert (out.shape, pred.shape) == ((2, 10, 12), (2, 3, 4, 12))


def test_extra_repr_shows_the_configuration() -> None:
    text = repr(make_decoder(ffn="glu", final_norm=True, dropout=0.25))
    for shown in ("embed_dim=12", "num_layers=2", "ffn='glu'", "dropout=0.25", "LayerNorm"):
        assert shown in text


def test_training_after_inference_mode() -> None:
    decoder = make_decoder()
    x = normal(2, 9, 12, seed=0)
    with torch.inference_mode():
        decoder(x)
        decoder.pop(x, x.unsqueeze(1), block_size=9)
    out, state = decoder(x)
    leaves = list(decoder.parameters())
    expected, after = decoder(x, backend="reference")
    assert_same_gradients(gradients((out, state.kv), leaves), gradients((expected, after.kv), leaves), 1e-9)


def test_a_state_taken_under_inference_mode_is_a_context_for_training() -> None:
    with torch.inference_mode():
        _, state = DECODER(normal(2, 9, 12, seed=0))
    context = pytree.tree_map(lambda tensor: tensor.clone(), state)
    out, _ = DECODER(normal(2, 5, 12, seed=1), context)
    assert out.requires_grad


def test_an_ensemble_by_vmap() -> None:
    members = [make_module(RetNetDecoder, small_config(), seed=seed) for seed in range(3)]
    weights, buffers = torch.func.stack_module_state(members)
    x = normal(2, 9, 12, seed=0)

    def run(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(members[0], (weights, buffers), (x,))[0]

    outs = torch.vmap(run, in_dims=(0, None))(weights, {name: tensor[0] for name, tensor in buffers.items()})
    for out, member in zip(outs, members, strict=True):
        torch.testing.assert_close(out, member(x)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_a_graph_break() -> None:
    decoder = make_decoder(num_layers=1)
    state, x, u = random_state(decoder, 2), normal(2, 6, 12, seed=0), normal(2, 3, 2, 12, seed=1)
    out, after = torch.compile(decoder, fullgraph=True, backend="eager")(x, state)
    expected, expected_after = decoder(x, state)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert_same_state(after, expected_after, 1e-11)
    reset = torch.tensor([[False, True], [False, False]])
    compiled = torch.compile(decoder.pop, fullgraph=True, backend="eager")
    actual = compiled(x, u, state, block_size=3, reset=reset)
    for a, e in zip(actual[:2], decoder.pop(x, u, state, block_size=3, reset=reset)[:2], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_exported_with_its_state() -> None:
    cfg = retpop.RetNetConfig(embed_dim=16, num_heads=2, num_layers=2, ffn_dim=16)
    decoder = retpop.RetNetDecoder(cfg).eval()
    x, state = torch.randn(2, 1, 16), decoder.init_state(2)
    _, state = decoder(torch.randn(2, 5, 16), state)
    program = torch.export.export(decoder, (x, state.detach())).module()
    out, after = program(x, state.detach())
    expected, expected_after = decoder(x, state.detach())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after.kv, expected_after.kv)
    assert torch.equal(after.position, expected_after.position)

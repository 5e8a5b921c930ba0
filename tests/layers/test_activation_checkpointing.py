"""A decoder that keeps only its layers' inputs: the same results from less memory."""

from __future__ import annotations

import pytest
import torch
from module_cases import make_decoder, random_state
from retention_cases import assert_same_gradients, gradients, normal
from torch import Tensor

from retpop import RetNetConfig, RetNetDecoder, RetNetState


def run(decoder: RetNetDecoder, main_out: str = "all") -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What comes out of a call of `pop` in training, and every gradient."""
    torch.manual_seed(0)  # for dropout
    x, x_pred = normal(2, 6, 12, seed=0).requires_grad_(), normal(2, 2, 4, 12, seed=1).requires_grad_()
    kv = random_state(decoder, 2).kv.requires_grad_()
    state = RetNetState(kv, torch.tensor([4, 9]))
    out, pred, after = decoder.pop(x, x_pred, state, block_size=3, offset=1, main_out=main_out)
    results = (out, pred, after.kv)
    return results, gradients(results, [x, x_pred, kv, *decoder.parameters()])


@pytest.mark.parametrize("main_out", ["all", "last"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_results_and_gradients_are_the_same(dropout: float, main_out: str) -> None:
    decoder = make_decoder(dropout=dropout).train()
    expected, expected_gradients = run(decoder, main_out)
    decoder.checkpoint_activations = True
    actual, actual_gradients = run(decoder, main_out)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    assert_same_gradients(actual_gradients, expected_gradients, 1e-12)


def kept_for_backward(decoder: RetNetDecoder) -> int:
    """Bytes of the tensors that a forward pass leaves to its backward, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out, _ = decoder(normal(2, 100, 12, seed=0).requires_grad_())
    assert out.requires_grad
    return sum(size for storage, size in storages.items() if storage not in weights)


def test_less_is_kept() -> None:
    decoder = make_decoder()
    plain = kept_for_backward(decoder)
    decoder.checkpoint_activations = True
    assert kept_for_backward(decoder) < plain / 4


def test_without_gradients_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a checkpoint without need")

    monkeypatch.setattr("retpop.layers.decoder.checkpoint", refuse)
    decoder = make_decoder()
    decoder.checkpoint_activations = True
    with torch.no_grad():
        decoder(normal(1, 3, 12, seed=0))
    with pytest.raises(AssertionError, match="without need"):
        decoder(normal(1, 3, 12, seed=0))


@pytest.mark.usefixtures("fresh_compiler")
def test_it_compiles_without_a_graph_break() -> None:
    decoder = make_decoder(torch.float32)
    decoder.checkpoint_activations = True
    x = normal(2, 9, 12, seed=0, dtype=torch.float32).requires_grad_()
    out, _ = torch.compile(decoder, fullgraph=True, backend="aot_eager")(x)
    expected, _ = decoder(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    leaves = [x, *decoder.parameters()]
    assert_same_gradients(gradients((out,), leaves), gradients((expected,), leaves), 1e-4)


def test_the_argument() -> None:
    cfg = RetNetConfig(embed_dim=8, num_heads=2, num_layers=1, ffn_dim=8)
    assert RetNetDecoder(cfg, checkpoint_activations=True).checkpoint_activations
    assert not RetNetDecoder(cfg).checkpoint_activations
    with pytest.raises(TypeError, match="RetNetDecoder: checkpoint_activations is 1"):
        RetNetDecoder(cfg, checkpoint_activations=1)

"""A layer's decay that learns: its gradient, its precision, and what it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from module_cases import make_decoder, make_module, small_config
from retention_cases import normal
from torch import Tensor, nn

from retpop import MultiScaleRetention, RetNetConfig, RetNetDecoder, retnet_decay

X = normal(2, 20, 12, seed=0)
X_PRED = normal(2, 2, 3, 12, seed=1)

CALLS: dict[str, Callable[..., tuple]] = {
    "sequence": lambda decoder, **options: decoder(X, **options),
    "packed": lambda decoder, **options: decoder(X[:1], cu_seqlens=torch.tensor([0, 3, 20]), **options),
    "POP": lambda decoder, **options: decoder.pop(X, X_PRED, block_size=10, main_out="last", **options),
}


def gradients_of(decoder: nn.Module, call: Callable[..., tuple], **options: object) -> dict[str, Tensor]:
    decoder.zero_grad()
    *outs, state = call(decoder, **options)
    sum((x**2).sum() for x in (*outs, state.kv)).backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(name: str, checkpointed: bool) -> None:
    """Two layers with decays of their own; the backend of the reference says what is right."""
    decoder = make_decoder(learn_decay=True, decay=((-0.5, -0.1), (-0.02, -0.3)))
    expected = gradients_of(decoder, CALLS[name], backend="reference")
    assert all(expected[f"layers.{n}.retention.decay.log_rate"].all() for n in range(2))
    decoder.checkpoint_activations = checkpointed
    with torch.no_grad():
        CALLS[name](decoder)
    assert_equal_gradients(gradients_of(decoder, CALLS[name]), expected, 1e-9)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    layer = make_module(MultiScaleRetention, small_config(learn_decay=True))
    expected = gradients_of(layer, CALLS["sequence"])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_equal_gradients(gradients_of(layer, lambda _: compiled(X)), expected, 1e-9)


def test_the_right_horizon_is_learned() -> None:
    """From horizons of 3 and 4 tokens to those of a layer with equal weights: 10 and 30."""
    cfg = RetNetConfig(embed_dim=8, num_heads=2, decay=(-1 / 10, -1 / 30), learn_decay=True)
    torch.manual_seed(0)
    target = MultiScaleRetention(cfg)
    layer = copy.deepcopy(target)
    layer.log_decay = torch.tensor([-1 / 3, -1 / 4])
    optimizer = torch.optim.Adam(layer.decay.parameters(), lr=0.1)
    x = normal(4, 64, 8, seed=3, dtype=torch.float32)
    wanted = target(x)[0].detach()
    losses = []
    for _ in range(60):
        loss = (layer(x)[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]
    torch.testing.assert_close(layer.log_decay, target.log_decay, rtol=0.1, atol=0)


def test_it_starts_as_the_layer_that_does_not_learn() -> None:
    cfg = small_config(decay="log_spaced")
    fixed, learned = (make_decoder(decay="log_spaced", learn_decay=learns) for learns in (False, True))
    missing, unexpected = learned.load_state_dict(fixed.state_dict(), strict=False)
    assert [name.rpartition(".")[2] for name in missing] == ["log_rate"] * 2
    assert not unexpected
    for layer in learned.layers:
        layer.retention.decay.reset_parameters()
    assert learned.layers[0].retention.log_decay.tolist() == pytest.approx(cfg.log_decays(), rel=1e-14)
    torch.testing.assert_close(learned(X)[0], fixed(X)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda layer: layer.bfloat16(), torch.float32),
        (lambda layer: layer.half().float(), torch.float32),
        (lambda layer: layer.to("cpu", torch.float16), torch.float32),
        (lambda layer: layer.double(), torch.float64),
    ],
)
def test_no_cast_costs_it_precision(
    change: Callable[[MultiScaleRetention], MultiScaleRetention], dtype: torch.dtype
) -> None:
    layer = MultiScaleRetention(RetNetConfig(embed_dim=8, num_heads=2, learn_decay=True))
    before = layer.decay.log_rate.clone()
    layer.decay.log_rate.grad = torch.ones(2)
    layer = change(layer)
    assert layer.decay.log_rate.dtype == layer.decay.log_rate.grad.dtype == dtype
    assert torch.equal(layer.decay.log_rate, before.to(dtype))
    assert MultiScaleRetention(layer.cfg, dtype=torch.bfloat16).decay.log_rate.dtype is torch.float32


def test_it_is_laid_out_without_memory_and_filled_later() -> None:
    layer = MultiScaleRetention(RetNetConfig(embed_dim=8, num_heads=2, learn_decay=True), "meta")
    assert layer.decay.log_rate.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(layer.log_decay, retnet_decay(2))


def test_it_is_saved_and_loaded() -> None:
    decoder = make_decoder(learn_decay=True)  # its rates are random
    cfg = RetNetConfig.from_dict(decoder.cfg.to_dict())
    loaded = RetNetDecoder(cfg, dtype=torch.float64).eval()
    loaded.load_state_dict(decoder.state_dict())
    assert torch.equal(loaded(X)[0], decoder(X)[0])
    assert torch.equal(loaded.layers[0].retention.log_decay, decoder.layers[0].retention.log_decay)


@pytest.mark.parametrize("value", [0.0, -math.inf])
def test_decays_out_of_its_reach_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"RetNetConfig: decay holds {value}.*finite and below 0"):
        small_config(learn_decay=True, decay=(-0.1, value))
    layer = make_module(MultiScaleRetention, small_config(learn_decay=True))
    with pytest.raises(ValueError, match=f"log_decay holds {value}.*finite and below 0"):
        layer.log_decay = torch.tensor([-0.1, value])

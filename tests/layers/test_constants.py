"""Decays and rotary frequencies: right whatever loads, casts, moves, copies or changes a module."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from module_cases import make_decoder, make_module, random_state, small_config
from retention_cases import normal
from torch import Tensor

import retpop
from retpop import MultiScaleRetention, RetNetConfig, RetNetDecoder

DECODER = make_decoder(torch.float32)
X = normal(2, 20, 12, seed=0, dtype=torch.float32)
OWN = (-3.0, -math.inf)


def on_meta() -> RetNetDecoder:
    with torch.device("meta"):
        return RetNetDecoder(small_config()).eval()


def assigned() -> RetNetDecoder:
    decoder = on_meta()
    decoder.load_state_dict(DECODER.state_dict(), assign=True)
    return decoder


def emptied() -> RetNetDecoder:
    decoder = on_meta().to_empty(device="cpu")
    decoder.load_state_dict(DECODER.state_dict())
    return decoder


def buffers_refilled() -> RetNetDecoder:
    """What transformers does to buffers that no checkpoint has."""
    decoder = assigned()
    for part in decoder.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, torch.full_like(buffer, 0.37, device="cpu"), persistent=False)
    return decoder


def changed_by(fn: Callable[[Tensor], Tensor]) -> Callable[[], RetNetDecoder]:
    def make() -> RetNetDecoder:
        decoder = copy.deepcopy(DECODER)._apply(fn)
        decoder.load_state_dict(DECODER.state_dict(), assign=True)
        return decoder

    return make


WAYS: dict[str, Callable[[], RetNetDecoder]] = {
    "assigned after meta": assigned,
    "to_empty": emptied,
    "buffers refilled": buffers_refilled,
    "copied": lambda: copy.deepcopy(DECODER),
    "pickled": lambda: pickle.loads(pickle.dumps(DECODER)),
    "cast there and back": changed_by(lambda tensor: tensor.bfloat16()),
    "zeroed": changed_by(torch.zeros_like),
}


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_those_of_the_model_that_was_saved(way: str) -> None:
    decoder = WAYS[way]()
    assert not list(decoder.buffers())
    expected, expected_state = DECODER(X)
    out, state = decoder(X)
    assert torch.equal(out, expected)
    assert torch.equal(state.kv, expected_state.kv)
    assert torch.equal(decoder.layers[1].retention.log_decay, retpop.retnet_decay(2))


def test_float64_weights_assigned_bring_float64_constants() -> None:
    decoder = RetNetDecoder(small_config()).eval()
    exact = make_decoder(torch.float64)
    decoder.load_state_dict(exact.state_dict(), assign=True)
    x = X.double()
    assert torch.equal(decoder(x)[0], exact(x)[0])
    assert torch.equal(decoder.layers[0].retention.log_decay, retpop.retnet_decay(2, dtype=torch.float64))


def test_a_device_without_float64_takes_every_tensor_of_a_module() -> None:
    def refuse(tensor: Tensor) -> Tensor:
        assert tensor.dtype is not torch.float64
        return tensor

    copy.deepcopy(DECODER)._apply(refuse)


def test_default_devices_and_dtypes_do_not_matter() -> None:
    expected = DECODER.train()(X)[0]
    decoder = copy.deepcopy(DECODER)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            actual = decoder(X)[0]
    finally:
        torch.set_default_dtype(torch.float32)
        DECODER.eval()
    assert torch.equal(actual, expected)


def test_tensors_are_kept_for_the_next_call_and_not_copied_with_a_module() -> None:
    decoder = copy.deepcopy(DECODER)
    with torch.inference_mode():
        decoder(X)
    kept = dict(decoder._constants._kept)
    assert kept
    decoder(X)[0].sum().backward()
    assert all(decoder._constants._kept[key] is tensor for key, tensor in kept.items())
    assert not copy.deepcopy(decoder)._constants._kept


def with_decays(*decays: tuple[float, ...]) -> RetNetDecoder:
    return make_module(RetNetDecoder, small_config(decay=decays), dtype=torch.float32)


SAME = tuple(retpop.retnet_decay(2, dtype=torch.float64).tolist())


def test_layers_have_the_decays_of_the_config() -> None:
    decoder = with_decays(SAME, OWN)
    for layer, decay in zip(decoder.layers, (SAME, OWN), strict=True):
        assert torch.equal(layer.retention.log_decay, torch.tensor(decay))
        alone = make_module(MultiScaleRetention, small_config(decay=decay), dtype=torch.float32)
        alone.load_state_dict(layer.retention.state_dict())
        assert torch.equal(layer.retention(X)[0], alone(X)[0])
    second = MultiScaleRetention(small_config(decay=(SAME, OWN)), layer=1)
    assert torch.equal(second.log_decay, torch.tensor(OWN))
    assert torch.equal(with_decays(SAME, SAME)(X)[0], DECODER(X)[0])


def assign(decoder: RetNetDecoder, index: int) -> None:
    decoder.layers[index].retention.log_decay = torch.tensor(OWN)


def write(decoder: RetNetDecoder, index: int) -> None:
    decoder.layers[index].retention.log_decay.copy_(torch.tensor(OWN))


@pytest.mark.parametrize("change", [assign, write])
@pytest.mark.parametrize("index", [0, 1])
def test_a_decay_changed_by_hand_is_the_layer_s_own(
    change: Callable[[RetNetDecoder, int], None], index: int
) -> None:
    decays = [SAME, SAME]
    decays[index] = OWN
    by_config, state = with_decays(*decays), random_state(DECODER, 2)
    x_pred = normal(2, 2, 3, 12, seed=1, dtype=torch.float32)
    decoder = copy.deepcopy(DECODER)
    decoder(X)
    change(decoder, index)
    for changed in (decoder, copy.deepcopy(decoder), copy.deepcopy(decoder).bfloat16().float()):
        changed.load_state_dict(by_config.state_dict())
        for backend in ("torch", "reference"):
            out, after = changed(X, state, backend=backend)
            expected, expected_after = by_config(X, state, backend=backend)
            assert torch.equal(out, expected)
            assert torch.equal(after.kv, expected_after.kv)
        pops = [d.pop(X, x_pred, state, block_size=10, main_out="last") for d in (changed, by_config)]
        assert torch.equal(pops[0][1], pops[1][1])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("change", [assign, write])
def test_a_compiled_decoder_has_changed_decays_too(change: Callable[[RetNetDecoder, int], None]) -> None:
    decoder = copy.deepcopy(DECODER)
    change(decoder, 1)
    out, _ = torch.compile(decoder, fullgraph=True, backend="eager")(X)
    torch.testing.assert_close(out, with_decays(SAME, OWN)(X)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.1, -1.0], "holds 0.1"),
        ([math.nan, -1.0], "holds nan"),
        ([-1.0], "has 1 log-decays but num_heads is 2"),
        ([[-1.0, -1.0]], "is \\[-1.0, -1.0\\]"),
    ],
)
def test_decays_that_are_none_are_refused(values: list, words: str) -> None:
    decoder = copy.deepcopy(DECODER)
    with pytest.raises((TypeError, ValueError), match=f"MultiScaleRetention: log_decay {words}"):
        decoder.layers[0].retention.log_decay = torch.tensor(values)
    assert torch.equal(decoder(X)[0], DECODER(X)[0])


def test_a_decay_that_is_written_into_is_checked_by_the_next_call() -> None:
    decoder = copy.deepcopy(DECODER)
    decoder.layers[1].retention.log_decay[0] = math.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="MultiScaleRetention: log_decay holds nan"):
            decoder(X)


def test_a_decay_is_a_constant_tensor() -> None:
    layer = copy.deepcopy(DECODER).layers[0].retention
    with pytest.raises(TypeError, match="log_decay is list"):
        layer.log_decay = [-1.0, -1.0]
    with pytest.raises(ValueError, match="log_decay requires a gradient"):
        layer.log_decay = torch.zeros(2, requires_grad=True)
    with pytest.raises(KeyError, match="log_decay"):
        layer.register_buffer("log_decay", torch.zeros(2))


def test_reading_a_decay_changes_nothing() -> None:
    """float32 rounds it; a module cast to float64 afterwards has the exact one."""
    layer = MultiScaleRetention(RetNetConfig(embed_dim=16, num_heads=4, decay="log_spaced"))
    assert torch.equal(layer.log_decay, retpop.log_spaced_decay(4))
    assert torch.equal(layer.double().log_decay, retpop.log_spaced_decay(4, dtype=torch.float64))

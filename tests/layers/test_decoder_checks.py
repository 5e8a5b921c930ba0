"""What a decoder refuses; its messages name the call, the argument, what came and what was wanted."""

from __future__ import annotations

import pytest
import torch
from module_cases import make_decoder
from torch import Tensor

import retpop
from retpop import RetNetState

DECODER = make_decoder()


def tokens(*shape: int, **options: object) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64, **options})


def state_of(layers: int = 2, rows: int = 2, **kv_options: object) -> RetNetState:
    return RetNetState(tokens(layers, rows, 2, 4, 10, **kv_options), torch.zeros(rows, dtype=torch.int64))


GOOD = {"x": tokens(2, 12, 12)}
GOOD_POP = {"x": tokens(2, 12, 12), "x_pred": tokens(2, 2, 3, 12), "block_size": 4}

BAD_STATES = {
    "state layers": (state_of(layers=1), ["(1, 2, 2, 4, 10)", "(2, 2, 2, 4, 10)"]),
    "state rows": (state_of(rows=3), ["(2, 3, 2, 4, 10)", "(2, 2, 2, 4, 10)"]),
    "state one row is not broadcast": (state_of(rows=1), ["(2, 1, 2, 4, 10)", "(2, 2, 2, 4, 10)"]),
    "state dtype": (state_of(dtype=torch.float32), ["float32", "float64"]),
    "state device": (state_of(device="meta"), ["meta", "cpu"]),
    "state a tensor": (tokens(2, 2, 2, 4, 10), ["Tensor", "RetNetState"]),
    "state a tuple": ((None, None), ["tuple", "RetNetState"]),
    "position dtype": (
        RetNetState(tokens(2, 2, 2, 4, 10), torch.zeros(2)),
        ["position", "float32", "int64"],
    ),
    "position shape": (
        RetNetState(tokens(2, 2, 2, 4, 10), torch.zeros(1, dtype=torch.int64)),
        ["position", "(1,)", "(2,)"],
    ),
    "position device": (
        RetNetState(tokens(2, 2, 2, 4, 10), torch.zeros(2, dtype=torch.int64, device="meta")),
        ["position", "meta", "cpu"],
    ),
}

BAD_INPUTS = {
    "x rank": ({"x": tokens(12, 12)}, ["x", "(12, 12)"]),
    "x width": ({"x": tokens(2, 12, 13)}, ["x", "(2, 12, 13)", "12"]),
    "x dtype": ({"x": tokens(2, 12, 12, dtype=torch.float32)}, ["x", "float32", "float64"]),
    "x integers": ({"x": tokens(2, 12, 12, dtype=torch.int64)}, ["x", "int64"]),
    "x device": ({"x": tokens(2, 12, 12, device="meta")}, ["x", "meta", "cpu"]),
    "x not a tensor": ({"x": None}, ["x", "None"]),
    "backend": ({"backend": "cuda"}, ["backend", "cuda", "torch"]),
    **{name: ({"state": state}, ["state", *words]) for name, (state, words) in BAD_STATES.items()},
}

BAD_SEQUENCES = {
    "mode": ({"mode": "serial"}, ["mode", "serial", "parallel"]),
    "chunk_size": ({"chunk_size": 20}, ["chunk_size", "20", "power of two"]),
    "chunk_size in parallel": ({"chunk_size": 16, "mode": "parallel"}, ["chunk_size", "parallel"]),
    "reset of blocks": ({"reset": torch.zeros(2, 3, dtype=torch.bool)}, ["reset", "(2, 3)", "(2, 12)"]),
    "reset dtype": ({"reset": torch.zeros(2, 12)}, ["reset", "float32", "bool"]),
    "cu_seqlens with rows": ({"cu_seqlens": torch.tensor([0, 12])}, ["cu_seqlens", "2"]),
    "cu_seqlens end": (
        {"x": tokens(1, 12, 12), "cu_seqlens": torch.tensor([0, 11])},
        ["cu_seqlens", "11", "12"],
    ),
    "state rows of packed": (
        {"x": tokens(1, 12, 12), "cu_seqlens": torch.tensor([0, 4, 12]), "state": state_of(rows=1)},
        ["state", "(2, 1, 2, 4, 10)", "(2, 2, 2, 4, 10)"],
    ),
}

BAD_POPS = {
    "x_pred rank": ({"x_pred": tokens(2, 3, 12)}, ["x_pred", "(2, 3, 12)"]),
    "x_pred width": ({"x_pred": tokens(2, 2, 3, 11)}, ["x_pred", "(2, 2, 3, 11)", "12"]),
    "x_pred batch": ({"x_pred": tokens(1, 2, 3, 12)}, ["x_pred", "1", "2"]),
    "x_pred dtype": ({"x_pred": tokens(2, 2, 3, 12, dtype=torch.float32)}, ["x_pred", "float32", "float64"]),
    "x_pred not a tensor": ({"x_pred": None}, ["x_pred", "None"]),
    "block_size": ({"block_size": 5}, ["block_size", "5", "12"]),
    "block_size zero": ({"block_size": 0}, ["block_size", "0"]),
    "offset": ({"offset": 4}, ["offset", "4", "3"]),
    "too many predictions": ({"offset": 3}, ["P", "2", "1"]),
    "reset shape": ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, ["reset", "(2, 4)", "(2, 3)"]),
    "main_out": ({"main_out": "first"}, ["main_out", "first", "all", "last"]),
    "reset dtype": ({"reset": torch.zeros(2, 3)}, ["reset", "float32", "bool"]),
}


def assert_refused(call: object, arguments: dict[str, object], name: str, words: list[str]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    for word in words:
        assert word in message, (word, message)


@pytest.mark.parametrize("name", [*BAD_INPUTS, *BAD_SEQUENCES])
def test_forward_refuses(name: str) -> None:
    changes, words = {**BAD_INPUTS, **BAD_SEQUENCES}[name]
    assert_refused(DECODER, {**GOOD, **changes}, "RetNetDecoder()", words)


@pytest.mark.parametrize("name", [*BAD_INPUTS, *BAD_POPS])
def test_pop_refuses(name: str) -> None:
    changes, words = {**BAD_INPUTS, **BAD_POPS}[name]
    assert_refused(DECODER.pop, {**GOOD_POP, **changes}, "RetNetDecoder.pop()", words)


def test_a_layer_refuses_a_decoder_s_state() -> None:
    layer = DECODER.layers[0].retention
    words = ["state", "(2, 2, 2, 4, 10)", "(1, 2, 2, 4, 10)"]
    assert_refused(layer, {**GOOD, "state": state_of()}, "MultiScaleRetention()", words)
    assert_refused(layer.pop, {**GOOD_POP, "state": state_of()}, "MultiScaleRetention.pop()", words)


@pytest.mark.parametrize(("batch_size", "word"), [(-1, "-1"), (2.0, "float"), (True, "bool"), (None, "None")])
def test_init_state_refuses(batch_size: object, word: str) -> None:
    assert_refused(
        DECODER.init_state, {"batch_size": batch_size}, "RetNetDecoder.init_state()", ["batch_size", word]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_init_state_refuses_dtypes_that_no_state_has(dtype: torch.dtype) -> None:
    words = ["dtype", str(dtype), "float32"]
    assert_refused(DECODER.init_state, {"batch_size": 1, "dtype": dtype}, "RetNetDecoder.init_state()", words)


def test_unknown_keyword_arguments_raise() -> None:
    with pytest.raises(TypeError, match="chunk"):
        DECODER(tokens(1, 2, 12), chunk=16)
    with pytest.raises(TypeError, match="blocks"):
        DECODER.pop(tokens(1, 2, 12), tokens(1, 1, 1, 12), blocks=2)


def test_a_triton_backend_that_cannot_run_says_why() -> None:
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=r"RetNetDecoder\(\).*triton"):
        DECODER(tokens(1, 2, 12), backend="triton")


@pytest.mark.parametrize("module", [retpop.RetNetDecoder, retpop.MultiScaleRetention])
def test_what_a_module_is_made_from(module: type[torch.nn.Module]) -> None:
    cfg = retpop.RetNetConfig(embed_dim=16, num_heads=2, num_layers=1, ffn_dim=16)
    with pytest.raises(TypeError, match=f"{module.__name__}: cfg is dict; it must be a retpop.RetNetConfig"):
        module({"embed_dim": 8})
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(TypeError, match=f"dtype is {dtype}"):
            module(cfg, dtype=dtype)


@pytest.mark.parametrize(
    ("x_dtype", "weights"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
    ],
)
def test_autocast_lets_no_mix_through_that_torch_refuses(x_dtype: torch.dtype, weights: torch.dtype) -> None:
    cfg = retpop.RetNetConfig(embed_dim=16, num_heads=2, num_layers=1, ffn_dim=16)
    decoder = retpop.RetNetDecoder(cfg, dtype=weights)
    x = torch.zeros(1, 3, 16, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"x is {x_dtype} but"):
        decoder(x)


def test_a_state_of_other_things_than_tensors() -> None:
    with pytest.raises(TypeError, match="RetNetState: kv is NoneType"):
        RetNetState(None, None)
    with pytest.raises(TypeError, match="RetNetState: position is int"):
        RetNetState(torch.zeros(1), 2)

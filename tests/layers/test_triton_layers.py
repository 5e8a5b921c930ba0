"""Layers with the Triton backend, in its interpreter, against the same layers with plain PyTorch."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
from module_cases import assert_same_state, make_decoder, make_module, random_state, small_config
from retention_cases import assert_same_gradients, gradients, normal
from torch import Tensor, nn

from retpop import MultiScaleRetention, RetNetState

float32 = partial(make_decoder, torch.float32, num_layers=1)

CONFIGS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "rmsnorm": {"head_norm": "rmsnorm", "position": "rope"},
    "learned norms": {"head_norm_affine": True},
    "learned rmsnorm": {"head_norm": "rmsnorm", "head_norm_affine": True, "position": None},
    "another gate": {"gate_activation": "gelu", "head_norm_affine": True},
    "norm last": {"norm_first": False, "scale": 0.3, "decay": "log_spaced"},
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, 12, seed=seed, dtype=torch.float32)


def leaves_of(module: nn.Module, state: RetNetState | None, *inputs: Tensor) -> list[Tensor]:
    return [*module.parameters(), *inputs, *([] if state is None else [state.kv])]


def assert_same(
    actual: tuple[Tensor | RetNetState, ...], expected: tuple[Tensor | RetNetState, ...], leaves: list[Tensor]
) -> None:
    """Outputs, the state, and the gradients of all of them."""
    for a, e in zip(actual[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert_same_state(actual[-1], expected[-1], 1e-5)
    found, wanted = (
        gradients(tuple(x.kv if isinstance(x, RetNetState) else x for x in results), leaves)
        for results in (actual, expected)
    )
    assert_same_gradients(found, wanted, 5e-5)


def with_gradients(state: RetNetState) -> RetNetState:
    return RetNetState(state.kv.requires_grad_(), state.position)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence(name: str) -> None:
    decoder = float32(**CONFIGS[name])
    x, state = tokens(2, 19).requires_grad_(), with_gradients(random_state(decoder, 2))
    actual, expected = (decoder(x, state, backend=backend) for backend in ("triton", "torch"))
    assert_same(actual, expected, leaves_of(decoder, state, x))


@pytest.mark.parametrize("name", ["plain", "learned norms", "another gate"])
def test_pop(name: str) -> None:
    decoder = float32(**CONFIGS[name])
    x, x_pred = tokens(2, 6).requires_grad_(), tokens(2, 2, 4, seed=1).requires_grad_()
    state = with_gradients(random_state(decoder, 2))
    reset = torch.tensor([[False, True], [False, False]])
    actual, expected = (
        decoder.pop(x, x_pred, state, block_size=3, offset=1, reset=reset, backend=backend)
        for backend in ("triton", "torch")
    )
    assert_same(actual, expected, leaves_of(decoder, state, x, x_pred))


@pytest.mark.parametrize("name", ["plain", "norm last", "two layers"])
@pytest.mark.parametrize("offset", [0, 1])
def test_pop_of_which_the_last_tokens_come_out(name: str, offset: int) -> None:
    decoder = float32(**CONFIGS[name])
    x, x_pred = tokens(2, 6).requires_grad_(), tokens(2, 2, 4, seed=1).requires_grad_()
    state = with_gradients(random_state(decoder, 2))
    reset = torch.tensor([[False, True], [False, False]])
    actual, expected = (
        decoder.pop(
            x, x_pred, state, block_size=3, offset=offset, reset=reset, main_out="last", backend=backend
        )
        for backend in ("triton", "torch")
    )
    assert actual[0].shape == (2, 2, 12)
    assert_same(actual, expected, leaves_of(decoder, state, x, x_pred))


@pytest.mark.parametrize(("N", "P", "offset"), [(0, 1, 0), (1, 1, 1), (2, 0, 0), (1, 2, 0)])
def test_other_shapes_of_pop(N: int, P: int, offset: int) -> None:
    """Imagination's step, predictions alone, and none."""
    decoder = float32()
    x, x_pred, state = tokens(2, 3 * N), tokens(2, P, 2, seed=1), random_state(decoder, 2)
    actual, expected = (
        decoder.pop(x, x_pred, state, block_size=3, offset=offset, backend=backend)
        for backend in ("triton", "torch")
    )
    assert_same(actual, expected, leaves_of(decoder, None))


@pytest.mark.parametrize("mode", ["parallel", "recurrent"])
def test_other_modes_and_single_tokens(mode: str) -> None:
    decoder = float32()
    whole, last = decoder(tokens(2, 5), mode=mode, backend="triton")
    outs, state = [], None
    for t in range(5):
        out, state = decoder(tokens(2, 5)[:, t : t + 1], state, mode=mode, backend="triton")
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert_same_state(state, last, 1e-5)
    assert_same((whole, last), decoder(tokens(2, 5), backend="torch"), leaves_of(decoder, None))


def test_packed_sequences() -> None:
    decoder = float32()
    x, state = tokens(1, 20).requires_grad_(), with_gradients(random_state(decoder, 3))
    cu_seqlens = torch.tensor([0, 4, 4, 20])
    actual, expected = (
        decoder(x, state, cu_seqlens=cu_seqlens, backend=backend) for backend in ("triton", "torch")
    )
    assert_same(actual, expected, leaves_of(decoder, state, x))


def test_nothing_to_do() -> None:
    decoder = float32()
    state = random_state(decoder, 2)
    out, after = decoder(tokens(2, 0), state, backend="triton")
    assert out.shape == (2, 0, 12)
    assert_same_state(after, state, 0.0)
    out, pred, after = decoder.pop(tokens(0, 6), tokens(0, 2, 1), block_size=3, backend="triton")
    assert (out.shape, pred.shape, after.kv.shape[1]) == ((0, 6, 12), (0, 2, 1, 12), 0)


def test_dropout_in_training_draws_the_same() -> None:
    """It sits between retention and the head's norm with either backend."""
    decoder = float32(dropout=0.3).train()
    x, x_pred = tokens(2, 6), tokens(2, 2, 4, seed=1)
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        results.append(decoder.pop(x, x_pred, block_size=3, backend=backend))
    assert_same(*results, leaves_of(decoder, None))


def test_a_layer_alone() -> None:
    layer = make_module(MultiScaleRetention, small_config(), dtype=torch.float32)
    actual, expected = (layer(tokens(2, 9), backend=backend) for backend in ("triton", "torch"))
    assert_same(actual, expected, leaves_of(layer, None))


class Recorder:
    """Stands in for an op and counts its calls."""

    def __init__(self, op: object) -> None:
        self.op, self.calls = op, 0

    def __call__(self, *arguments: object) -> object:
        self.calls += 1
        return self.op(*arguments)


OPS = {
    name: import_module(f"retpop.ops.triton_backend.{module}")
    for name, module in {
        "retention_fwd": "retention",
        "pop_fwd": "pop",
        "norm_gate_fwd": "layer",
        "rotary_fwd": "layer",
    }.items()
}
"""Where each op is called from."""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"rotary_fwd": 1, "norm_gate_fwd": 1}),
        ({"position": None}, {"norm_gate_fwd": 1}),
        ({"gate_activation": "relu"}, {"rotary_fwd": 1}),
        ({"num_layers": 2}, {"rotary_fwd": 2, "norm_gate_fwd": 2}),
    ],
    ids=str,
)
def test_the_ops_that_run(
    changes: dict[str, object], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One each for retention, rotary positions, and norm with gate, in every layer; with "torch" none."""
    recorders = {name: Recorder(getattr(module, name)) for name, module in OPS.items()}
    for name, recorder in recorders.items():
        monkeypatch.setattr(OPS[name], name, recorder)
    decoder = float32(**changes)
    layers = len(decoder.layers)
    calls = {
        "retention_fwd": lambda backend: decoder(tokens(2, 4), backend=backend),
        "pop_fwd": lambda backend: decoder.pop(tokens(2, 2), tokens(2, 1, 2), block_size=2, backend=backend),
    }
    for name, call in calls.items():
        call("torch")
        assert not any(recorder.calls for recorder in recorders.values())
        call("triton")
        counted = {name: recorder.calls for name, recorder in recorders.items() if recorder.calls}
        assert counted == {**expected, name: layers}
        for recorder in recorders.values():
            recorder.calls = 0


def test_float64_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"^RetNetDecoder\.pop\(\): .*float64"):
        make_decoder().pop(tokens(1, 2).double(), tokens(1, 1, 2).double(), block_size=2, backend="triton")


def test_autocast() -> None:
    """In float16: the interpreter's bfloat16 is not the real one."""
    decoder = float32(head_norm_affine=True)
    x, x_pred, state = tokens(2, 6), tokens(2, 2, 4, seed=1), random_state(decoder, 2)
    with torch.autocast("cpu", dtype=torch.float16):
        out, pred, after = decoder.pop(x, x_pred, state, block_size=3, backend="triton")
        expected = decoder.pop(x, x_pred, state, block_size=3, backend="torch")
        (out.float().sum() + pred.float().sum()).backward()
    assert after.kv.dtype is torch.float32
    assert {parameter.grad.dtype for parameter in decoder.parameters()} == {torch.float32}
    for a, e in zip((out, pred, after.kv), (*expected[:2], expected[2].kv), strict=True):
        assert a.dtype == e.dtype
        assert ((a - e).float().square().mean() / e.float().square().mean()).sqrt() < 3e-3

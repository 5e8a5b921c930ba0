"""Graphs of decoders with the Triton backend: compiled, exported, and safe to capture on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from module_cases import assert_same_state, make_decoder, random_state, small_config
from retention_cases import assert_same_gradients, assert_same_results, gradients, normal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from retpop import RetNetDecoder, RetNetState, retention, retnet_decay
from retpop.ops.triton_backend import custom

float32 = partial(make_decoder, torch.float32, num_layers=1)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, 12, seed=seed, dtype=torch.float32)


class Compiled:
    """A function compiled without graph breaks, and the number of its graphs."""

    def __init__(self, function: Callable[..., object], backend: str = "eager") -> None:
        self._counter = CompileCounterWithBackend(backend)
        self._compiled = torch.compile(function, backend=self._counter, fullgraph=True)

    def __call__(self, *arguments: object) -> tuple[object, ...]:
        return self._compiled(*arguments)

    @property
    def graphs(self) -> int:
        return self._counter.frame_count


def assert_same(actual: tuple[object, ...], expected: tuple[object, ...]) -> None:
    for a, e in zip(actual[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert_same_state(actual[-1], expected[-1], 1e-5)


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is the same, its operations compute in plain PyTorch: what counts here are graphs."""
    monkeypatch.setattr(custom, "interpreting", lambda: False)


@pytest.mark.usefixtures("fresh_compiler", "by_pytorch")
@torch.no_grad()
def test_one_graph_for_one_length_and_one_for_all_others() -> None:
    """With the state going in and out."""
    decoder = float32()
    state = random_state(decoder, 2)
    run = Compiled(lambda x, state: decoder(x, state, backend="triton"), "aot_eager")
    for length in (20, 7, 33):
        x = tokens(2, length)
        assert_same(run(x, state), decoder(x, state, backend="torch"))
    assert run.graphs == 2


@pytest.mark.usefixtures("fresh_compiler", "by_pytorch")
@torch.no_grad()
def test_one_graph_for_one_number_of_blocks_and_one_for_all_others() -> None:
    decoder = float32()
    state = random_state(decoder, 2)

    def pop(x: Tensor, x_pred: Tensor, state: RetNetState, reset: Tensor) -> object:
        return decoder.pop(x, x_pred, state, block_size=3, reset=reset, backend="triton")

    run = Compiled(pop)
    for blocks in (4, 2, 5):
        x, x_pred = tokens(2, 3 * blocks), tokens(2, blocks, 2, seed=1)
        reset = torch.arange(2 * blocks).view(2, blocks) % 3 == 1
        expected = decoder.pop(x, x_pred, state, block_size=3, reset=reset, backend="torch")
        assert_same(run(x, x_pred, state, reset), expected)
    assert run.graphs == 2


@pytest.mark.usefixtures("fresh_compiler", "by_pytorch")
@torch.no_grad()
def test_packed_sequences_compile_too() -> None:
    """The torch backend reads the boundaries, which no graph can; the kernels need not."""
    decoder = float32()
    state = random_state(decoder, 3)
    run = Compiled(lambda x, bounds: decoder(x, state, cu_seqlens=bounds, backend="triton"))
    for bounds in ([0, 4, 4, 20], [0, 7, 9, 11], [0, 0, 30, 31]):
        x, cu_seqlens = tokens(1, bounds[-1]), torch.tensor(bounds)
        assert_same(run(x, cu_seqlens), decoder(x, state, cu_seqlens=cu_seqlens, backend="torch"))
    assert run.graphs == 2


@pytest.mark.usefixtures("fresh_compiler", "by_pytorch")
def test_all_sizes_may_be_symbols() -> None:
    """Those of a head become numbers."""

    @partial(torch.compile, backend="eager", fullgraph=True, dynamic=True)
    def run(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return retention(q, q, v, retnet_decay(2), backend="triton")

    for T, Dk in ((5, 4), (3, 6)):
        q, v = (normal(2, T, 2, D, seed=D, dtype=torch.float32) for D in (Dk, 3))
        expected = retention(q, q, v, retnet_decay(2), backend="torch")
        assert_same_results(run(q, v), expected, 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_decoding_is_one_graph() -> None:
    decoder = float32()
    run = Compiled(lambda x, state: decoder(x, state, backend="triton"))
    state, expected = decoder.init_state(2), decoder.init_state(2)
    for t in range(3):
        out, state = run(tokens(2, 1, seed=t), state)
        wanted, expected = decoder(tokens(2, 1, seed=t), expected, backend="torch")
        assert_same((out, state), (wanted, expected))
    assert run.graphs == 1


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("fresh_compiler")
def test_training_compiles(checkpointed: bool) -> None:
    """Forward and backward, a graph each; with activations that are checkpointed too."""
    decoder = float32(dropout=0.0).train()
    x, x_pred = tokens(2, 6), tokens(2, 2, 4, seed=1)
    pop = partial(decoder.pop, block_size=3, backend="triton")
    run = partial(checkpoint, pop, use_reentrant=False) if checkpointed else pop
    out, pred, state = Compiled(run, "aot_eager")(x, x_pred)
    leaves = list(decoder.parameters())
    found = gradients((out, pred, state.kv), leaves)
    out, pred, state = pop(x, x_pred)
    assert_same_gradients(found, gradients((out, pred, state.kv), leaves), 1e-5)


class Step(nn.Module):
    """A step of imagination: a block taken in, the next one predicted; the state goes in and out."""

    def __init__(self, decoder: RetNetDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, x_pred: Tensor, state: RetNetState) -> tuple[Tensor, Tensor, RetNetState]:
        return self.decoder.pop(x, x_pred, state, block_size=3, offset=1, backend="triton")


@pytest.mark.parametrize("interpreter", [True, False])
@torch.no_grad()
def test_an_exported_step(interpreter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program runs where the interpreter is off, too: its ops then compute in plain PyTorch."""
    decoder = float32()
    x, x_pred, state = tokens(2, 3), tokens(2, 1, 2, seed=1), random_state(decoder, 2)
    program = torch.export.export(Step(decoder), (x, x_pred, state))
    ops = {str(node.target) for node in program.graph.nodes if "retpop" in str(node.target)}
    assert ops == {f"retpop.{name}.default" for name in ("pop_fwd", "rotary_fwd", "norm_gate_fwd")}
    if not interpreter:
        monkeypatch.setattr(custom, "interpreting", lambda: False)
    other = random_state(decoder, 2, seed=5)
    expected = decoder.pop(x, x_pred, other, block_size=3, offset=1, backend="torch")
    assert_same(program.module()(x, x_pred, other), expected)


@torch.no_grad()
def test_an_exported_token_of_any_batch() -> None:
    decoder = float32()
    batch = torch.export.Dim("batch", min=2)
    dims = {"x": {0: batch}, "state": [{1: batch}, {0: batch}]}

    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, x: Tensor, state: RetNetState) -> tuple[Tensor, RetNetState]:
            return self.decoder(x, state, backend="triton")

    program = torch.export.export(
        Token(), (tokens(3, 1), random_state(decoder, 3)), dynamic_shapes=dims
    ).module()
    for rows in (2, 5):
        state = random_state(decoder, rows)
        assert_same(program(tokens(rows, 1), state), decoder(tokens(rows, 1), state, backend="torch"))


@torch.no_grad()
def test_nothing_is_read_on_the_host() -> None:
    """Meta tensors have shapes and no values: no value decides anything, and none is waited for.

    So on a GPU a call can be captured in a CUDA graph; the launchers see shapes and pointers alone.
    """
    decoder = RetNetDecoder(small_config(), device="meta")
    x = torch.zeros(2, 12, 12, device="meta")
    _, state = decoder(x, backend="triton")
    assert state.kv.is_meta
    reset = torch.zeros(2, 4, dtype=torch.bool, device="meta")
    x_pred = x.unflatten(1, (2, 6))
    out, pred, _ = decoder.pop(x, x_pred, state, block_size=3, reset=reset, backend="triton")
    assert (out.shape, pred.shape) == ((2, 12, 12), (2, 2, 6, 12))
    bounds = torch.zeros(4, dtype=torch.int32, device="meta")
    out, state = decoder(x[:1], cu_seqlens=bounds, backend="triton")
    assert (out.shape, state.kv.shape) == ((1, 12, 12), (2, 3, 2, 4, 10))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bounds.tolist()  # so that reading one would have been seen

"""A large pass without gradient goes part by part, and nobody can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from module_cases import assert_same_state, make_decoder, random_state
from retention_cases import normal
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from retpop import RetNetDecoder, RetNetState
from retpop.layers import call
from retpop.layers.call import even_slices

WIDEST = 56
"""Features of queries, keys, values and gate of the small decoder: its widest tensor's."""


RESET = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1], [1, 0]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Parts are of 40 tokens; the (B, T) of each that went through all layers."""
    seen: list[tuple[int, int]] = []
    whole = RetNetDecoder._run_layers

    def note(self: RetNetDecoder, x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        seen.append((x.shape[0], x.shape[1]))
        return whole(self, x, *arguments)

    monkeypatch.setattr(call, "ELEMENTS_AT_ONCE", 40 * WIDEST)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(RetNetDecoder, "_run_layers", note)
    return seen


def assert_same(run: Callable[[], tuple[Tensor | RetNetState, ...]]) -> None:
    """What comes out without gradient is what comes out with one, where no pass goes in parts."""
    expected = run()
    with torch.no_grad():
        actual = run()
    for a, e in zip(actual, expected, strict=True):
        if isinstance(a, RetNetState):
            assert_same_state(a, e, 1e-12)
        else:
            torch.testing.assert_close(a, e.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("mode", "batch", "length", "cut"),
    [
        ("chunkwise", 5, 15, [(2, 15), (2, 15), (1, 15)]),
        ("parallel", 5, 15, [(2, 15), (2, 15), (1, 15)]),
        ("chunkwise", 1, 90, [(1, 32), (1, 32), (1, 26)]),
        ("recurrent", 1, 90, [(1, 30), (1, 30), (1, 30)]),
        ("parallel", 1, 90, [(1, 90)]),
        ("chunkwise", 2, 45, [(1, 32), (1, 13)] * 2),
        ("chunkwise", 90, 1, [(30, 1)] * 3),
        ("chunkwise", 4, 10, [(4, 10)]),
    ],
)
def test_a_sequence(
    mode: str, batch: int, length: int, cut: list[tuple[int, int]], with_state: bool, passes: list
) -> None:
    decoder = make_decoder(final_norm=True)
    x, state = normal(batch, length, 12, seed=0), random_state(decoder, batch) if with_state else None
    assert_same(lambda: decoder(x, state, mode=mode))
    assert passes == [(batch, length), *cut]


@pytest.mark.parametrize("position", ["retnet", "rope", None])
@pytest.mark.parametrize("main_out", ["all", "last"])
@pytest.mark.parametrize(
    ("offset", "with_state", "with_reset"), [(0, True, True), (1, True, False), (0, False, False)]
)
def test_pop(
    position: str | None, main_out: str, offset: int, with_state: bool, with_reset: bool, passes: list
) -> None:
    decoder = make_decoder(position=position)
    x, x_pred = normal(5, 8, 12, seed=0), normal(5, 2, 3, 12, seed=1)
    state = random_state(decoder, 5) if with_state else None
    reset = RESET if with_reset else None
    options = {"block_size": 4, "offset": offset, "reset": reset, "main_out": main_out}
    assert_same(lambda: decoder.pop(x, x_pred, state, **options))
    assert passes == [(5, 14), (2, 14), (2, 14), (1, 14)]


def test_rows_of_pop_stay_whole(passes: list) -> None:
    decoder = make_decoder()
    x, x_pred = normal(2, 80, 12, seed=0), normal(2, 20, 3, 12, seed=1)
    assert_same(lambda: decoder.pop(x, x_pred, block_size=4))
    assert passes == [(2, 140), (1, 140), (1, 140)]


def test_packed_sequences_stay_whole(passes: list) -> None:
    decoder = make_decoder()
    bounds = torch.tensor([0, 50, 50, 90])
    x, state = normal(1, 90, 12, seed=0), random_state(decoder, 3)
    assert_same(lambda: decoder(x, state, cu_seqlens=bounds))
    assert passes == [(1, 90)] * 2


def test_what_was_given_is_left_alone() -> None:
    decoder = make_decoder()
    x, state = normal(6, 100, 12, seed=0), random_state(decoder, 6)
    given = [x.clone(), state.kv.clone(), state.position.clone()]
    with torch.no_grad():
        decoder(x, state)
    assert all(torch.equal(a, b) for a, b in zip([x, state.kv, state.position], given, strict=True))


@contextmanager
def watched(decoder: RetNetDecoder, seen: list[int], where: str) -> Iterator[None]:
    """A hook on some module of the decoder that notes the rows of what it sees."""

    def note(*arguments: object) -> None:
        if arguments[0] is watched_module:
            seen.append(arguments[-1][0].shape[0] if where == "before" else arguments[-1].shape[0])

    watched_module = decoder.layers[1].feed_forward
    if where == "everywhere":
        handle = register_module_forward_hook(note)
    elif where == "before":
        handle = watched_module.register_forward_pre_hook(note)
    else:
        handle = watched_module.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("where", ["before", "after", "everywhere"])
def test_a_hook_sees_the_whole_batch(where: str) -> None:
    decoder, seen = make_decoder(), []
    with watched(decoder, seen, where), torch.no_grad():
        decoder(normal(5, 15, 12, seed=0))
    assert seen == [5]


def test_a_hook_on_the_decoder_itself_costs_nothing(passes: list) -> None:
    decoder, seen = make_decoder(), []
    decoder.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape[0]))
    with torch.no_grad():
        decoder(normal(5, 15, 12, seed=0))
    assert seen == [5]
    assert len(passes) == 3


def test_a_checkpoint_that_computes_twice_draws_the_same() -> None:
    """The first time is without gradient, the second with one."""
    decoder = make_decoder(dropout=0.3).train()

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        x = normal(5, 15, 12, seed=0).requires_grad_()
        run(x).square().sum().backward()
        return x.grad

    expected = gradient(lambda x: decoder(x)[0])
    actual = gradient(lambda x: checkpoint(lambda x: decoder(x)[0], x, use_reentrant=True))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_transforms_and_the_compiler_see_one_pass(passes: list) -> None:
    decoder, x = make_decoder(), normal(3, 5, 15, 12, seed=0)
    with torch.no_grad():
        torch.func.vmap(lambda x: decoder(x)[0])(x)
        assert passes == [(5, 15)]
        graphs = []
        torch.compile(decoder, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(x[0])
    assert len(graphs) == 1
    products = [node for node in graphs[0].graph.nodes if node.target is torch._C._nn.linear]
    assert len(products) == 4 * decoder.cfg.num_layers


def test_more_threads_take_more_at_once(passes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, x = make_decoder(), normal(16, 15, 12, seed=0)
    with torch.no_grad():
        for threads in (2, 3, 64):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            decoder(x)
    assert passes == [*[(4, 15)] * 4, *[(8, 15)] * 4]


@given(total=st.integers(1, 200), most=st.integers(1, 200), unit=st.integers(1, 40))
def test_even_slices(total: int, most: int, unit: int) -> None:
    slices = even_slices(total, most, unit)
    sizes = [part.stop - part.start for part in slices]
    assert [part.start for part in slices] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == total
    assert all(size == sizes[0] and size % unit == 0 for size in sizes[:-1])
    assert 0 < sizes[-1] <= sizes[0] <= max(most, unit)

"""`retpop.capture`: a captured step is the step, on a CPU and with CUDA graphs that are pretended there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended_graph import PretendedGraph, pretend_graphs
from torch import Tensor, nn

import retpop

CONFIG = retpop.RetNetConfig(embed_dim=12, num_heads=2, num_layers=2, ffn_dim=16, final_norm=True)
STEPS = 6
WARM_UP = 2


@pytest.fixture(params=["cpu", "graph"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[PretendedGraph] | None:
    """The graphs that a test makes; None where the function runs in every call."""
    return pretend_graphs(monkeypatch) if request.param == "graph" else None


class Counted:
    """A function, and how often it has run."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **named)


def expect_calls(counted: Counted, graphs: list[PretendedGraph] | None) -> None:
    """A graph's capture is the last run; nothing is captured on a CPU."""
    assert counted.calls == (STEPS if graphs is None else WARM_UP + 1)
    assert graphs is None or len(graphs) == 1


def make_decoder() -> retpop.RetNetDecoder:
    torch.manual_seed(0)
    return retpop.RetNetDecoder(CONFIG)


def test_decoding_carries_its_state(graphs: list[PretendedGraph] | None) -> None:
    decoder = make_decoder().eval()
    counted = Counted(torch.no_grad()(decoder))
    decode = retpop.capture(counted, warm_up=WARM_UP)
    x = torch.randn(3, STEPS, 12)
    with torch.no_grad():
        wanted, last = decoder(x)
    state = decoder.init_state(3)
    for t in range(STEPS):
        out, state = decode(x[:, t : t + 1], state=state)
        torch.testing.assert_close(out, wanted[:, t : t + 1])
    torch.testing.assert_close(state.kv, last.kv)
    assert state.position.tolist() == [STEPS] * 3
    expect_calls(counted, graphs)


def train_step(decoder: nn.Module) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, fused=True, capturable=True)

    def step(x: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        out, _ = decoder(x)
        loss = (out - wanted).square().mean()
        loss.backward()
        optimizer.step()
        rate.mul_(0.9)
        return {"loss": loss}

    return step


def test_training_takes_one_step_a_call(graphs: list[PretendedGraph] | None) -> None:
    """The optimiser's schedule is part of the graph, and the loss has no gradient."""
    decoders = make_decoder(), make_decoder()
    eager, counted = train_step(decoders[0]), Counted(train_step(decoders[1]))
    captured = retpop.capture(counted, warm_up=WARM_UP)
    for seed in range(STEPS):
        generator = torch.Generator().manual_seed(seed)
        x, wanted = (torch.randn(2, 5, 12, generator=generator) for _ in range(2))
        loss = captured(x, wanted)["loss"]
        assert torch.equal(loss, eager(x, wanted)["loss"])
        assert not loss.requires_grad
        for a, b in zip(*(decoder.parameters() for decoder in decoders), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.grad, b.grad)
    expect_calls(counted, graphs)


def test_results_that_are_arguments_may_come_back_in_other_places(
    graphs: list[PretendedGraph] | None,
) -> None:
    """A stack of the last frames, and a swap: no result lies where the next call's arguments are put."""

    def step(frame: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return frame + two, frame, one

    captured, swapped = retpop.capture(step, warm_up=WARM_UP), retpop.capture(lambda a, b: (b, a), warm_up=1)
    one = two = torch.zeros(1)
    mine = torch.zeros(1), torch.zeros(1)
    pair, wanted = (torch.tensor([1.0]), torch.tensor([2.0])), (1.0, 2.0)
    for i in range(STEPS):
        frame = torch.full((1,), float(i + 1))
        expected = step(frame, *mine)
        found, one, two = captured(frame, one, two)
        assert torch.equal(found, expected[0])
        mine = expected[1:]
        pair, wanted = swapped(*pair), wanted[::-1]
        assert (pair[0].item(), pair[1].item()) == wanted


def test_named_arguments_may_come_in_any_order() -> None:
    captured = retpop.capture(lambda x, y: x - y)
    for named in ({"x": torch.ones(1), "y": torch.zeros(1)}, {"y": torch.zeros(1), "x": torch.ones(1)}):
        assert captured(**named).item() == 1.0


def test_random_numbers_are_those_of_the_function(graphs: list[PretendedGraph] | None) -> None:
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]

    def draw(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        return lambda x: x + torch.rand(3, generator=generator) + torch.rand(3)

    captured = retpop.capture(draw(generators[1]), generators=generators[1:], warm_up=WARM_UP)
    found = []
    for function in (draw(generators[0]), captured):
        torch.manual_seed(1)
        found.append([function(torch.full((3,), float(i))).clone() for i in range(STEPS)])
    assert torch.equal(*map(torch.stack, found))
    assert torch.equal(*(generator.get_state() for generator in generators))
    assert graphs is None or graphs[0].registered == generators[1:]


def test_the_next_call_overwrites_the_result_and_no_argument(graphs: list[PretendedGraph] | None) -> None:
    captured = retpop.capture(lambda x: (x + 1, x.mean(0).expand(2, 3)), warm_up=1)
    x = torch.zeros(2, 3)
    captured(x)
    first, means = captured(x)
    x.fill_(5)
    assert first.unique().tolist() == [1]
    second, _ = captured(x)
    assert second is first or second.data_ptr() == first.data_ptr()
    assert first.unique().tolist() == [6]
    assert means.unique().tolist() == [5]
    assert x.unique().tolist() == [5]


def test_a_graph_casts_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast has cast them before the capture, in the same context."""
    pretend_graphs(monkeypatch)
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    captured = retpop.capture(layer, warm_up=1)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            wanted = layer(x)
            assert torch.equal(captured(x), wanted)
            assert torch.equal(layer(x), wanted)
        with torch.no_grad():
            layer.weight.mul_(1.5)


def test_inference_mode_may_end(graphs: list[PretendedGraph] | None) -> None:
    captured = retpop.capture(torch.no_grad()(lambda x: 2 * x), warm_up=1)
    with torch.inference_mode():
        captured(torch.ones(2))
    assert captured(torch.full((2,), 3.0)).tolist() == [6, 6]
    assert captured(torch.full((2,), 4.0)).tolist() == [8, 8]


def test_what_waits_for_the_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_graphs(monkeypatch)
    captured = retpop.capture(lambda x: x * x.sum().item(), warm_up=1)
    captured(torch.ones(2))
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        captured(torch.ones(2))
    assert "must not wait for the GPU" in caught.value.__notes__[0]


WRONG_CALLS = {
    "shape": ((torch.ones(3), 1), {}, r"argument 0 is \(\(3,\), .*as in the first call, \(\(2,\)"),
    "dtype": ((torch.ones(2, dtype=torch.float64), 1), {}, "argument 0 is .*float64"),
    "device": ((torch.ones(2, device="meta"), 1), {}, "argument 0 is .*meta"),
    "number": ((torch.ones(2), 2), {}, r"argument 1 is \('int', 2\)"),
    "a bool for a number": ((torch.ones(2), True), {}, r"argument 1 is \('bool', True\)"),
    "structure": ((torch.ones(2),), {"n": 1}, "the arguments are"),
    "gradient": ((torch.ones(2, requires_grad=True), 1), {}, "argument 0 requires a gradient"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_later_calls_differ_in_values_alone(name: str, graphs: list[PretendedGraph] | None) -> None:
    captured = retpop.capture(lambda x, n: x * n, warm_up=1)
    for _ in range(2):
        captured(torch.ones(2), 1)
    arguments, named, message = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=message):
        captured(*arguments, **named)
    assert captured(torch.full((2,), 7.0), 1).tolist() == [7, 7]


def test_a_wrong_state_is_named_by_its_part() -> None:
    decoder = make_decoder().eval()
    decode = retpop.capture(torch.no_grad()(decoder))
    x = torch.randn(2, 1, 12)
    _, state = decode(x, state=decoder.init_state(2))
    wrong = retpop.RetNetState(state.kv, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"state\.position is \(\(3,\)"):
        decode(x, state=wrong)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), ValueError, "has no tensor"),
        (
            (torch.ones(2), torch.ones(2, device="meta")),
            ValueError,
            "argument 1 is on meta but argument 0",
        ),
        ((torch.ones(2), object()), TypeError, "argument 1 is object"),
        ((torch.ones(2, requires_grad=True),), ValueError, "argument 0 requires a gradient"),
    ],
)
def test_a_wrong_first_call(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        retpop.capture(lambda *x: x)(*arguments)


def test_wrong_options() -> None:
    with pytest.raises(TypeError, match="function is int"):
        retpop.capture(3)
    with pytest.raises(TypeError, match="generators holds int"):
        retpop.capture(torch.neg, generators=[0])
    with pytest.raises(ValueError, match="warm_up is 0"):
        retpop.capture(torch.neg, warm_up=0)
    with pytest.raises(ValueError, match="generator 0 is on cpu but argument 0 is on meta"):
        retpop.capture(torch.neg, generators=[torch.Generator()])(torch.ones(2, device="meta"))

"""Every part of a decoder is called: what stands in its place or looks on acts as in any stack of modules."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from module_cases import make_decoder
from retention_cases import normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from retpop import RetNetDecoder

BLOCK = 3
X, X_PRED = normal(2, 9, 12, seed=0), normal(2, 3, 2, 12, seed=1)


class Wrapped(nn.Module):
    """A module inside another, as adapters and profilers put it there; it passes on whatever comes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: object) -> object:
        return self.inner(*arguments)


class Adapter(Wrapped):
    """A linear layer and a low-rank change of it, with the layer's own weight and bias to be read."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner)
        self.down = nn.Linear(inner.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, inner.out_features, bias=False, dtype=torch.float64)

    weight = property(lambda self: self.inner.weight)
    bias = property(lambda self: self.inner.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def old_weight_norm(linear: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings(action="ignore"):
        return nn.utils.weight_norm(linear)


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, inputs, out: out * 1.5)
    return linear


def pre_hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    return linear


def with_another_forward(linear: nn.Linear) -> nn.Linear:
    whole = linear.forward
    linear.forward = lambda x: 1.5 * whole(x)
    return linear


STAND_INS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "adapter": Adapter,
    "wrapper": Wrapped,
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    "parametrization": lambda linear: parametrize.register_parametrization(linear, "weight", Scaled()),
    "pruning": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.4),
    "forward hook": hooked,
    "forward pre-hook": pre_hooked,
    "its forward replaced": with_another_forward,
}


def with_stand_ins(replace: Callable[[nn.Linear], nn.Module]) -> RetNetDecoder:
    decoder = copy.deepcopy(make_decoder())
    for layer in decoder.layers:
        layer.retention.qkvg_proj = replace(layer.retention.qkvg_proj)
        layer.retention.out_proj = replace(layer.retention.out_proj)
    return decoder


@pytest.mark.parametrize("name", STAND_INS)
def test_last_is_all_whatever_stands_in_the_projections_places(name: str) -> None:
    torch.manual_seed(0)
    decoder = with_stand_ins(STAND_INS[name])
    parameters = list(decoder.parameters())

    def run(main_out: str) -> list[Tensor]:
        out, pred, _ = decoder.pop(X, X_PRED, block_size=BLOCK, main_out=main_out)
        out = out if main_out == "last" else out[:, BLOCK - 1 :: BLOCK]
        loss = out.square().sum() + pred.square().sum()
        return [out, pred, *torch.autograd.grad(loss, parameters)]

    for last, whole in zip(run("last"), run("all"), strict=True):
        torch.testing.assert_close(last, whole, rtol=1e-9, atol=1e-9)


def names_of_parts(decoder: RetNetDecoder) -> list[str]:
    return [name for name, part in decoder.named_modules() if not isinstance(part, nn.ModuleList)]


@pytest.mark.parametrize("main_out", [None, "all", "last"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_hooks_of_every_part_fire_once(main_out: str | None, backend: str) -> None:
    decoder, before, after, backward = make_decoder(final_norm=True), Counter(), Counter(), Counter()
    for name, part in decoder.named_modules():
        part.register_forward_pre_hook(lambda module, inputs, name=name: before.update([name]))
        part.register_forward_hook(lambda module, inputs, out, name=name: after.update([name]))
        if isinstance(part, nn.Linear):
            part.register_full_backward_hook(lambda module, into, out, name=name: backward.update([name]))
    x = X.clone().requires_grad_()
    if main_out is None:
        out, _ = decoder(x, backend=backend)
    else:
        out, _, _ = decoder.pop(x, X_PRED, block_size=BLOCK, main_out=main_out, backend=backend)
    out.sum().backward()
    once = Counter(names_of_parts(decoder))
    assert before == once
    assert after == once
    linear = [name for name, part in decoder.named_modules() if isinstance(part, nn.Linear)]
    assert backward == Counter(linear)


def test_a_layer_s_hooks_fire_for_pop() -> None:
    layer, seen = make_decoder().layers[0].retention, []
    layer.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    layer.pop(X, X_PRED, block_size=BLOCK)
    layer(X)
    assert seen == [3, 2]


def test_a_hook_s_output_is_what_goes_on() -> None:
    decoder = make_decoder()
    expected, _ = decoder(X)
    decoder.layers[1].retention.head_norm.register_forward_hook(lambda module, inputs, out: 2 * out)
    decoder.layers[1].retention.register_forward_hook(lambda module, inputs, out: (0 * out[0], out[1]))
    changed, _ = decoder(X)
    assert not torch.allclose(changed, expected)


@pytest.mark.parametrize(
    "path",
    [
        *("layers.0", "layers.1", "layers.0.retention", "layers.1.retention.head_norm"),
        *("layers.0.retention_norm", "layers.1.feed_forward", "layers.0.feed_forward.in_proj", "final_norm"),
    ],
)
def test_any_part_can_be_wrapped(path: str) -> None:
    decoder = make_decoder(final_norm=True)
    expected = [*decoder(X), *decoder.pop(X, X_PRED, block_size=BLOCK, main_out="last")]
    decoder.set_submodule(path, Wrapped(decoder.get_submodule(path)))
    actual = [*decoder(X), *decoder.pop(X, X_PRED, block_size=BLOCK, main_out="last")]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(getattr(a, "kv", a), getattr(e, "kv", e), rtol=1e-12, atol=1e-12)


def offloaded(decoder: RetNetDecoder) -> RetNetDecoder:
    """Weights on "meta" that come when their layer is called, as accelerate's offloading does it."""
    for part in decoder.modules():
        weights = dict(part.named_parameters(recurse=False))
        for name, weight in weights.items():
            setattr(part, name, nn.Parameter(weight.detach().to("meta")))

        def bring(module: nn.Module, inputs: object, weights: dict[str, nn.Parameter] = weights) -> None:
            for name, weight in weights.items():
                setattr(module, name, weight)

        part.register_forward_pre_hook(bring)
    return decoder


def test_weights_may_come_when_they_are_needed() -> None:
    decoder = make_decoder()
    expected, state = decoder(X)
    away = offloaded(make_decoder())
    out, after = away(X, away.init_state(2, device="cpu"))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.kv, state.kv, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_runs_with_an_error_of_a_few_per_cent() -> None:
    decoder = make_decoder(torch.float32)
    small = torch.ao.quantization.quantize_dynamic(decoder, {nn.Linear}, dtype=torch.qint8)
    x, x_pred = X.float(), X_PRED.float()
    out, pred, _ = small.pop(x, x_pred, small.init_state(2), block_size=BLOCK, main_out="last")
    expected, expected_pred, _ = decoder.pop(x, x_pred, block_size=BLOCK, main_out="last")
    for a, e in ((small(x)[0], decoder(x)[0]), (out, expected), (pred, expected_pred)):
        assert (a - e).norm() / e.norm() < 0.05


@pytest.mark.parametrize("stand_in", [prune.identity, lambda linear, name: old_weight_norm(linear)])
def test_a_cast_after_pruning_or_weight_norm(stand_in: Callable[[nn.Linear, str], nn.Module]) -> None:
    """The weight itself is computed at the next call, and has the old dtype until then."""
    decoder = make_decoder(torch.float32)
    for layer in decoder.layers:
        for linear in (layer.retention.qkvg_proj, layer.retention.out_proj):
            stand_in(linear, "weight")
    out, state = decoder.double()(X, decoder.init_state(2))
    assert (out.dtype, state.kv.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("kept", [slice(0, 1), slice(1, 2), slice(0, 3, 2)])
def test_a_decoder_runs_with_the_layers_that_it_has(kept: slice) -> None:
    decoder = make_decoder(num_layers=3)
    layers = list(decoder.layers)[kept]
    decoder.layers = decoder.layers[kept]
    state = decoder.init_state(2)
    assert state.kv.shape[0] == len(layers)
    out, after = decoder(X, state)
    single = X
    for layer, kv in zip(layers, after.kv, strict=True):
        decoder.layers = nn.ModuleList([layer])
        single, own = decoder(single)
        torch.testing.assert_close(own.kv[0], kv, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, single, rtol=1e-12, atol=1e-12)


def test_a_decoder_without_layers_says_so() -> None:
    decoder = make_decoder()
    decoder.layers = decoder.layers[:0]
    with pytest.raises(ValueError, match=r"RetNetDecoder\(\): layers is empty"):
        decoder(X)


def test_a_wrong_dtype_is_named_where_the_weights_are_plain() -> None:
    decoder = make_decoder()
    with pytest.raises(TypeError, match=r"x is torch\.float32 but the module's weights are torch\.float64"):
        decoder(X.float())
    decoder.layers[0] = Wrapped(decoder.layers[0])  # which may cast
    decoder.layers[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].double(), *inputs[1:]))
    assert decoder(X.float())[0].dtype is torch.float64


def test_what_pop_gives_out_can_be_changed_in_training() -> None:
    decoder = make_decoder()
    out, pred, _ = decoder.pop(X, X_PRED, block_size=BLOCK)
    expected = torch.autograd.grad(out.square().sum() + (2 * pred + 1).sum(), list(decoder.parameters()))
    out, pred, _ = decoder.pop(X, X_PRED, block_size=BLOCK)
    squares = out.square().sum()
    pred.mul_(2).add_(1)
    actual = torch.autograd.grad(squares + pred.sum(), list(decoder.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


class CastsItself(nn.Linear):
    """Weights that are stored in 16 bits and cast where they are used, as loaders of large models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class CastsTokens(Wrapped):
    """A layer in 16 bits that takes and gives tokens of any dtype."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner.to(torch.bfloat16))
        self.retention = inner.retention

    def forward(self, x: Tensor, carry: object) -> tuple[Tensor, object]:
        out, carry = self.inner(x.to(torch.bfloat16), carry)
        return out.to(x.dtype), carry


def test_a_part_may_cast_what_it_is_given() -> None:
    expected, _ = make_decoder(torch.float32)(X.float())
    decoder = make_decoder(torch.float32)
    for layer in decoder.layers:
        projection = layer.retention.qkvg_proj
        own = CastsItself(projection.in_features, projection.out_features)
        own.load_state_dict(projection.state_dict())
        layer.retention.qkvg_proj = own.to(torch.bfloat16)
    torch.testing.assert_close(decoder(X.float())[0], expected, rtol=0.1, atol=0.1)

    decoder = make_decoder(torch.float32)
    decoder.layers = nn.ModuleList(CastsTokens(layer) for layer in decoder.layers)
    torch.testing.assert_close(decoder(X.float())[0], expected, rtol=0.1, atol=0.1)


def test_a_parametrization_is_computed_once_a_call() -> None:
    """Some change at every reading, as a spectral norm's power iteration does in training."""
    calls = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return weight

    decoder = copy.deepcopy(make_decoder())
    for layer in decoder.layers:
        parametrize.register_parametrization(layer.retention.qkvg_proj, "weight", Counted())
    for main_out in ("all", "last"):
        calls.clear()
        decoder.pop(X, X_PRED, block_size=BLOCK, main_out=main_out)
        assert len(calls) == len(decoder.layers)

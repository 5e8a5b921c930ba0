"""The retention layer: its equation by hand, its options, its dtypes, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from module_cases import assert_same_state, make_module, pop_block_by_block, random_state, small_config
from retention_cases import MODES, normal
from torch.nn import functional as F

from retpop import MultiScaleRetention, RetNetConfig, RetNetState

H, DK, DV = 2, 4, 10


def make_layer(dtype: torch.dtype = torch.float64, **changes: object) -> MultiScaleRetention:
    return make_module(MultiScaleRetention, small_config(**changes), dtype=dtype)


def turned(x: torch.Tensor, kind: str | None, start: int) -> torch.Tensor:
    """Rotary positions as complex numbers: feature pairs times e^(i n θ)."""
    if kind is None:
        return x
    half = x.shape[-1] // 2
    exponents = torch.linspace(0, 1, half) if kind == "retnet" else torch.arange(half) / half
    angles = (start + torch.arange(x.shape[1]))[:, None].double() * 10000.0 ** -exponents.double()
    pairs = x.unflatten(-1, (half, 2)) if kind == "retnet" else x.unflatten(-1, (2, half)).transpose(-1, -2)
    spun = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.view_as_real(spun)
    return pairs.flatten(-2) if kind == "retnet" else pairs.transpose(-1, -2).flatten(-2)


def layer_by_hand(
    layer: MultiScaleRetention, x: torch.Tensor, kv: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(x W_g) ⊙ norm(retention(x W_q, x W_k, x W_v))) W_o, token by token."""
    cfg = layer.cfg
    q, k, v, gate = layer.qkvg_proj(x).split([H * DK, H * DK, H * DV, H * DV], dim=-1)
    q, k, v = (t.unflatten(-1, (H, -1)) for t in (q, k, v))
    q, k = turned(q, cfg.position, start), turned(k, cfg.position, start)
    gamma = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6]).double()
    if cfg.decay == "log_spaced":
        gamma = 1 - torch.tensor([1 / 32, 1 / 512]).double()
    elif isinstance(cfg.decay, tuple):
        gamma = torch.tensor(cfg.decay).double().exp()
    scale = cfg.scale if cfg.scale is not None else DK**-0.5
    outs = []
    for t in range(x.shape[1]):
        kv = gamma[:, None, None] * kv + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], kv))
    out = torch.stack(outs, dim=1)
    if cfg.head_norm == "groupnorm":
        out = out - out.mean(-1, keepdim=True)
    out = out / (out.square().mean(-1, keepdim=True) + cfg.head_norm_eps).sqrt()
    if cfg.head_norm_affine:
        weight, bias = layer.head_norm.weight, layer.head_norm.bias
        out = out * weight + (0 if bias is None else bias)
    activation = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[cfg.gate_activation]
    return layer.out_proj(activation(gate) * out.flatten(-2)), kv


OPTIONS = [
    {},
    {"position": "rope"},
    {"position": None},
    {"decay": "log_spaced"},
    {"decay": (-0.3, -2.0)},
    {"decay": (-math.inf, 0.0)},
    {"scale": 1.7},
    {"head_norm": "rmsnorm"},
    {"head_norm": "rmsnorm", "head_norm_affine": True},
    {"head_norm_affine": True},
    {"head_norm_eps": 0.5},
    {"gate_activation": "gelu"},
    {"gate_activation": "relu"},
    {"bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_equation(options: dict[str, object]) -> None:
    layer = make_layer(**options)
    x = normal(3, 21, 12, seed=0)
    state = RetNetState(random_state(layer, 3).kv, torch.full((3,), 5))
    expected, kv = layer_by_hand(layer, x, state.kv[0], start=5)
    out, after = layer(x, state)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert_same_state(after, RetNetState(kv[None], torch.full((3,), 26)), 1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [0, 1, 7, 33])
def test_modes_and_backends_agree(mode: str, backend: str, T: int) -> None:
    layer = make_layer()
    x, state = normal(3, T, 12, seed=0), random_state(layer, 3)
    expected, after = layer(x, state)
    out, same = layer(x, state, mode=mode, backend=backend)
    assert out.shape == (3, T, 12)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert_same_state(same, after, 1e-11)


@pytest.mark.parametrize(
    "options", [{}, {"position": "rope"}, {"position": None, "head_norm": "rmsnorm"}], ids=str
)
@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize(
    ("N", "P", "M", "offset"), [(3, 3, 4, 0), (3, 4, 2, 0), (1, 1, 4, 1), (0, 1, 3, 0), (3, 2, 6, 2)]
)
def test_pop_is_block_by_block_passes(
    options: dict[str, object], with_reset: bool, N: int, P: int, M: int, offset: int
) -> None:
    layer = make_layer(**options)
    x, x_pred, state = normal(4, N * 5, 12, seed=0), normal(4, P, M, 12, seed=1), random_state(layer, 4)
    reset = normal(4, N, seed=3) > 0.3 if with_reset else None
    arguments = {"block_size": 5, "offset": offset, "reset": reset}
    out, pred, after = layer.pop(x, x_pred, state, **arguments)
    expected = pop_block_by_block(layer, x, x_pred, state, **arguments)
    torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pred, expected[1], rtol=1e-10, atol=1e-10)
    assert_same_state(after, expected[2], 1e-10)


@pytest.mark.parametrize("position", ["retnet", "rope"])
@pytest.mark.parametrize("start", [2**20, 2**24 + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_are_as_good_as_near_ones(position: str, start: int, dtype: torch.dtype) -> None:
    """Only distances matter, so from an empty state the outputs at any start are those at 0."""
    layer = make_layer(dtype, position=position)
    x = normal(2, 40, 12, seed=0, dtype=dtype)
    near, _ = layer(x)
    empty = layer.init_state(2)
    far, state = layer(x, RetNetState(empty.kv, empty.position + start))
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(far, near, rtol=tolerance, atol=tolerance)
    assert state.position.tolist() == [start + 40] * 2


def test_the_given_position_is_the_first_token_s() -> None:
    """A kv taken over at position 3 is not the same as at position 4."""
    layer = make_layer()
    x = normal(1, 5, 12, seed=0)
    kv = random_state(layer, 1).kv
    outs = [layer(x, RetNetState(kv, torch.tensor([start])))[0] for start in (3, 4)]
    assert not torch.allclose(outs[0][:, 0], outs[1][:, 0], rtol=1e-3)


CASTS: list[tuple[Callable[[MultiScaleRetention], MultiScaleRetention], torch.dtype]] = [
    (lambda layer: layer.bfloat16(), torch.float32),
    (lambda layer: layer.half(), torch.float32),
    (lambda layer: layer.to(torch.bfloat16), torch.float32),
    (lambda layer: layer.bfloat16().float(), torch.float32),
    (lambda layer: layer.double(), torch.float64),
    (lambda layer: layer.bfloat16().double(), torch.float64),
    (lambda layer: layer.double().float(), torch.float32),
]


@pytest.mark.parametrize(("cast", "dtype"), CASTS)
def test_casting_a_module_keeps_its_decay(
    cast: Callable[[MultiScaleRetention], MultiScaleRetention], dtype: torch.dtype
) -> None:
    """In bfloat16 1 - 1/512 is 1: the decay is computed anew for the dtype, never cast down and back."""
    layer = cast(MultiScaleRetention(small_config(decay="log_spaced")))
    exact = torch.tensor([math.log1p(-1 / 32), math.log1p(-1 / 512)], dtype=torch.float64)
    assert layer.log_decay.dtype is dtype
    torch.testing.assert_close(layer.log_decay, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("decay", ["retnet", "log_spaced"])
def test_a_layer_in_bfloat16_remembers_as_long_as_in_float32(decay: str) -> None:
    layer = make_layer(decay=decay)
    x = normal(1, 1500, 12, seed=0, dtype=torch.bfloat16)
    expected, after = layer(x.double())
    out, state = copy.deepcopy(layer).bfloat16()(x)
    assert (out.dtype, state.kv.dtype) == (torch.bfloat16, torch.float32)
    error = (out.double() - expected)[:, -64:].square().mean().sqrt() / expected[
        :, -64:
    ].square().mean().sqrt()
    assert error < 0.03
    # Rotations and projections round their outputs to bfloat16; a wrong decay would be off by more than 1.
    state_error = (state.kv.double() - after.kv).square().mean().sqrt() / after.kv.square().mean().sqrt()
    assert state_error < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("head_norm", ["groupnorm", "rmsnorm"])
def test_a_row_of_zeros_stays_finite(dtype: torch.dtype, head_norm: str) -> None:
    """The head norm divides by the root of eps, not by 0; its gradient is finite too."""
    layer = make_layer(dtype, head_norm=head_norm, bias=False)
    x = torch.zeros(1, 20, 12, dtype=dtype, requires_grad=True)
    out, _ = layer(x)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("head_norm", ["groupnorm", "rmsnorm"])
def test_head_norm_statistics_are_wider_than_float16(head_norm: str) -> None:
    """The squares of head outputs beyond 255 overflow float16; the statistics are taken in float32."""
    layer = make_layer(torch.float16, head_norm=head_norm, position=None, decay=(0.0, 0.0), scale=1.0)
    x = 5 * normal(1, 40, 12, seed=0, dtype=torch.float16)
    out, _ = layer(x)
    expected, _ = copy.deepcopy(layer).double()(x.double())
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_initial_weights() -> None:
    """Glorot-uniform, query, key, value and gate each by its own width, gain 2^-2.5 and 2^-1 (torchscale)."""
    torch.manual_seed(0)
    cfg = RetNetConfig(embed_dim=64, num_heads=4, num_layers=1, ffn_dim=64, key_dim=32, value_dim=128)
    layer = MultiScaleRetention(cfg)
    q, k, v, gate = layer.qkvg_proj.weight.split([32, 32, 128, 128])
    for weight, gain in [
        (q, 2**-2.5),
        (k, 2**-2.5),
        (v, 2**-2.5),
        (gate, 2**-2.5),
        (layer.out_proj.weight, 0.5),
    ]:
        limit = gain * math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= limit
        assert weight.abs().max() > 0.98 * limit
        torch.testing.assert_close(weight.std().item(), limit / math.sqrt(3), rtol=0.05, atol=0)
    assert not layer.qkvg_proj.bias.any()
    assert not layer.out_proj.bias.any()
    assert not torch.equal(q, k)


def test_reset_parameters_draws_anew() -> None:
    layer = make_layer(head_norm_affine=True)
    layer.reset_parameters()
    first = layer.qkvg_proj.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(first, layer.qkvg_proj.weight)
    assert torch.equal(layer.head_norm.weight, torch.ones_like(layer.head_norm.weight))
    assert not layer.head_norm.bias.any()


def test_a_checkpoint_holds_weights_only() -> None:
    """The decay and the angles follow from the configuration: they are no part of a state dict."""
    layer = make_layer()
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}
    other = make_layer(decay="log_spaced")
    decay = other.log_decay.clone()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.log_decay, decay)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same(copied: Callable[[MultiScaleRetention], MultiScaleRetention]) -> None:
    layer, x = make_layer(), normal(1, 7, 12, seed=0)
    assert torch.equal(copied(layer)(x)[0], layer(x)[0])


def test_made_on_the_meta_device_and_filled_later() -> None:
    layer = make_layer()
    empty = MultiScaleRetention(small_config(), device="meta", dtype=torch.float64)
    assert {tensor.device.type for tensor in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    x = normal(1, 7, 12, seed=0)
    assert torch.equal(filled.eval()(x)[0], layer(x)[0])


def test_device_and_dtype_arguments() -> None:
    layer = MultiScaleRetention(small_config(), device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert layer.log_decay.dtype is torch.float32
    with torch.device("meta"):
        assert MultiScaleRetention(small_config()).out_proj.weight.device.type == "meta"


def test_extra_repr_shows_the_configuration() -> None:
    text = repr(make_layer(decay="log_spaced"))
    assert "embed_dim=12" in text
    assert "decay='log_spaced'" in text
    assert "groupnorm" in text


def test_autocast_lowers_the_tokens_and_not_the_state() -> None:
    layer = make_layer(torch.float32)
    x, state = normal(2, 20, 12, seed=0, dtype=torch.float32), random_state(layer, 2)
    exact, after = layer(x, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, low = layer(x, state)
        _, pred, _ = layer.pop(x, normal(2, 4, 3, 12, seed=1, dtype=torch.float32), state, block_size=5)
        same, _ = layer(x.bfloat16(), state)
    assert (out.dtype, pred.dtype, low.kv.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(low.kv, after.kv, rtol=0.05, atol=0.1)
    assert torch.equal(same, out)


def test_gradcheck() -> None:
    layer = make_layer()
    x, kv = normal(1, 5, 12, seed=0).requires_grad_(), random_state(layer, 1).kv.requires_grad_()

    def run(x: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, state = layer(x, RetNetState(kv, torch.tensor([3])))
        return out, state.kv

    assert torch.autograd.gradcheck(run, (x, kv), fast_mode=True)


def test_by_default_predictions_start_at_the_first_boundary() -> None:
    layer = make_layer()
    x, x_pred = normal(2, 6, 12, seed=0), normal(2, 2, 3, 12, seed=1)
    explicit = layer.pop(x, x_pred, None, block_size=3, offset=0, reset=None)
    default = layer.pop(x, x_pred, block_size=3)
    assert torch.equal(default[1], explicit[1])


def test_calls_leave_no_trace() -> None:
    """No call changes its inputs, its module, or the next call."""
    layer = make_layer()
    x, state = normal(2, 9, 12, seed=0), random_state(layer, 2)
    copies = copy.deepcopy((x, state.kv, state.position, layer.state_dict()))
    first, _ = layer(x, state)
    layer(normal(3, 30, 12, seed=5))
    second, _ = layer(x, state)
    assert torch.equal(first, second)
    assert torch.equal(x, copies[0])
    assert torch.equal(state.kv, copies[1])
    assert torch.equal(state.position, copies[2])
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, copies[3][name])

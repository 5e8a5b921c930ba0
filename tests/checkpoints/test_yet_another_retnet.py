"""A loaded decoder computes what `yet-another-retnet`'s computes; a wrong checkpoint says what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from yet_another_retnet.retnet import RetNet
from yet_another_retnet.retnet import RetNetDecoder as TheirDecoder
from yet_another_retnet.retnet import RetNetDecoderLayer as TheirLayer

from retpop import RetNetDecoder, RetNetState
from retpop.checkpoints import load_yet_another_retnet

B, T, HEADS, EMBED, FFN, LAYERS = 2, 37, 2, 32, 48, 3
HEAD_DIM = EMBED // HEADS
THEIR_NAME = {"silu": "swish", "gelu": "gelu", "relu": "relu"}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Nothing here needs them, and with them TorchScript compiles their rotation anew for seconds."""
    with torch.no_grad():
        yield


def randomise(module: nn.Module) -> None:
    """Weights that differ from layer to layer (theirs are copies of one), no bias 0, no norm weight 1."""
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))


def their_decoder(
    *,
    activation: str = "silu",
    norm_first: bool = True,
    norm_eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> TheirDecoder:
    torch.manual_seed(0)
    layer = TheirLayer(
        EMBED,
        HEADS,
        dim_feedforward=FFN,
        activation=THEIR_NAME[activation],  # type: ignore[arg-type]
        norm_first=norm_first,
        layer_norm_eps=norm_eps,
        dtype=dtype,
    )
    decoder = TheirDecoder(layer, LAYERS)
    randomise(decoder)
    return decoder.eval()


def tokens(dtype: torch.dtype = torch.float32, length: int = T) -> Tensor:
    return torch.randn(B, length, EMBED, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Every token's error (..., E), as a norm, is within `tolerance` of the token's own norm."""
    assert actual.shape == expected.shape
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() <= tolerance


def assert_same_states(state: RetNetState, theirs: list[Tensor]) -> None:
    """The states agree in their units: they divide k by sqrt(Dk), we multiply the output."""
    for ours, expected in zip(state.kv * HEAD_DIM**-0.5, theirs, strict=True):
        assert_close(ours.flatten(-2), expected.flatten(-2))


OPTIONS = [
    pytest.param({}, id="defaults"),
    pytest.param({"activation": "gelu"}, id="gelu"),
    pytest.param({"activation": "relu"}, id="relu"),
    pytest.param({"norm_first": False}, id="post-norm"),
    pytest.param({"norm_eps": 1e-2}, id="norm_eps"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_states_equal_theirs_in_every_mode(options: dict[str, object]) -> None:
    theirs = their_decoder(**options)  # type: ignore[arg-type]
    ours = load_yet_another_retnet(theirs.state_dict(), num_heads=HEADS, **options).eval()  # type: ignore[arg-type]
    x, cut = tokens(), 21

    parallel = theirs.forward_parallel(x)
    assert_close(ours(x, mode="parallel")[0], parallel)

    their_first, their_states = theirs.forward_chunkwise(x[:, :cut], start_idx=0)
    their_second, their_last = theirs.forward_chunkwise(x[:, cut:], start_idx=cut, prev_states=their_states)
    first, state = ours(x[:, :cut], mode="chunkwise", chunk_size=16)
    second, last = ours(x[:, cut:], state, mode="chunkwise", chunk_size=16)
    assert_close(first, their_first)
    assert_close(second, their_second)
    assert_same_states(state, their_states)
    assert_same_states(last, their_last)

    their_states, state = [], None
    for t in range(T):
        their_out, their_states = theirs.forward_recurrent(x[:, t], seq_idx=t, prev_states=their_states)
        out, state = ours(x[:, t : t + 1], state, mode="recurrent")
        assert_close(out[:, 0], their_out)
    assert_same_states(state, their_states)


def test_in_float64_the_two_agree_to_float64s_precision() -> None:
    theirs = their_decoder(dtype=torch.float64)
    ours = load_yet_another_retnet(theirs.state_dict(), num_heads=HEADS).eval()
    x = tokens(torch.float64)
    # Their angles are float64 here and ours float32 after the cosine: 1e-6 is what the contract leaves.
    assert_close(ours(x)[0], theirs.forward_parallel(x), 1e-6)


def test_their_state_continues_in_our_decoder() -> None:
    theirs = their_decoder()
    ours = load_yet_another_retnet(theirs.state_dict(), num_heads=HEADS).eval()
    x, cut = tokens(), 20
    _, their_states = theirs.forward_chunkwise(x[:, :cut], start_idx=0)
    state = RetNetState(torch.stack(their_states) * HEAD_DIM**0.5, torch.full((B,), cut))
    assert_close(ours(x[:, cut:], state)[0], theirs.forward_parallel(x)[:, cut:])


def test_a_whole_model_gives_its_decoder_and_nothing_else_is_read() -> None:
    torch.manual_seed(0)
    model = RetNet(11, EMBED, HEADS, LAYERS, dim_feedforward=FFN).eval()
    randomise(model)
    ours = load_yet_another_retnet(model.state_dict(), num_heads=HEADS).eval()
    ids = torch.arange(B * T).reshape(B, T) % 11
    logits = model.out(ours(model.embedding(ids))[0])
    assert_close(logits, model.forward_parallel(ids))


@pytest.mark.parametrize("prefix", ["", "decoder.", "module.world_model.decoder."])
def test_a_prefix_changes_nothing(prefix: str) -> None:
    state_dict = their_decoder().state_dict()
    plain = load_yet_another_retnet(state_dict, num_heads=HEADS).state_dict()
    prefixed = {f"{prefix}{key}": value for key, value in state_dict.items()}
    for name, value in load_yet_another_retnet(prefixed, num_heads=HEADS).state_dict().items():
        assert torch.equal(value, plain[name]), name


def test_the_decoder_holds_copies_in_the_weights_dtype() -> None:
    state_dict = their_decoder(dtype=torch.bfloat16).state_dict()
    before = {key: value.clone() for key, value in state_dict.items()}
    ours = load_yet_another_retnet(state_dict, num_heads=HEADS)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    for parameter in ours.parameters():
        parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in state_dict.items())


def test_the_angles_may_be_left_out_since_they_are_constants() -> None:
    theirs = their_decoder()
    weights = dict(theirs.named_parameters())
    ours = load_yet_another_retnet(weights, num_heads=HEADS).eval()
    assert_close(ours(tokens())[0], theirs(tokens()))


def test_loading_does_not_import_their_package() -> None:
    code = "import sys, retpop.checkpoints; sys.exit('yet_another_retnet' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def rejected(state_dict: dict[str, Tensor], message: str, *, num_heads: int = HEADS) -> None:
    with pytest.raises(ValueError, match=message):
        load_yet_another_retnet(state_dict, num_heads=num_heads)


def test_unmatched_keys_are_all_listed() -> None:
    state_dict = dict(their_decoder().state_dict())
    state_dict |= {"layers.1.retention.extra": torch.zeros(1), "final_norm.weight": torch.zeros(1)}
    rejected(state_dict, r"unmatched: \['final_norm.weight', 'layers.1.retention.extra'\]; missing: none")


def test_unmatched_keys_under_the_prefix_are_listed_and_others_are_not_ours() -> None:
    state_dict = {f"decoder.{key}": value for key, value in their_decoder().state_dict().items()}
    state_dict |= {"head.weight": torch.zeros(1), "decoder.norm.weight": torch.zeros(1)}
    rejected(state_dict, r"unmatched: \['norm.weight'\]; missing: none")


def test_missing_keys_are_all_listed() -> None:
    state_dict = dict(their_decoder().state_dict())
    del state_dict["layers.2.linear2.bias"], state_dict["layers.0.norm1.weight"]
    rejected(state_dict, r"missing: \['layers.0.norm1.weight', 'layers.2.linear2.bias'\]")


def test_a_gap_between_layers_is_found() -> None:
    state_dict = {
        key: value for key, value in their_decoder().state_dict().items() if not key.startswith("layers.1.")
    }
    rejected(state_dict, r"unmatched: \['layers.2.*missing: \['layers.1.linear1.bias'")


def test_without_a_decoder_the_keys_found_are_named() -> None:
    rejected({"weight": torch.zeros(1)}, r"no decoder.*its keys: weight")
    rejected({f"w{n}": torch.zeros(1) for n in range(10)}, r"w7 and 2 more")
    # A name that merely ends in the same letters is no prefix.
    rejected({"sublayers.0.retention.q_proj.weight": torch.zeros(4, 4)}, "no decoder")


def test_two_decoders_are_ambiguous() -> None:
    state_dict = their_decoder().state_dict()
    both = {f"{prefix}.{key}": value for prefix in ("a", "b") for key, value in state_dict.items()}
    rejected(both, re.escape("2 decoders, under ['a.', 'b.']"))


def test_a_wrong_number_of_heads_is_told_by_the_angles() -> None:
    rejected(their_decoder().state_dict(), r"num_heads is 4.*heads of 16 features", num_heads=4)


def test_unknown_angles_are_refused() -> None:
    state_dict = dict(their_decoder().state_dict())
    state_dict["layers.0.retention.thetas"] = 1.01 * state_dict["layers.0.retention.thetas"]
    rejected(state_dict, "'layers.0.retention.thetas' differs from 10000")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "layers.1.linear2.weight",
            torch.zeros(EMBED, FFN + 1),
            r"'layers.1.linear2.weight' has shape \(32, 49\)",
        ),
        ("layers.0.retention.q_proj.weight", torch.zeros(EMBED), r"has shape \(32,\).*\(32, 32\)"),
        (
            "layers.0.retention.q_proj.weight",
            torch.zeros(EMBED, 8),
            r"'layers.0.retention.q_proj.weight'.*\(32, 32\)",
        ),
        (
            "layers.2.norm1.bias",
            torch.zeros(EMBED, dtype=torch.float64),
            "'layers.2.norm1.bias' is torch.float64",
        ),
    ],
)
def test_a_weight_that_does_not_fit_is_named(key: str, value: Tensor, message: str) -> None:
    rejected(dict(their_decoder().state_dict()) | {key: value}, message)


@pytest.mark.parametrize(("value", "got"), [([0.0], "list"), (torch.zeros(EMBED).int(), "torch.int32")])
def test_a_value_that_is_no_float_tensor_is_a_type_error(value: object, got: str) -> None:
    state_dict = dict(their_decoder().state_dict()) | {"layers.0.linear2.bias": value}
    with pytest.raises(TypeError, match=f"'layers.0.linear2.bias' is {got}"):
        load_yet_another_retnet(state_dict, num_heads=HEADS)  # type: ignore[arg-type]


def test_a_missing_weight_that_would_tell_a_size_is_listed_too() -> None:
    state_dict = {key: value for key, value in their_decoder().state_dict().items() if "linear1" not in key}
    rejected(state_dict, r"missing: \['layers.0.linear1.bias', 'layers.0.linear1.weight'")


def test_the_result_is_an_ordinary_decoder_of_the_right_config() -> None:
    ours = load_yet_another_retnet(their_decoder().state_dict(), num_heads=HEADS, norm_first=False)
    assert isinstance(ours, RetNetDecoder)
    config = ours.cfg
    assert (config.embed_dim, config.num_heads, config.num_layers, config.ffn_dim) == (
        EMBED,
        HEADS,
        LAYERS,
        FFN,
    )
    assert config.norm_first is False
    assert config.dropout == 0.0
    assert ours.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, 'activation is \'swish\'.*its "swish" is "silu"'),
        ({"num_heads": 3}, ValueError, "num_heads is 3; it must divide"),
        ({"num_heads": 0}, ValueError, "num_heads is 0"),
        ({"state_dict": None}, TypeError, "state_dict is NoneType"),
        ({"state_dict": {1: 2}}, TypeError, "it must map names to tensors"),
    ],
)
def test_arguments_are_called_by_their_own_names(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    theirs = TheirDecoder(TheirLayer(16, 2, dim_feedforward=16), num_layers=1)
    with pytest.raises(error, match=message):
        load_yet_another_retnet(**({"state_dict": theirs.state_dict(), "num_heads": 2} | arguments))

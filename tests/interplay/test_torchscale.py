"""A loaded model computes what torchscale's own computes, as far as its extra normalisation lets it."""

from __future__ import annotations

import inspect
import sys
from importlib.metadata import version
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from retpop import RetNetDecoder
from retpop.checkpoints import load_torchscale
from retpop.models import RetNetLM

V, EMBED, VALUE, HEADS, FFN, LAYERS, T = 13, 32, 64, 2, 48, 2, 37
TOKENS = torch.arange(2 * T).reshape(2, T) * 7 % V


def stub(name: str, **names: object) -> None:
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(names)


# It imports these for drop_path_rate > 0, checkpoint_activations and fsdp alone. The versions that it wants
# are of 2021 and 2022 and need a torchvision built for the same torch.
stub("fairscale")
stub("fairscale.nn", checkpoint_wrapper=None, wrap=None)
stub("timm")
stub("timm.models")
stub("timm.models.layers", drop_path=None)
pytest.importorskip("torchscale", reason="torchscale is not installed (make setup-interplay)")

from torchscale.architecture.config import RetNetConfig as TheirConfig  # noqa: E402
from torchscale.architecture.retnet import RetNetDecoder as TheirDecoder  # noqa: E402
from torchscale.component.multiscale_retention import MultiScaleRetention  # noqa: E402


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def their_model(moved: float = 0.0, **options: object) -> TheirDecoder:
    """Their model at its initial weights, moved by normal noise of that scale."""
    torch.manual_seed(0)
    settings = {
        "decoder_embed_dim": EMBED,
        "decoder_value_embed_dim": VALUE,
        "decoder_retention_heads": HEADS,
        "decoder_ffn_embed_dim": FFN,
        "decoder_layers": LAYERS,
        "vocab_size": V,
        "recurrent_chunk_size": 16,
        **options,
    }
    model = TheirDecoder(TheirConfig(**settings), nn.Embedding(V, EMBED)).eval()
    for parameter in model.parameters():
        parameter.add_(moved * torch.randn_like(parameter))
    return model


def their_logits(model: TheirDecoder, mode: str) -> Tensor:
    if mode == "recurrent":
        state: dict[object, object] = {}
        steps = [model(TOKENS[:, : t + 1], incremental_state=state)[0] for t in range(T)]
        return torch.cat(steps, dim=1)
    model.chunkwise_recurrent = mode == "chunkwise"
    return model(TOKENS)[0]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest error of a token's logits, relative to their norm."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


MODES = ("parallel", "chunkwise", "recurrent")


@pytest.mark.parametrize("mode", MODES)
def test_with_a_small_epsilon_it_is_theirs_in_every_mode(mode: str) -> None:
    theirs = their_model(layernorm_eps=1e-12)
    ours = load_torchscale(theirs.state_dict(), norm_eps=1e-12)
    logits, _ = ours(TOKENS, mode=mode)
    assert distance(logits, their_logits(theirs, mode)) < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("moved", "least", "most"), [(0.0, 5e-3, 2e-2), (0.1, 0, 1e-4), (0.3, 0, 1e-5)])
def test_with_its_own_epsilon_the_distance_fades_as_outputs_grow(
    mode: str, moved: float, least: float, most: float
) -> None:
    theirs = their_model(moved)
    logits, _ = load_torchscale(theirs.state_dict())(TOKENS, mode=mode)
    assert least <= distance(logits, their_logits(theirs, mode)) < most


def inputs_of(module: nn.Module) -> list[Tensor]:
    """A list to which ``module`` adds what it is called with."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def test_the_distance_is_that_of_the_epsilon() -> None:
    """One layer's normalised heads: theirs are sqrt((m + ε) / (m + n² ε)) of ours, n² = 1 + γ + ... + γ^t."""
    theirs = their_model(decoder_layers=1)
    ours = load_torchscale(theirs.state_dict())
    divided = inputs_of(theirs.layers[0].retention.group_norm)
    their_gated = inputs_of(theirs.layers[0].retention.out_proj)
    our_gated = inputs_of(ours.decoder.layers[0].retention.out_proj)
    theirs(TOKENS)
    ours(TOKENS)
    powers = (1 - 2.0 ** (-5 - torch.arange(HEADS))) ** torch.arange(T)[:, None]
    n2 = powers.cumsum(dim=0)[..., None]
    m = n2 * divided[0].pow(2).mean(dim=-1, keepdim=True)  # (B, T, H, 1)
    factor = ((m + 1e-6) / (m + n2 * 1e-6)).sqrt()
    assert factor.min() < 0.9
    expected = our_gated[0].unflatten(-1, (HEADS, -1)) * factor
    torch.testing.assert_close(their_gated[0], expected.flatten(-2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"activation_fn": "swish"}, {"activation": "silu"}),
        ({"no_scale_embedding": False}, {"scale_embeddings": True}),
        ({"share_decoder_input_output_embed": True}, {}),
        ({"chunkwise_recurrent": True}, {"num_heads": HEADS}),
    ],
)
def test_its_options(theirs: dict[str, object], ours: dict[str, object]) -> None:
    model = their_model(0.3, **theirs)
    loaded = load_torchscale(model.state_dict(), **ours)  # type: ignore[arg-type]
    assert isinstance(loaded, RetNetLM)
    assert distance(loaded(TOKENS)[0], their_logits(model, "parallel")) < 1e-4


def test_a_decoder_alone_and_a_prefix() -> None:
    model = their_model(0.3, no_output_layer=True)
    weights = {f"model.decoder.{name}": value for name, value in model.state_dict().items()}
    del weights["model.decoder.embed_tokens.weight"]
    decoder = load_torchscale({**weights, "step": torch.tensor(3)})
    assert isinstance(decoder, RetNetDecoder)
    embedded = torch.randn(2, T, EMBED)
    hidden, _ = model(TOKENS, token_embeddings=embedded, features_only=True)
    assert distance(decoder(embedded)[0], hidden) < 1e-4


def test_names_that_do_not_fit_are_listed() -> None:
    weights = their_model().state_dict()
    weights["layers.1.ffn.bias"] = torch.zeros(3)
    del weights["layers.0.ffn.gate.weight"]
    with pytest.raises(ValueError, match=r"unmatched: \['layers.1.ffn.bias'\]; missing: .*layers.0.ffn.gate"):
        load_torchscale(weights)
    with pytest.raises(ValueError, match=r"missing: \['output_projection.weight'\]"):
        load_torchscale(their_model(no_output_layer=True).state_dict())
    with pytest.raises(ValueError, match=r"missing: \['layer_norm.weight'\]"):
        load_torchscale(their_model(subln=False, deepnorm=True).state_dict())


def test_other_constants_are_refused() -> None:
    weights = their_model().state_dict()
    with pytest.raises(ValueError, match="num_heads is 4, but the weights have 2 heads"):
        load_torchscale(weights, num_heads=4)
    weights["retnet_rel_pos.decay"] = weights["retnet_rel_pos.decay"] * 2
    with pytest.raises(ValueError, match=r"'retnet_rel_pos.decay' is not RetNet's own"):
        load_torchscale(weights)


def test_what_readme_says_of_it() -> None:
    """No state goes into a pass over a sequence, no resets, no boundaries, one decay, no text."""
    assert version("torchscale") == "0.3.0"
    own = inspect.signature(MultiScaleRetention.chunk_recurrent_forward).parameters
    assert set(own) == {"self", "qr", "kr", "v", "inner_mask"}
    assert not hasattr(TheirDecoder, "generate")


def test_buffers_of_low_precision_are_recognised() -> None:
    assert load_torchscale(their_model().bfloat16().state_dict()).head.weight.dtype == torch.bfloat16

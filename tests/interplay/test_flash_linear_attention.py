"""A loaded model computes what flash-linear-attention computes, its kernels run in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from retpop import RetNetConfig, RetNetDecoder, RetNetState
from retpop.checkpoints import load_fla, to_fla
from retpop.models import RetNetLM, RetNetLMConfig

pytest.importorskip("fla", reason="flash-linear-attention is not installed (extra `interplay`)")

from fla.models.retnet import RetNetConfig as TheirConfig
from fla.models.retnet import RetNetForCausalLM as TheirModel
from fla.models.utils import Cache
from triton.runtime import autotuner

V, EMBED, HEADS, T = 11, 32, 2, 66
TOKENS = torch.arange(T).reshape(1, T) * 7 % V


@pytest.fixture(autouse=True, scope="module")
def first_configuration_without_timing() -> Iterator[None]:
    """The autotuner would time kernels on a GPU: let it take the first configuration."""

    def run_once(kernel_call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
        kernel_call()
        return [0.0] * len(quantiles)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(autotuner.Autotuner, "do_bench", property(lambda _: run_once))
        patch.setattr(autotuner.Autotuner, "prune_configs", lambda self, _: self.configs[:1])
        yield


def their_model(**options: object) -> TheirModel:
    """Their model with weights that differ from their initial ones, norms' weights too."""
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=V,
        hidden_size=EMBED,
        num_heads=HEADS,
        num_hidden_layers=2,
        intermediate_size=48,
        fuse_cross_entropy=False,
        **options,
    )
    model = TheirModel(config).eval()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest error of a token's logits, relative to their norm."""
    assert ours.shape == theirs.shape
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


@pytest.fixture(scope="module")
def theirs() -> TheirModel:
    return their_model()


@pytest.fixture(scope="module", params=["parallel", "fused_recurrent"])
def their_logits(theirs: TheirModel, request: pytest.FixtureRequest) -> Tensor:
    for layer in theirs.model.layers:
        layer.attn.mode = request.param
    return theirs(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_it_is_theirs_in_every_mode(theirs: TheirModel, their_logits: Tensor, mode: str) -> None:
    ours = load_fla(theirs.state_dict())
    assert isinstance(ours, RetNetLM)
    assert distance(ours(TOKENS, mode=mode)[0], their_logits) < 1e-4


def test_their_state_is_ours(theirs: TheirModel) -> None:
    ours, half = load_fla(theirs.state_dict()), T // 2
    cache = theirs(TOKENS[:, :half], use_cache=True, cache=Cache()).past_key_values
    state = RetNetState(
        torch.stack([cache[layer]["recurrent_state"] for layer in range(2)]), torch.tensor([half])
    )
    expected = ours(TOKENS[:, :half])[1]
    torch.testing.assert_close(state.kv, expected.kv, rtol=1e-4, atol=1e-4 * expected.kv.abs().max().item())
    assert distance(ours(TOKENS[:, half:], state)[0], ours(TOKENS)[0][:, half:]) < 1e-4


def test_without_weights_on_the_heads_outputs_num_heads_must_be_given() -> None:
    theirs = their_model(elementwise_affine=False)
    weights = theirs.state_dict()
    with pytest.raises(ValueError, match="num_heads is None"):
        load_fla(weights)
    ours = load_fla(weights, num_heads=HEADS)
    ids = TOKENS[:, :9]
    assert distance(ours(ids)[0], theirs(ids, use_cache=False).logits) < 1e-4


def test_a_tied_model_has_one_weight(theirs: TheirModel) -> None:
    weights = theirs.state_dict()
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from the embedding"):
        load_fla(weights, tie_embeddings=True)
    del weights["lm_head.weight"]
    ours = load_fla(weights, tie_embeddings=True)
    assert isinstance(ours, RetNetLM)
    assert ours.head.weight is ours.embedding.weight
    torch.testing.assert_close(ours.embedding.weight, theirs.model.embeddings.weight)


@pytest.mark.parametrize("affine", [False, True])
def test_there_and_back(affine: bool) -> None:
    theirs = their_model(elementwise_affine=affine)
    weights = to_fla(load_fla(theirs.state_dict(), num_heads=HEADS))
    theirs.load_state_dict(weights)
    for name, weight in their_model(elementwise_affine=affine).state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name


def test_what_they_do_not_have_is_named(theirs: TheirModel) -> None:
    decoder = RetNetConfig(embed_dim=8, num_heads=2, num_layers=1, ffn_dim=8)
    with pytest.raises(ValueError, match="has no position='retnet', head_norm='groupnorm', norm='layernorm'"):
        to_fla(RetNetLM(RetNetLMConfig(vocab_size=V, decoder=decoder)))
    ours = load_fla(theirs.state_dict())
    ours.decoder.layers[1].retention.head_norm.weight[0] += 1
    with pytest.raises(ValueError, match=r"'layers.1.retention.head_norm.weight' differs between heads"):
        to_fla(ours)


def test_without_a_head_it_is_a_decoder(theirs: TheirModel) -> None:
    ours, whole = load_fla(theirs.model.state_dict()), load_fla(theirs.state_dict())
    assert isinstance(ours, RetNetDecoder)
    x = torch.randn(2, 5, EMBED)
    torch.testing.assert_close(ours(x)[0], whole.decoder(x)[0])


def test_a_model_that_holds_theirs(theirs: TheirModel) -> None:
    holder = nn.ModuleDict({"policy": theirs, "value": nn.Linear(EMBED, 1)})
    ours = load_fla(holder.state_dict())
    torch.testing.assert_close(ours(TOKENS)[0], load_fla(theirs.state_dict())(TOKENS)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_kv_heads": 1}, r"k_proj.weight' has shape \(16, 32\)"),
        ({"use_output_gate": False}, r"missing: \['layers.0.attn.g_proj.weight'"),
        ({"fuse_norm": False}, r"unmatched: \['layers.0.attn.g_norm.weight'"),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_fla(their_model(**options).state_dict())

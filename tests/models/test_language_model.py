"""The language model: what it computes, how it starts, and what it refuses."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retpop import RetNetConfig
from retpop.models import RetNetLM, RetNetLMConfig

V, E = 13, 16
DECODER = RetNetConfig(embed_dim=E, num_heads=2, num_layers=2, ffn_dim=16, final_norm=True)
MODES = ("parallel", "chunkwise", "recurrent")


def language_model(decoder: RetNetConfig = DECODER, **options: bool) -> RetNetLM:
    torch.manual_seed(0)
    return RetNetLM(RetNetLMConfig(vocab_size=V, decoder=decoder, **options), dtype=torch.float64)


def tokens(rows: int = 2, length: int = 21) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_embedding_decoder_head(tied: bool, scaled: bool) -> None:
    model = language_model(tie_embeddings=tied, scale_embeddings=scaled)
    embedded = model.embedding.weight[tokens()] * (E**0.5 if scaled else 1)
    head = model.embedding.weight if tied else model.head.weight
    logits, _ = model(tokens())
    torch.testing.assert_close(logits, model.decoder(embedded)[0] @ head.T)
    assert len(list(model.parameters())) == len(list(model.decoder.parameters())) + (1 if tied else 2)


@pytest.mark.parametrize("mode", MODES)
def test_a_cut_sequence_equals_the_whole_in_every_mode(mode: str) -> None:
    model, ids = language_model(), tokens()
    expected, end = model(ids)
    first, state = model(ids[:, :8], mode=mode)
    second, state = model(ids[:, 8:], state, mode=mode)
    torch.testing.assert_close(torch.cat((first, second), dim=1), expected)
    torch.testing.assert_close(state.kv, end.kv)


def test_packed_sequences_and_their_last_logits() -> None:
    model, ids = language_model(), tokens(1)
    bounds = torch.tensor([0, 4, 5, 21])
    logits, _ = model(ids, cu_seqlens=bounds)
    last, _ = model(ids, cu_seqlens=bounds, logits="last")
    for row, (start, end) in enumerate(pairwise(bounds.tolist())):
        alone, _ = model(ids[:, start:end])
        torch.testing.assert_close(logits[:, start:end], alone)
        torch.testing.assert_close(last[row], alone[0, -1])
    torch.testing.assert_close(model(ids, logits="last")[0], model(ids)[0][:, -1])


def test_embedding_and_head_start_at_a_scale_that_the_width_decides() -> None:
    torch.manual_seed(0)
    model = RetNetLM(RetNetLMConfig(vocab_size=5000, decoder=DECODER))
    for weight in (model.embedding.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(E**-0.5, rel=0.02)
    assert not torch.equal(model.embedding.weight, model.head.weight)


def test_the_loss_is_the_cross_entropy_of_the_tokens_that_count() -> None:
    model, ids = language_model(), tokens()
    targets = ids.roll(-1, dims=1)
    targets[0, 5:] = -100
    loss, state = model(ids, targets=targets)
    logits, expected_state = model(ids)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(state.kv, expected_state.kv)


def test_it_learns_a_sequence_by_heart() -> None:
    model = language_model(tie_embeddings=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = tokens()
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = model(ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model.generate(ids[:, :6], 15, temperature=0), ids)


def test_under_compile_it_is_one_graph() -> None:
    model, ids = language_model(), tokens()
    step = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(ids, targets=ids)[0], model(ids, targets=ids)[0])


WRONG_CALLS = [
    ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens is torch.float32"),
    (
        {"tokens": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"tokens has shape \(3,\); it must be \(B, T\)",
    ),
    ({"tokens": torch.full((1, 2), V)}, ValueError, "tokens holds 13; each must be from 0 to 12"),
    ({"tokens": [[1, 2]]}, TypeError, "tokens is list"),
    ({"targets": torch.full((2, 21), -1)}, ValueError, "targets holds -1; each must be from 0 to 12"),
    ({"targets": torch.zeros(2, 20, dtype=torch.int64)}, ValueError, r"targets has shape \(2, 20\)"),
    ({"targets": torch.zeros(2, 21, dtype=torch.int32)}, TypeError, "targets is torch.int32"),
    ({"logits": "first"}, ValueError, "logits is 'first'"),
    ({"logits": "last", "targets": tokens()}, ValueError, 'logits is "last" but targets'),
    ({"logits": "last", "tokens": tokens(2, 0)}, ValueError, "a sequence has no tokens"),
    (
        {"logits": "last", "tokens": tokens(1), "cu_seqlens": torch.tensor([0, 0, 21])},
        ValueError,
        "a sequence has no tokens",
    ),
]


@pytest.mark.parametrize(("given", "error", "words"), WRONG_CALLS)
def test_wrong_calls_are_named(given: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        language_model()(**{"tokens": tokens(), **given})


WRONG_CONFIGS = [
    ({"vocab_size": 0}, ValueError, "vocab_size is 0"),
    ({"vocab_size": 2.0}, TypeError, "vocab_size is 2.0"),
    ({"decoder": {"embed_dim": 4}}, TypeError, "decoder is {'embed_dim': 4}"),
    ({"tie_embeddings": 1}, TypeError, "tie_embeddings is 1"),
    ({"scale_embeddings": None}, TypeError, "scale_embeddings is None"),
]


@pytest.mark.parametrize(("given", "error", "words"), WRONG_CONFIGS)
def test_wrong_configurations_are_named(given: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RetNetLMConfig(**{"vocab_size": V, "decoder": DECODER, **given})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cfg is RetNetConfig"):
        RetNetLM(DECODER)  # type: ignore[arg-type]


def test_a_configuration_goes_through_json() -> None:
    decoder = RetNetConfig(embed_dim=4, num_heads=2, num_layers=1, ffn_dim=4, decay=(-0.1, float("-inf")))
    cfg = RetNetLMConfig(vocab_size=V, decoder=decoder, tie_embeddings=True)
    values = json.loads(json.dumps(cfg.to_dict()))
    assert RetNetLMConfig.from_dict(values) == cfg
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        RetNetLMConfig.from_dict({**values, "model_type": "gpt2"})
    with pytest.raises(ValueError, match=r"unknown keys: \['heads'\]; missing: none"):
        RetNetLMConfig.from_dict({**values, "heads": 3})
    with pytest.raises(TypeError, match="values is NoneType"):
        RetNetLMConfig.from_dict(None)  # type: ignore[arg-type]
    del values["vocab_size"]
    with pytest.raises(ValueError, match=r"unknown keys: none; missing: \['vocab_size'\]"):
        RetNetLMConfig.from_dict(values)

"""Resets at any token in layers, decoder and language model: state and position start over."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from module_cases import assert_same_state, make_decoder, make_module, random_state, small_config
from retention_cases import MODES, assert_same_gradients, gradients, normal
from torch import Tensor

from retpop import MultiScaleRetention, RetNetConfig, RetNetDecoder, RetNetState
from retpop.layers import call
from retpop.models import RetNetLM, RetNetLMConfig

POSITIONS = ("retnet", "rope", None)
RESET = torch.zeros(3, 20, dtype=torch.bool)
RESET[0, [0, 7]] = RESET[1, [3, 4, 19]] = True


def episodes_of(
    module: MultiScaleRetention | RetNetDecoder, x: Tensor, state: RetNetState | None, reset: Tensor
) -> tuple[Tensor, RetNetState]:
    """Every episode of every row in a call of its own."""
    outs, states = [], []
    for row in range(x.shape[0]):
        last = module.init_state(1) if state is None else state.select(slice(row, row + 1))
        cuts = [0, *reset[row].nonzero().flatten().tolist(), x.shape[1]]
        parts = []
        for index, (start, end) in enumerate(pairwise(cuts)):
            out, last = module(x[row : row + 1, start:end], None if index else last)
            parts.append(out)
        outs.append(torch.cat(parts, dim=1))
        states.append(last)
    return torch.cat(outs), RetNetState.cat(states)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("position", POSITIONS)
def test_a_decoder_starts_over(position: str | None, mode: str) -> None:
    decoder = make_decoder(position=position)
    x = normal(3, 20, 12, seed=0).requires_grad_()
    state = random_state(decoder, 3)
    out, after = decoder(x, state, reset=RESET, mode=mode)
    expected, last = episodes_of(decoder, x, state, RESET)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert_same_state(after, last, 1e-11)
    assert after.position.tolist() == [13, 1, 39]
    leaves = [x, *decoder.parameters()]
    found, wanted = (gradients(results, leaves) for results in ((out, after.kv), (expected, last.kv)))
    assert_same_gradients(found, wanted, 1e-11)


def test_a_layer_starts_over() -> None:
    layer = make_module(MultiScaleRetention, small_config(position="rope"))
    x = normal(3, 20, 12, seed=0)
    out, state = layer(x, reset=RESET)
    expected, after = episodes_of(layer, x, None, RESET)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert_same_state(state, after, 1e-12)


def test_packed_sequences_start_over() -> None:
    """Positions too: a sequence without tokens keeps its own, and one that ends in a reset has none."""
    decoder = make_decoder(position="rope")
    bounds, x = torch.tensor([0, 5, 5, 12, 20]), normal(1, 20, 12, seed=0)
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, [2, 5, 19]] = True
    state = random_state(decoder, 4)
    out, after = decoder(x, state, cu_seqlens=bounds, reset=reset)
    alone = [
        episodes_of(decoder, x[:, start:end], state.select(slice(s, s + 1)), reset[:, start:end])
        for s, (start, end) in enumerate(pairwise(bounds.tolist()))
    ]
    torch.testing.assert_close(out, torch.cat([y for y, _ in alone], dim=1), rtol=1e-12, atol=1e-12)
    assert_same_state(after, RetNetState.cat([last for _, last in alone]), 1e-12)
    assert after.position.tolist() == [3, 12, 7, 1]


def test_token_by_token_is_the_whole() -> None:
    """As a batch of environments runs: a reset is one token's mask, and a NaN in the old state is gone."""
    decoder = make_decoder(position="retnet")
    x = normal(3, 20, 12, seed=0)
    expected, after = decoder(x, reset=RESET)
    state, outs = decoder.init_state(3), []
    state.kv[:, 0] = torch.nan  # row 0 begins with a reset
    for t in range(20):
        out, state = decoder(x[:, t : t + 1], state, reset=RESET[:, t : t + 1], mode="recurrent")
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-11, atol=1e-11)
    assert_same_state(state, after, 1e-11)


def test_parts_of_a_large_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradient rows go in microbatches, each with its own resets."""
    decoder = make_decoder(position="retnet")
    x, state = normal(3, 20, 12, seed=0), random_state(decoder, 3)
    expected, after = decoder(x, state, reset=RESET)
    monkeypatch.setattr(call, "ELEMENTS_AT_ONCE", 56 * 25)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch.no_grad():
        out, last = decoder(x, state, reset=RESET)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    assert_same_state(last, after.detach(), 1e-12)


def test_truncated_backpropagation_through_a_rollout_is_training_on_its_episodes() -> None:
    """Windows of 8 steps with a carried state; rows end at arbitrary tokens."""
    steps, rows, window = 24, 3, 8
    x, target = normal(rows, steps, 12, seed=0), normal(rows, steps, 12, seed=1)
    reset = torch.rand(rows, steps, generator=torch.Generator().manual_seed(2)) < 0.15
    assert reset.any(dim=1).all()
    rolled, apart = (make_decoder(position="retnet") for _ in range(2))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (rolled, apart)]
    state, own = rolled.init_state(rows), apart.init_state(rows)
    for start in range(0, steps, window):
        now = slice(start, start + window)
        out, state = rolled(x[:, now], state.detach(), reset=reset[:, now])
        expected, own = episodes_of(apart, x[:, now], own.detach(), reset[:, now])
        for optimizer, y in zip(optimizers, (out, expected), strict=True):
            optimizer.zero_grad()
            (y - target[:, now]).square().mean().backward()
            optimizer.step()
    assert_same_state(state, own, 1e-11)
    for a, b in zip(rolled.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert not torch.equal(next(rolled.parameters()), next(make_decoder().parameters()))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_training_step() -> None:
    decoder = make_decoder(position="retnet", num_layers=1)
    x = normal(3, 20, 12, seed=0)
    leaves = list(decoder.parameters())

    def step(x: Tensor, reset: Tensor) -> tuple[Tensor, RetNetState]:
        return decoder(x, reset=reset)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (out, state), (expected, after) = (run(x, RESET) for run in (compiled, step))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert_same_state(state, after, 1e-12)
    assert_same_gradients(gradients((out,), leaves), gradients((expected,), leaves), 1e-12)


def test_by_kernels() -> None:
    decoder = make_decoder(position="rope", num_layers=1).float()
    x, state = normal(3, 20, 12, seed=0, dtype=torch.float32), random_state(decoder, 3)
    out, after = decoder(x, state, reset=RESET, backend="triton")
    expected, last = decoder(x, state, reset=RESET)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert_same_state(after, last, 1e-4)


def test_a_language_model_reads_documents_in_one_row() -> None:
    cfg = RetNetConfig(embed_dim=16, num_heads=2, num_layers=2, ffn_dim=16, final_norm=True)
    torch.manual_seed(0)
    model = RetNetLM(RetNetLMConfig(vocab_size=13, decoder=cfg), dtype=torch.float64).eval()
    ids = torch.randint(13, (1, 20), generator=torch.Generator().manual_seed(1))
    reset = torch.arange(20).unsqueeze(0) == 8
    logits, state = model(ids, reset=reset)
    second, after = model(ids[:, 8:])
    torch.testing.assert_close(logits[:, :8], model(ids[:, :8])[0])
    torch.testing.assert_close(logits[:, 8:], second)
    assert_same_state(state, after, 1e-12)
    loss, _ = model(ids, targets=ids, reset=reset)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[0], ids[0]))


def test_generation_goes_on_from_a_state_with_resets() -> None:
    cfg = RetNetConfig(embed_dim=16, num_heads=2, num_layers=2, ffn_dim=16, final_norm=True)
    torch.manual_seed(0)
    model = RetNetLM(RetNetLMConfig(vocab_size=13, decoder=cfg), dtype=torch.float64).eval()
    ids = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(1))
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[1, 4] = True
    _, state = model(ids, reset=reset)
    text = model.generate(ids[:, :2], 5, temperature=0, state=state)
    _, alone = model(ids[1:, 4:])
    expected = model.generate(ids[1:, :2], 5, temperature=0, state=alone)
    assert torch.equal(text[1:], expected)

"""Tokens of replay frames: the same as without the cache, each frame encoded once, none kept too long."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from rem_atari.config.presets import PRESETS
from rem_atari.models.sequence_tokens import tokenize
from rem_atari.models.tokenizer import Tokenizer
from rem_atari.replay.buffer import Replay
from rem_atari.training.component import Component
from rem_atari.training.token_cache import TokenCache
from rem_atari.training.tokenizer_phase import TokenizerPhase

CONFIG = PRESETS["debug"].tokenizer


class CountingTokenizer(Tokenizer):
    """Counts the frames it encodes."""

    encoded = 0

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        self.encoded += frames.shape[0]
        return super().encode(frames)


@pytest.fixture
def replay() -> Replay:
    """Three episodes of 7 steps and noise for frames."""
    generator = np.random.default_rng(0)
    replay = Replay((24, 24, 3), 30, seed=0)
    for step in range(21):
        frame = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        replay.append(0, frame, step % 3, float(step), step % 7 == 6, False)
    return replay


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    torch.manual_seed(0)
    return CountingTokenizer(CONFIG, 24).eval()


def test_same_as_encoding_every_frame(replay: Replay, tokenizer: CountingTokenizer) -> None:
    cache = TokenCache(replay, tokenizer)
    for batch in (replay.sample_sequences(9, 5, min_real=1), replay.sample_segments(9, 5, min_real=1)):
        assert not batch.mask.all(), "padding must be in the test"
        direct, cached = tokenize(batch, tokenizer), cache.tokenize(batch)
        assert torch.equal(cached.tokens[batch.mask], direct.tokens[batch.mask])
        assert (cached.tokens[~batch.mask] == 0).all()
        for entry in fields(direct):
            if entry.name != "tokens":
                assert torch.equal(getattr(cached, entry.name), getattr(direct, entry.name))


def test_selecting_takes_the_same_sequences_of_everything(
    replay: Replay, tokenizer: CountingTokenizer
) -> None:
    batch = replay.sample_sequences(6, 5, min_real=1)
    chosen = batch.select([4, 1])
    tokens, chosen_tokens = tokenize(batch, tokenizer), tokenize(batch, tokenizer).select(slice(2, 4))
    for whole, part, order in ((batch, chosen, [4, 1]), (tokens, chosen_tokens, [2, 3])):
        names = {entry.name for entry in fields(whole)} - {"stored"}
        for name in names | ({"frames"} if whole is batch else set()):
            assert torch.equal(getattr(part, name), getattr(whole, name)[order])


def test_a_frame_is_encoded_once(replay: Replay, tokenizer: CountingTokenizer) -> None:
    cache = TokenCache(replay, tokenizer)
    rows: set[int] = set()
    for _ in range(20):
        batch = replay.sample_sequences(4, 3, min_real=1)
        cache.tokenize(batch)
        rows |= set(batch.rows[batch.mask].tolist())
        assert tokenizer.encoded == len(rows)


def test_an_update_of_the_tokenizer_clears_it(replay: Replay, tokenizer: CountingTokenizer) -> None:
    cache = TokenCache(replay, tokenizer)
    generator = torch.Generator().manual_seed(0)
    component = Component("tokenizer", tokenizer, CONFIG.optim)
    phase = TokenizerPhase(tokenizer, component, replay, cache, CONFIG, generator, print)
    batch = replay.sample_sequences(6, 5, min_real=5)
    before = cache.tokenize(batch).tokens
    assert phase.prepare(0)
    phase.update()
    after = cache.tokenize(batch).tokens
    assert torch.equal(after, tokenize(batch, tokenizer).tokens)
    assert not torch.equal(after, before), "an update that changes no token shows nothing"


def test_the_cache_goes_on_from_a_checkpoint(replay: Replay, tokenizer: CountingTokenizer) -> None:
    """What was known is known, and is not encoded again."""
    cache, other = TokenCache(replay, tokenizer), TokenCache(replay, tokenizer)
    assert cache.tensors()["rows"].tolist() == []
    other.load_tensors(cache.tensors())
    batch = replay.sample_sequences(2, 5, min_real=5)
    expected = cache.tokenize(batch).tokens
    other.tokenize(replay.sample_sequences(9, 5, min_real=1))
    other.load_tensors(cache.tensors())
    assert other.tensors()["rows"].tolist() == sorted(set(batch.rows.flatten().tolist()))
    before = tokenizer.encoded
    assert torch.equal(other.tokenize(batch).tokens, expected)
    assert tokenizer.encoded == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": torch.tensor([30])}, "a cached row is not below 30"),
        ({"rows": torch.tensor([-1])}, "a cached row is not below 30"),
        (
            {"tokens": torch.full((1, 9), CONFIG.codebook_size, dtype=torch.int32)},
            "a cached token is not below",
        ),
        ({"tokens": torch.zeros(1, 8, dtype=torch.int32)}, r"the cached tokens are \(1, 8\) for \(1,\) rows"),
        ({"rows": torch.tensor([[1]])}, "the cached tokens are"),
    ],
)
def test_tensors_that_are_none_of_a_cache_are_refused(
    replay: Replay, tokenizer: CountingTokenizer, change: dict[str, torch.Tensor], complaint: str
) -> None:
    good = {"rows": torch.tensor([1]), "tokens": torch.zeros(1, 9, dtype=torch.int32)}
    cache = TokenCache(replay, tokenizer)
    cache.load_tensors(good)
    with pytest.raises(ValueError, match=complaint):
        cache.load_tensors(good | change)

"""Draws in four groups: each token reads its neighbours of earlier groups, in training as in imagination."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from rem_atari.config import WorldModelConfig
from rem_atari.models.grouped import AROUND, GroupedWorldModel, Neighbours
from rem_atari.models.sequence_tokens import SequenceTokens

WIDTH, CODES = 8, 3
CFG = WorldModelConfig(
    embed_dim=WIDTH,
    num_layers=1,
    num_heads=1,
    ffn_dim=16,
    dropout=0.0,
    sequence_blocks=2,
    context_blocks=1,
    own_token_embedding=True,
    draw="groups",
)
CODEBOOK = torch.zeros(CODES, WIDTH)


def make(num_tokens: int, *, scale: float = 1.0) -> GroupedWorldModel:
    """A world model with random weights; `scale` times as large where neighbours are read."""
    torch.manual_seed(0)
    model = GroupedWorldModel(
        CFG, num_tokens=num_tokens, code_dim=WIDTH, codebook_size=CODES, num_actions=2
    ).eval()
    with torch.no_grad():
        for parameter in model.neighbours.parameters():
            parameter.mul_(scale)
    return model


def sequences(frames: torch.Tensor) -> SequenceTokens:
    """Each of the frames (B, K) after a frame of zeros."""
    rows, places = frames.shape
    never = torch.zeros(rows, 2, dtype=torch.bool)
    return SequenceTokens(
        tokens=torch.stack((torch.zeros(rows, places, dtype=torch.int64), frames), dim=1),
        actions=torch.zeros(rows, 2, dtype=torch.int64),
        rewards=torch.zeros(rows, 2),
        ended=never,
        truncated=never,
        mask=~never,
    )


@torch.no_grad()
def chances(model: GroupedWorldModel, frames: torch.Tensor) -> torch.Tensor:
    """The probability of each frame (B, K) as training sees it, (B,)."""
    batch = sequences(frames)
    logits = model(batch.tokens, batch.actions, CODEBOOK, skip_blocks=1).tokens[:, 0]
    return logits.log_softmax(dim=-1).gather(-1, frames[..., None]).sum(dim=(1, 2)).exp()


@torch.no_grad()
def imagined(model: GroupedWorldModel, rows: int, num_tokens: int, **options) -> torch.Tensor:
    start = torch.zeros(rows, num_tokens, dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    return model.imagine(start, start[:, 0], CODEBOOK, model.init_state(rows), generator, **options).tokens


def test_whole_frames_are_drawn_as_often_as_training_says():
    """Pearson's chi-square over all 81 frames of four tokens, 99.9th percentile for 80 degrees of freedom."""
    model, rows = make(4, scale=4.0), 40_000
    frames = torch.tensor(list(product(range(CODES), repeat=4)))
    expected = chances(model, frames)
    assert expected.sum() == pytest.approx(1.0, abs=1e-5), "a distribution over whole frames"
    alone = torch.stack([expected[frames[:, place] == 0].sum() for place in range(4)]).prod()
    assert (expected[0] - alone).abs() > 0.1 * alone, "tokens depend on each other, or nothing is tested"
    drawn = imagined(model, rows, 4) @ torch.tensor([27, 9, 3, 1])
    counts = drawn.bincount(minlength=81)
    assert ((counts - expected * rows).square() / (expected * rows)).sum() < 124.8


def test_the_most_likely_frame_is_drawn_group_by_group():
    model = make(9, scale=4.0)
    drawn = imagined(model, 1, 9, temperature=0)
    batch = sequences(drawn)
    with torch.no_grad():
        logits = model(batch.tokens, batch.actions, CODEBOOK, skip_blocks=1).tokens[:, 0]
    assert torch.equal(logits.argmax(dim=-1), drawn)


def test_a_token_is_read_by_its_neighbours_of_later_groups_alone():
    """Groups of a square of 5 x 5 by parities: (even, even), (odd, odd), (even, odd), (odd, even)."""
    grid = 5
    group = {(0, 0): 0, (1, 1): 1, (0, 1): 2, (1, 0): 3}
    neighbours = Neighbours(WIDTH, grid**2)
    shown = torch.randn(grid**2, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = neighbours(shown)
        for place, (row, column) in enumerate(product(range(grid), repeat=2)):
            other = shown.clone()
            other[place] += 1
            moved = (neighbours(other) != before).any(dim=-1)
            for reader, (y, x) in enumerate(product(range(grid), repeat=2)):
                near = max(abs(y - row), abs(x - column)) == 1
                later = group[y % 2, x % 2] > group[row % 2, column % 2]
                assert bool(moved[reader]) == (near and later)


@pytest.mark.parametrize("num_tokens", [1, 4, 9, 25])
def test_every_place_is_drawn_once(num_tokens: int):
    drawn = torch.cat([group.places for group in Neighbours(WIDTH, num_tokens).groups])
    assert sorted(drawn.tolist()) == list(range(num_tokens))


@torch.no_grad()
def test_a_group_reads_all_of_its_neighbours_by_the_whole_first_layer():
    """A whole layer over all eight directions, zeros where there is no neighbour of an earlier group."""
    grid = 5
    neighbours = Neighbours(WIDTH, grid**2)
    shown = torch.randn(3, grid**2, WIDTH, generator=torch.Generator().manual_seed(0))
    order = {place: n for n, group in enumerate(neighbours.groups) for place in group.places.tolist()}
    around = torch.zeros(3, grid, grid, 8, WIDTH)
    for row, column in product(range(grid), repeat=2):
        for n, (down, right) in enumerate(AROUND):
            y, x = row + down, column + right
            if 0 <= y < grid and 0 <= x < grid and order[y * grid + x] < order[row * grid + column]:
                around[:, row, column, n] = shown[:, y * grid + x]
    wanted = neighbours.layers(around.flatten(3).flatten(1, 2))
    torch.testing.assert_close(neighbours(shown), wanted)


@pytest.mark.parametrize("num_tokens", [0, 2, 15])
def test_places_that_are_no_square_are_refused(num_tokens: int):
    with pytest.raises(ValueError, match=f"num_tokens is {num_tokens}; wanted a square number"):
        make(num_tokens)


def test_a_thing_that_moves_by_chance_is_neither_lost_nor_doubled():
    """A thing in one of four places: tokens drawn by themselves show one in 42% of frames."""
    model = make(4).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        places = torch.randint(4, (64,), generator=generator)
        loss = model.loss(sequences(torch.nn.functional.one_hot(places, 4)), CODEBOOK).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = imagined(model.eval(), 1000, 4)
    assert ((drawn == 1).sum(dim=1) == 1).float().mean() > 0.95
    assert ((drawn == 1).float().mean(dim=0) - 0.25).abs().max() < 0.08

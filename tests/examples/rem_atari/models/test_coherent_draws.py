"""How many drawn frames can be, by MinAtar's own rules: a perfect model's tokens, drawn in each way.

The perfect model of a frame knows the exact chances of each token of the next one. What it draws may still be
impossible as a whole, because tokens of a frame depend on each other. Here the game itself says what is
possible: it goes on many times from one frame, with new random numbers and, where the model sees one frame
only, with every value that the timers may have behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rem_atari.models.grouped import Neighbours
from rem_atari.models.sampling import sample_categorical, sample_coupled

asterix = pytest.importorskip(
    "minatar.environments.asterix", reason="minatar is not installed (extra `minatar`)"
)

FRAMES, OUTCOMES, DRAWS = 12, 300, 200
LEFT, UP = 1, 2


def a_game(steps: int, seed: int) -> Any:
    """Asterix after some random steps."""
    numbers = np.random.RandomState(seed)
    game = asterix.Env(ramping=False)
    game.random = numbers
    for _ in range(steps):
        game.act(numbers.randint(5))
        if game.terminal:
            game.reset()
    return game


def tokens_of(game: Any) -> np.ndarray:
    """A token for each 2 x 2 cells: the bits of their channels as one number."""
    cells = game.state() @ (1 << np.arange(4))
    blocks = cells.reshape(5, 2, 5, 2).transpose(0, 2, 1, 3).reshape(25, 4)
    return blocks @ (16 ** np.arange(4))


def outcomes(game: Any, *, timers_known: bool, sticky: float) -> np.ndarray:
    """What may follow a frame and the action "up", which by chance `sticky` is "left": (OUTCOMES, 25)."""
    numbers = np.random.RandomState(0)
    rows = []
    for _ in range(OUTCOMES):
        branch = copy.copy(game)
        branch.entities = [entity and list(entity) for entity in game.entities]
        branch.random = numbers
        if not timers_known:
            branch.move_timer = numbers.randint(branch.move_speed)
            branch.spawn_timer = numbers.randint(branch.spawn_speed)
        branch.act(LEFT if numbers.rand() < sticky else UP)
        rows.append(tokens_of(branch))
    return np.stack(rows)


def impossible_share(
    draw: Callable[[Tensor, Tensor, int], Tensor], *, timers_known: bool, sticky: float = 0.0
) -> float:
    """Share of drawn frames that no real outcome shows.

    `draw` gives DRAWS frames from what may follow, (OUTCOMES, 25), the frame before, and the number of codes.
    """
    wrong = 0
    for seed in range(FRAMES):
        game = a_game(50 + 7 * seed, seed)
        real = outcomes(game, timers_known=timers_known, sticky=sticky)
        codes, coded = np.unique(np.concatenate((real, tokens_of(game)[None])), return_inverse=True)
        coded = torch.from_numpy(coded.reshape(OUTCOMES + 1, 25))
        possible = {tuple(row) for row in coded[:-1].tolist()}
        drawn = draw(coded[:-1], coded[-1].expand(DRAWS, -1), len(codes))
        wrong += sum(tuple(row) not in possible for row in drawn.tolist())
    return wrong / (FRAMES * DRAWS)


def logits_of(real: Tensor, codes: int) -> Tensor:
    chances = torch.nn.functional.one_hot(real, codes).double().mean(dim=0)
    return chances.log().float().expand(DRAWS, -1, -1)


def independent(real: Tensor, before: Tensor, codes: int) -> Tensor:
    return sample_categorical(logits_of(real, codes), torch.Generator().manual_seed(0))


def coupled(real: Tensor, before: Tensor, codes: int) -> Tensor:
    return sample_coupled(logits_of(real, codes), before, torch.Generator().manual_seed(0))


def in_groups(real: Tensor, before: Tensor, codes: int) -> Tensor:
    """Each token from the outcomes that agree with its neighbours of earlier groups."""
    neighbours, generator = Neighbours(2, 25), torch.Generator().manual_seed(0)
    drawn = torch.zeros_like(before)
    for group in neighbours.groups:
        for place, beside in zip(group.places.tolist(), group.near.tolist(), strict=True):
            fits = torch.ones(len(drawn), len(real), dtype=torch.bool)
            for near in beside:
                if near < 25:
                    fits &= drawn[:, near, None] == real[:, near]
            fits |= ~fits.any(dim=1, keepdim=True)  # a surrounding that no outcome has: any of them
            outcome = torch.multinomial(fits.float(), 1, generator=generator)[:, 0]
            drawn[:, place] = real[outcome, place]
    return drawn


def test_a_model_of_one_frame_draws_far_fewer_impossible_frames_when_tokens_are_coupled():
    """Things move by a timer that one frame does not show: together, or not at all."""
    assert impossible_share(independent, timers_known=False) > 0.4
    assert impossible_share(coupled, timers_known=False) < 0.1


def test_a_model_that_knows_the_timers_needs_no_coupling():
    """What is left to chance is where something appears: in one place, which coupling makes several."""
    alone = impossible_share(independent, timers_known=True)
    assert alone < 0.1
    assert alone < impossible_share(coupled, timers_known=True) < 0.2


def test_a_player_that_may_go_either_way_is_neither_lost_nor_doubled_when_neighbours_are_read():
    """One action in ten is the one before, as in the game: the player leaves a patch, or it does not."""
    assert impossible_share(independent, timers_known=True, sticky=0.1) > 0.11
    assert impossible_share(coupled, timers_known=True, sticky=0.1) > 0.11
    assert impossible_share(in_groups, timers_known=True, sticky=0.1) < 0.07, "as without chance"


def test_neighbours_that_are_read_help_where_timers_are_unknown():
    assert impossible_share(in_groups, timers_known=False) < 0.2

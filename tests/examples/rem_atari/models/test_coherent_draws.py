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

from rem_atari.models.sampling import sample_categorical, sample_coupled

asterix = pytest.importorskip(
    "minatar.environments.asterix", reason="minatar is not installed (extra `minatar`)"
)

FRAMES, OUTCOMES, DRAWS = 12, 300, 200
UP = 2


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


def outcomes(game: Any, *, timers_known: bool) -> np.ndarray:
    """What may follow a frame and the action "up", (OUTCOMES, 25)."""
    numbers = np.random.RandomState(0)
    rows = []
    for _ in range(OUTCOMES):
        branch = copy.copy(game)
        branch.entities = [entity and list(entity) for entity in game.entities]
        branch.random = numbers
        if not timers_known:
            branch.move_timer = numbers.randint(branch.move_speed)
            branch.spawn_timer = numbers.randint(branch.spawn_speed)
        branch.act(UP)
        rows.append(tokens_of(branch))
    return np.stack(rows)


def impossible_share(draw: Callable[[Tensor, Tensor], Tensor], *, timers_known: bool) -> float:
    """Share of drawn frames that no real outcome shows."""
    wrong = 0
    for seed in range(FRAMES):
        game = a_game(50 + 7 * seed, seed)
        real = outcomes(game, timers_known=timers_known)
        codes, coded = np.unique(np.concatenate((real, tokens_of(game)[None])), return_inverse=True)
        coded = torch.from_numpy(coded.reshape(OUTCOMES + 1, 25))
        chances = torch.nn.functional.one_hot(coded[:-1], len(codes)).double().mean(dim=0)
        logits = chances.log().float().expand(DRAWS, -1, -1)
        possible = {tuple(row) for row in coded[:-1].tolist()}
        drawn = draw(logits, coded[-1].expand(DRAWS, -1))
        wrong += sum(tuple(row) not in possible for row in drawn.tolist())
    return wrong / (FRAMES * DRAWS)


def independent(logits: Tensor, before: Tensor) -> Tensor:
    return sample_categorical(logits, torch.Generator().manual_seed(0))


def coupled(logits: Tensor, before: Tensor) -> Tensor:
    return sample_coupled(logits, before, torch.Generator().manual_seed(0))


def test_a_model_of_one_frame_draws_far_fewer_impossible_frames_when_tokens_are_coupled():
    """Things move by a timer that one frame does not show: together, or not at all."""
    assert impossible_share(independent, timers_known=False) > 0.4
    assert impossible_share(coupled, timers_known=False) < 0.1


def test_a_model_that_knows_the_timers_needs_no_coupling():
    """What is left to chance is where something appears: in one place, which coupling makes several."""
    alone = impossible_share(independent, timers_known=True)
    assert alone < 0.1
    assert alone < impossible_share(coupled, timers_known=True) < 0.2

"""A dream: a moment of imagined games as a value, from which imagination continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from rem_atari.checks import check_seed, rows_of
from rem_atari.models.base_world_model import Imagined
from rem_atari.models.memory import Memory
from rem_atari.models.rewards import RewardCode


@dataclass(frozen=True, eq=False)
class Dream:
    """A moment of n imagined games.

    A dream is immutable. `LoadedAgent.imagine` returns the next one, so a caller that keeps a dream can
    rewind to it, and several futures can branch off from it. The seed is part of it: the same action after
    the same dream gives the same future, and `with_seed` another one.

    Attributes:
        tokens: the observations, int64 (n, K); `LoadedAgent.decode` shows them.
        rewards: rewards of the step that led here, float32 (n,); 0 at the start. They are drawn from the
            world model, which knows only the signs of rewards unless `world_model.reward_bins` is set.
        ended: the game ended with that step, bool (n,); later steps have no meaning.
        expected_rewards: mean of the predicted rewards of that step, float32 (n,).
        reward_chances: chances of a negative reward, of none and of a positive one, float32 (n, 3).
        end_chances: chance of the end, float32 (n,).
        steps: imagined steps since the start.
        seed: seed of the next step, together with `steps`.
        state: the world model's memory.
    """

    tokens: np.ndarray
    rewards: np.ndarray
    ended: np.ndarray
    expected_rewards: np.ndarray
    reward_chances: np.ndarray
    end_chances: np.ndarray
    steps: int
    seed: int
    state: Memory

    @classmethod
    def at(cls, tokens: np.ndarray, state: Memory, seed: int) -> Dream:
        """The first moment of n dreams, at tokens (n, K)."""
        count = len(tokens)
        nothing = np.zeros(count, dtype=np.float32)
        return cls(
            tokens=tokens,
            rewards=nothing,
            ended=np.zeros(count, dtype=bool),
            expected_rewards=nothing,
            reward_chances=np.tile(np.array([0.0, 1.0, 0.0], dtype=np.float32), (count, 1)),
            end_chances=nothing,
            steps=0,
            seed=seed,
            state=state,
        )

    def after(self, imagined: Imagined, code: RewardCode) -> Dream:
        """The dream after a step of the world model, whose rewards are classes of `code`."""
        return Dream(
            tokens=imagined.tokens.cpu().numpy(),
            rewards=imagined.rewards.cpu().numpy(),
            ended=imagined.ended.cpu().numpy(),
            expected_rewards=code.two_hot.mean(imagined.reward_logits).cpu().numpy(),
            reward_chances=code.sign_logits(imagined.reward_logits).exp().cpu().numpy(),
            end_chances=imagined.end_logits.float().softmax(dim=-1)[:, 1].cpu().numpy(),
            steps=self.steps + 1,
            seed=self.seed,
            state=imagined.state,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def with_seed(self, seed: int) -> Dream:
        """The same moment with another seed, at least 0, which gives other futures.

        Raises:
            ValueError: `seed` is negative.
        """
        check_seed("Dream.with_seed()", seed)
        return replace(self, seed=seed)

    def select(self, indices: ArrayLike) -> Dream:
        """Some of the n games, in the order given; a game named twice branches."""
        rows = rows_of("Dream.select()", indices)
        columns = {name: getattr(self, name)[rows] for name in ARRAYS}
        return replace(self, **columns, state=self.state.select(torch.from_numpy(rows)))

    @staticmethod
    def cat(dreams: Sequence[Dream]) -> Dream:
        """The games of several dreams of one agent side by side; `steps` and `seed` are those of the first.

        Raises:
            ValueError: there is no dream, or they are of different agents.
        """
        if not dreams:
            raise ValueError("Dream.cat(): dreams is empty; wanted at least one.")
        columns = {name: np.concatenate([getattr(dream, name) for dream in dreams]) for name in ARRAYS}
        return replace(dreams[0], **columns, state=Memory.cat(dream.state for dream in dreams))


ARRAYS = tuple(column.name for column in fields(Dream) if column.name not in ("steps", "seed", "state"))
"""The fields with a row for each game."""

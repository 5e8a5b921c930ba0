"""A search for a fixed list of actions that scores well, whatever happens in the game.

A list is played from a game's start and then repeated: a list of one action is a constant policy, "fire,
left" six times and "fire, right" six times is a sweep, and a list as long as the game is a plan. The search
is a small evolutionary one with a budget of steps, for returns that vary from game to game: half of its games
try new lists, half replay the best lists so far, so that a list that was only lucky loses its rank.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rem_atari.envs.vector import GameReturn

Actions = NDArray[np.int64]

PARENTS = 8
"""New lists are made from this number of the best."""
RANDOM_SHARE = 0.25
"""Share of new lists that are drawn at random, not made from others."""
SURE_AFTER = 30
"""Games after which a list is not replayed to confirm its return."""
PRIOR_GAMES = 4
"""A list's mean is shrunk towards that of all games, as if it included this number of average games."""
KEPT = 500
"""Number of lists kept, the best ones."""
MOST_ACTIONS = 4_096
"""Length of the longest list."""
MOST_REPEATS = 16
"""Longest run of one action in a change."""


@dataclass
class TriedList:
    """A list of actions, (L,), and its results: games, their summed returns, steps of the longest one."""

    actions: Actions
    games: int = 0
    total: float = 0.0
    longest: int = 0

    @property
    def mean(self) -> float:
        """Mean return; minus infinity without a game."""
        return self.total / self.games if self.games else -math.inf

    def add(self, game: GameReturn) -> None:
        """Note a game that was played with it."""
        self.games += 1
        self.total += game.raw_return
        self.longest = max(self.longest, game.length)


class OpenLoopSearch:
    """A search for the best list of actions: `ask` for the list to play next, and `add` the game's result to
    it.

    Args:
        num_actions: actions of the game.
        rng: source of the draws.
    """

    def __init__(self, num_actions: int, rng: np.random.Generator) -> None:
        self._num_actions = num_actions
        self._rng = rng
        self._tried: list[TriedList] = []
        self._plays_again = False

    def ask(self) -> TriedList:
        """The list to play next: first the constants, then the best so far and new ones alternately."""
        if len(self._tried) < self._num_actions:
            return self._remember(np.array([len(self._tried)]))
        if len({tried.mean for tried in self._tried if tried.games}) == 1:
            # Where rewards are rare all lists may be equal, so that no choice is possible.
            return self._remember(draw_list(self._num_actions, self._rng))
        self._plays_again = not self._plays_again
        if self._plays_again:
            # By its plain mean, so that a list that was lucky once is replayed next.
            best = max(self._tried, key=lambda tried: tried.mean)
            if best.games < SURE_AFTER:
                return best
        return self._remember(self._new_list())

    def best(self) -> Actions:
        """The best list by shrunk means, which discount lists that were played rarely."""
        return self._ranked(1)[0].actions

    def _remember(self, actions: Actions) -> TriedList:
        if len(self._tried) >= 2 * KEPT:
            self._tried = self._ranked(KEPT)
        self._tried.append(TriedList(actions))
        return self._tried[-1]

    def _ranked(self, count: int) -> list[TriedList]:
        """The best lists, best first, by means that are shrunk towards that of all games."""
        played = [tried for tried in self._tried if tried.games] or self._tried
        prior = sum(tried.total for tried in played) / max(1, sum(tried.games for tried in played))

        def score(tried: TriedList) -> float:
            return (tried.total + PRIOR_GAMES * prior) / (tried.games + PRIOR_GAMES)

        return heapq.nlargest(count, played, key=score)

    def _new_list(self) -> Actions:
        if self._rng.random() < RANDOM_SHARE:
            return draw_list(self._num_actions, self._rng)
        parents = self._ranked(PARENTS)
        first, second = (parents[index] for index in self._rng.integers(len(parents), size=2))
        return change_list(first, second.actions, self._num_actions, self._rng)


def draw_list(num_actions: int, rng: np.random.Generator) -> Actions:
    """Runs of one action each, as long and as many as a power of two; in half of the lists with another
    action between any two."""
    runs, repeats = 2 ** rng.integers(5, size=2)
    actions = rng.integers(num_actions, size=runs).repeat(repeats)
    return _weave(actions, int(rng.integers(num_actions))) if rng.random() < 0.5 else actions


def change_list(tried: TriedList, other: Actions, num_actions: int, rng: np.random.Generator) -> Actions:
    """A list with one or several changes: a run put over, into or taken out of it, an action woven in, half
    its speed, or its end replaced by that of another list."""
    actions = tried.actions
    if rng.random() < 0.5:
        # As long as its game, so that a change affects one moment and not every repetition.
        actions = np.resize(actions, max(len(actions), tried.longest))
    for _ in range(rng.geometric(0.5)):
        start = int(rng.integers(len(actions)))
        action, length = int(rng.integers(num_actions)), int(rng.integers(1, MOST_REPEATS + 1))
        end = min(start + length, len(actions))
        head, run = actions[:start], np.full(end - start, action)
        match rng.integers(6):
            case 0:
                actions = np.concatenate([head, run, actions[end:]])
            case 1:
                actions = np.concatenate([head, run, actions[start:]])
            case 2 if len(actions) > end - start:
                actions = np.concatenate([head, actions[end:]])
            case 3:
                actions = _weave(actions, action)
            case 4:
                actions = actions.repeat(2)
            case 5:
                actions = np.concatenate([head, np.resize(other, max(len(actions), len(other)))[start:]])
    return actions[:MOST_ACTIONS]


def _weave(actions: Actions, action: int) -> Actions:
    """Insert an action before each action of a list."""
    woven = np.full(2 * len(actions), action)
    woven[1::2] = actions
    return woven

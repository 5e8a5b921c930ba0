"""Returns of policies that see nothing: baselines that are stronger than random play.

An agent that uses what it sees must beat the best of them. All are measured under the conditions of an
evaluation, in one environment, game after game. The games are not those of the search, because the mean by
which a list was chosen is biased upwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import cycle

import numpy as np

from rem_atari.config import Config, EnvConfig
from rem_atari.envs.vector import GameReturn, VectorEnv
from rem_atari.evaluation import EvaluationResult, make_test_envs
from rem_atari.play.open_loop import Actions, OpenLoopSearch, TriedList
from rem_atari.training.seeding import derive_seed

Policy = Callable[[np.ndarray, int], int]
"""An action for a frame, (S, S, 3) uint8, and the steps for which the policy has played in this game."""

Choose = Callable[[np.ndarray], Policy]
"""The policy that plays on from a game's start, given its frame."""

Advance = Callable[[int], None]
"""Called with how much more is done; may raise to stop."""

Lists = dict[bytes, Actions]
"""Lists of actions by the start of the game in which each is played."""

ANY_START = b""
"""The key of a list that is played for every start."""

LOOK = 1
"""Steps, taken with the game's first action, after which starts are distinguished by their frames. The very
first frame may hide the difference: in MinAtar's Breakout the ball is behind a brick."""

MOST_STARTS = 4
"""The most starts of a game for which a list is also searched for each of them."""

START_GAMES = 50
"""Games that are begun to count the starts."""


class BlindPlay:
    """Searches for blind policies of one game, and measures them.

    Args:
        config: the game, and how it is evaluated (`evaluation.playing_conditions`).
        seed: the seeds of all games and searches are derived from it.

    Attributes:
        action_names: the game's names of its actions, in lower case.
        num_starts: number of distinguished starts, see `count_starts`.

    Searches are given a number of environment steps and call `advance` with 1 after each; measurements a
    number of games, and call it with how many have ended.
    """

    def __init__(self, config: Config, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        with closing(self._make_envs("starts")) as envs:
            self.action_names = envs.action_names
            self.num_starts = count_starts(envs)

    def find_constant(self, steps: int, advance: Advance) -> Lists:
        """The action with the best mean return; all are played by turns for a number of steps."""
        constants = [TriedList(np.array([action])) for action in range(len(self.action_names))]
        turns = cycle(constants)
        self._search(lambda start: next(turns), steps, advance, "constant")
        return {ANY_START: max(constants, key=lambda tried: tried.mean).actions}

    def find_lists(self, steps: int, advance: Advance, *, by_start: bool = False) -> Lists:
        """The best list of actions found in a number of steps, or the best for each start."""
        searches: dict[bytes, OpenLoopSearch] = {}
        rng = self._rng("lists", by_start)

        def ask(start: np.ndarray) -> TriedList:
            key = start.tobytes() if by_start else ANY_START
            return searches.setdefault(key, OpenLoopSearch(len(self.action_names), rng)).ask()

        self._search(ask, steps, advance, "lists", by_start, look=LOOK if by_start else 0)
        return {key: search.best() for key, search in searches.items()}

    def copy_lists(self, player: Policy) -> Lists:
        """The actions of a player that sees after each start; for games without sticky actions."""
        env = self._config.env
        calm = replace(env, minatar=replace(env.minatar, sticky_actions=0.0))
        lists: dict[bytes, list[int]] = {}

        def choose(start: np.ndarray) -> Policy:
            is_new, taken = start.tobytes() not in lists, lists.setdefault(start.tobytes(), [])

            def play(frame: np.ndarray, clock: int) -> int:
                action = player(frame, clock)
                if is_new:
                    taken.append(action)
                return action

            return play

        games = 0
        with closing(self._make_envs("copy", env=calm)) as envs:
            for ended in play_on(envs, choose, look=LOOK):
                games += len(ended)
                if ended and (len(lists) == self.num_starts or games >= START_GAMES):
                    break
        return {start: np.array(taken) for start, taken in lists.items()}

    def measure_random(self, games: int, advance: Advance) -> EvaluationResult:
        """Play whole games with actions drawn uniformly."""
        rng, num_actions = self._rng("random"), len(self.action_names)
        return self.measure(lambda frame, clock: int(rng.integers(num_actions)), games, advance)

    def measure_lists(self, lists: Lists, games: int, advance: Advance) -> EvaluationResult:
        """Play whole games, each with the list of its start, or the first list if it has none."""
        policies = {key: _follow(actions) for key, actions in lists.items()}
        first = next(iter(policies.values()))
        look = 0 if ANY_START in lists else LOOK
        return self._measure(lambda start: policies.get(start.tobytes(), first), games, advance, look=look)

    def measure(self, policy: Policy, games: int, advance: Advance) -> EvaluationResult:
        """Play whole games with one policy."""
        return self._measure(lambda start: policy, games, advance)

    def _measure(self, choose: Choose, games: int, advance: Advance, *, look: int = 0) -> EvaluationResult:
        started = time.monotonic()
        played: list[GameReturn] = []
        with closing(self._make_envs("measure")) as envs:
            for ended in play_on(envs, choose, look=look):
                played += ended
                advance(len(ended))
                if len(played) >= games:
                    break
        return EvaluationResult(tuple(played[:games]), 0, time.monotonic() - started)

    def _search(
        self,
        ask: Callable[[np.ndarray], TriedList],
        steps: int,
        advance: Advance,
        *purpose: str | int,
        look: int = 0,
    ) -> None:
        """Play the lists that `ask` returns, one game each, until the steps are used up."""
        now: TriedList

        def choose(start: np.ndarray) -> Policy:
            nonlocal now
            now = ask(start)
            return _follow(now.actions)

        with closing(self._make_envs("search", *purpose)) as envs:
            for _, ended in zip(range(steps), play_on(envs, choose, look=look), strict=False):
                advance(1)
                for game in ended:
                    if game.length > look:
                        now.add(game)

    def _make_envs(self, *purpose: str | int, env: EnvConfig | None = None) -> VectorEnv:
        config = self._config if env is None else replace(self._config, env=env)
        return make_test_envs(config, 1, derive_seed(self._seed, "blind", *purpose))

    def _rng(self, *purpose: str | int) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self._seed, "blind actions", *purpose))


def play_on(envs: VectorEnv, choose: Choose, *, look: int = 0) -> Iterator[list[GameReturn]]:
    """Play game after game in the single environment, endlessly.

    Args:
        envs: one environment.
        choose: called once a game, with the frame after the first `look` steps.
        look: steps taken with the game's first action before a policy is chosen.
    Returns:
        The games that ended, after each step.
    """
    frame = envs.reset()[0]
    while True:
        clock = envs.open_games()[0].length
        if clock == look:
            policy = choose(frame)
        step = envs.step([0 if clock < look else policy(frame, clock - look)])
        frame = step.frames[0]
        yield step.game_returns


def count_starts(envs: VectorEnv) -> int:
    """The number of different frames that new games show after `LOOK` steps."""
    starts = set()
    for _ in range(START_GAMES):
        frame = envs.reset()[0]
        for _ in range(LOOK):
            frame = envs.step([0]).frames[0]
        starts.add(frame.tobytes())
    return len(starts)


def _follow(actions: Actions) -> Policy:
    """A policy that repeats a list."""
    listed = actions.tolist()
    return lambda frame, clock: listed[clock % len(listed)]

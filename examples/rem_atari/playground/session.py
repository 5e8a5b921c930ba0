"""The session of one tab: a tree of moments, each with the state of the game and of the dream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import numpy as np

from rem_atari.inference.agent import Judgement, LoadedAgent
from rem_atari.inference.dream import Dream
from rem_atari.playground.games import Game, LiveGame, Recorded
from rem_atari.replay.starts import Starts
from rem_atari.training.seeding import derive_seed

Side = Literal["game", "dream"]
"""The side that the agent sees when it chooses the action."""

MOST_MOMENTS = 2_000
"""Number of moments kept; the oldest are dropped."""


class RequestError(ValueError):
    """The page made an impossible request; the message is for the player."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GameSide:
    """The real game at a moment.

    Attributes:
        recent: its frame, the last one, and those before it, N = 1.
        judged: what the agent makes of it.
        game: the game that answers the next action.
        place: where the game stands.
        reward: the raw reward of the step that led here.
        total: rewards since the start.
        over: the game is over.
    """

    recent: Starts
    judged: Judgement
    game: Game
    place: Any
    reward: float = 0.0
    total: float = 0.0
    over: bool = False

    @property
    def frame(self) -> np.ndarray:
        """The frame, uint8 (S, S, 3)."""
        return self.recent.frames[0, -1]


@dataclass(frozen=True, kw_only=True, eq=False)
class DreamSide:
    """The dream at a moment.

    Attributes:
        dream: of one game; after its end it does not change, and its frame has no meaning.
        judged: what the agent makes of it.
        frame: its decoded tokens, uint8 (S, S, 3); at its beginning the game's frame.
        total: imagined rewards since it last saw the game.
        stands: it had already ended before the step that led here.
    """

    dream: Dream
    judged: Judgement
    frame: np.ndarray
    total: float = 0.0
    stands: bool = False

    @property
    def over(self) -> bool:
        """The dreamt game has ended."""
        return bool(self.dream.ended[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """A moment of play; its children are the futures that were tried from it.

    Attributes:
        number: counts the session's moments.
        parent: number of the moment before it; None at a start.
        step: steps since the start.
        action: the action that led here; None at a start.
        game: the real game; None if its course is unknown.
        why_unknown: the reason if `game` is None.
        dream: the dream.
    """

    number: int
    parent: int | None = None
    step: int = 0
    action: int | None = None
    game: GameSide | None
    why_unknown: str = ""
    dream: DreamSide

    @property
    def over(self) -> bool:
        """Whether no step can follow."""
        return self.dream.over and (self.game is None or self.game.over)


class Session:
    """Plays the real game and the dream with the same actions, from any of its moments.

    Args:
        agent: the agent that dreams.
        live: the real game, this session's own.
        recorded: recorded frames to start from, or None.
        seed: seed of the dreams and of the agent's actions.
    """

    def __init__(self, agent: LoadedAgent, live: LiveGame, recorded: Recorded | None, seed: int) -> None:
        self._agent = agent
        self._live = live
        self._recorded = recorded
        self._seed = seed
        self._length = agent.config.controller.context_frames + 1
        self._dreams = count()
        self._moments: dict[int, Moment] = {}
        self._futures: dict[tuple[int, int, bool], int] = {}
        self._next = 0

    @property
    def oldest(self) -> int:
        """Number of the oldest moment that is kept."""
        return max(0, self._next - MOST_MOMENTS)

    def start(self) -> Moment:
        """Begin a new game, and a dream at its first frame."""
        frame, place = self._live.start()
        return self._begin(Starts.at(frame[None]), self._live, place)

    def start_at(self, index: int) -> Moment:
        """Enter the recorded frame number `index`."""
        if self._recorded is None:
            raise RequestError("this agent comes without recorded frames; start a new game")
        if index >= len(self._recorded):
            raise RequestError(f"index is {index}; the recorded frames are 0 to {len(self._recorded) - 1}")
        recent, place = self._recorded.enter(index)
        return self._begin(recent, self._recorded, place)

    def look(self, at: int) -> Moment:
        """A copy of the moment `at` with a new dream, which begins at the game's frame."""
        moment = self._get(at)
        if moment.game is None or moment.game.over:
            raise RequestError("there is no game here that the dream could be shown")
        return self._keep(replace(moment, dream=self._fall_asleep(moment.game)))

    def step(self, at: int, action: int | Side, *, likely: bool, anew: bool) -> Moment:
        """Take one step from the moment `at`, in the game and in the dream, unless they are over.

        The same step from the same moment returns the existing moment, unless `anew` is set.

        Args:
            at: number of the moment.
            action: an action, or the side that the agent sees when it chooses one.
            likely: take the most likely outcome in the dream instead of a draw.
            anew: draw the dream's step with another seed.
        """
        moment = self._get(at)
        if moment.over:
            raise RequestError("game and dream are over; go back, or start a new game")
        if not isinstance(action, int):
            action = self._choose(moment, action)
        elif action >= self._agent.num_actions:
            raise RequestError(f"action is {action}; wanted 0 to {self._agent.num_actions - 1}")
        known = self._futures.get((at, action, likely))
        if known in self._moments and not anew:
            return self._moments[known]
        game, why_unknown = self._play(moment, action)
        after = self._keep(
            Moment(
                number=0,
                parent=at,
                step=moment.step + 1,
                action=action,
                game=game,
                why_unknown=why_unknown,
                dream=self._imagine(moment.dream, action, likely=likely, anew=anew),
            )
        )
        self._futures[at, action, likely] = after.number
        return after

    def path(self, at: int) -> list[Moment]:
        """The moments from the oldest one kept to `at`."""
        path = [self._get(at)]
        while (parent := path[-1].parent) is not None and parent in self._moments:
            path.append(self._moments[parent])
        return path[::-1]

    def close(self) -> None:
        """Close the game."""
        self._live.close()

    def _begin(self, recent: Starts, game: Game, place: Any) -> Moment:
        memory = self._agent.remember(recent, seed=self._seed)
        judged = self._agent.judge(recent.frames[:, -1], memory)
        side = GameSide(recent=recent, judged=judged, game=game, place=place)
        return self._keep(Moment(number=0, game=side, dream=self._fall_asleep(side)))

    def _fall_asleep(self, game: GameSide) -> DreamSide:
        dream = self._agent.dream(game.recent, seed=self._new_seed())
        return DreamSide(dream=dream, judged=game.judged, frame=game.frame)

    def _new_seed(self) -> int:
        return derive_seed(self._seed, "dream", next(self._dreams))

    def _choose(self, moment: Moment, side: Side) -> int:
        """The agent's action by one side, or by the other if that one is over."""
        game = moment.game
        sees_game = game is not None and not game.over and (side == "game" or moment.dream.over)
        return int(self._agent.choose(game.judged if sees_game else moment.dream.judged)[0])

    def _play(self, moment: Moment, action: int) -> tuple[GameSide | None, str]:
        before = moment.game
        if before is None:
            return None, moment.why_unknown
        if before.over:
            return replace(before, reward=0.0), ""
        answer = before.game.step(before.place, action)
        if answer is None:
            return None, before.game.why_unknown
        memory = self._agent.observe_action(action, before.judged.memory)
        return GameSide(
            recent=before.recent.after([action], answer.frame[None], self._length),
            judged=self._agent.judge(answer.frame, memory),
            game=before.game,
            place=answer.place,
            reward=answer.reward,
            total=before.total + answer.reward,
            over=answer.over,
        ), ""

    def _imagine(self, before: DreamSide, action: int, *, likely: bool, anew: bool) -> DreamSide:
        if before.over:
            return replace(before, stands=True)
        dream = before.dream.with_seed(self._new_seed()) if anew else before.dream
        dream = self._agent.imagine(dream, action, temperature=0.0 if likely else 1.0)
        memory = self._agent.observe_action(action, before.judged.memory)
        return DreamSide(
            dream=dream,
            judged=self._agent.judge(dream, memory),
            frame=self._agent.decode(dream.tokens)[0],
            total=before.total + float(dream.rewards[0]),
        )

    def _get(self, number: int) -> Moment:
        if number not in self._moments:
            raise RequestError(f"there is no moment {number}, or it is forgotten: {MOST_MOMENTS} are kept")
        return self._moments[number]

    def _keep(self, moment: Moment) -> Moment:
        moment = replace(moment, number=self._next)
        self._moments[moment.number] = moment
        self._next += 1
        self._moments.pop(self.oldest - 1, None)
        return moment

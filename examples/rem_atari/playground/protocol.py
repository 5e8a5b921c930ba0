"""The protocol between page and server: JSON objects; each request is answered once, in order.

===========================================================  ============================================
request                                                      answer
===========================================================  ============================================
``{"do": "start"}``                                          ``{"moment": ...}``: a new game
``{"do": "start_at", "index": 3}``                           ``{"moment": ...}``: at a recorded frame
``{"do": "look", "at": 7}``                                  ``{"moment": ...}``: its dream sees the game
``{"do": "step", "at": 7, "action": 2, "likely": false,      ``{"moment": ...}``: what follows; action
"anew": false}``                                             "game" or "dream" is the agent's at its sight
``{"do": "frames", "first": 0, "count": 12}``                ``{"frames": [...]}``: recorded ones
``{"do": "film", "at": 7, "format": "gif"}``                 ``{"film": name}``, then the file's bytes
===========================================================  ============================================

An impossible request is answered by ``{"error": sentence}``, and the connection stays open.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from torch.nn import functional

from rem_atari.films.pictures import data_uri
from rem_atari.inference.agent import Judgement
from rem_atari.playground.session import DreamSide, GameSide, Moment, RequestError, Side

MOST_FRAMES = 64
"""Recorded frames in one answer."""

LARGEST = 2**53
"""JavaScript's whole numbers are below this."""

Format = Literal["gif", "mp4"]


@dataclass(frozen=True)
class StartRequest:
    """Begin a new game."""


@dataclass(frozen=True)
class StartAtRequest:
    """Enter the recording at frame number `index`."""

    index: int

    def __post_init__(self) -> None:
        _check_whole("index", self.index)


@dataclass(frozen=True)
class LookRequest:
    """Show the dream the game of moment `at`."""

    at: int

    def __post_init__(self) -> None:
        _check_whole("at", self.at)


@dataclass(frozen=True)
class StepRequest:
    """Take an action from moment `at`: a given one, or the agent's for what it sees on a side."""

    at: int
    action: int | Side
    likely: bool
    anew: bool

    def __post_init__(self) -> None:
        _check_whole("at", self.at)
        if not isinstance(self.action, str):
            _check_whole("action", self.action)
        elif self.action not in get_args(Side):
            raise RequestError(f"action is {self.action[:20]!r}; wanted a number, 'game' or 'dream'")
        if not isinstance(self.likely, bool) or not isinstance(self.anew, bool):
            raise RequestError("likely and anew are true or false")


@dataclass(frozen=True)
class FramesRequest:
    """Show `count` recorded frames from number `first` on."""

    first: int
    count: int

    def __post_init__(self) -> None:
        _check_whole("first", self.first)
        _check_whole("count", self.count, most=MOST_FRAMES)


@dataclass(frozen=True)
class FilmRequest:
    """Make a film of what was played up to moment `at`."""

    at: int
    format: Format

    def __post_init__(self) -> None:
        _check_whole("at", self.at)
        if self.format not in get_args(Format):
            raise RequestError("format is neither 'gif' nor 'mp4'")


Request = StartRequest | StartAtRequest | LookRequest | StepRequest | FramesRequest | FilmRequest

REQUESTS: dict[str, type[Request]] = {
    "start": StartRequest,
    "start_at": StartAtRequest,
    "look": LookRequest,
    "step": StepRequest,
    "frames": FramesRequest,
    "film": FilmRequest,
}


def parse_request(text: str) -> Request:
    """The request in a message of the page.

    Raises:
        RequestError: it is no valid request; the message says what was wanted.
    """
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, dict) or not isinstance(words.get("do"), str):
        raise RequestError('a request is a JSON object such as {"do": "start"}')
    kind = REQUESTS.get(words.pop("do"))
    if kind is None:
        raise RequestError(f"do is none of {', '.join(REQUESTS)}")
    names = {field.name for field in fields(kind)}
    if names != words.keys():
        raise RequestError(f"this request has the fields {', '.join(['do', *sorted(names)])}, all of them")
    return kind(**words)


def describe(moment: Moment, oldest: int, temperature: float) -> dict[str, Any]:
    """A moment as JSON data.

    Args:
        moment: of a session.
        oldest: number of the oldest moment that the session keeps.
        temperature: of the agent's actions, for their chances.
    """
    return {
        "moment": {
            "number": moment.number,
            "parent": moment.parent,
            "step": moment.step,
            "action": moment.action,
            "game": None if moment.game is None else _describe_game(moment.game, temperature),
            "why_unknown": moment.why_unknown,
            "dream": _describe_dream(moment.dream, temperature),
        },
        "oldest": oldest,
    }


def _describe_game(side: GameSide, temperature: float) -> dict[str, Any]:
    return {
        **_describe_view(side.frame, side.judged, temperature),
        "reward": side.reward,
        "total": side.total,
        "over": side.over,
    }


def _describe_dream(side: DreamSide, temperature: float) -> dict[str, Any]:
    dream = side.dream
    foretold = dream.steps > 0 and not side.stands
    return {
        **_describe_view(side.frame, side.judged, temperature),
        "steps": dream.steps,
        "reward": float(dream.rewards[0]) if foretold else 0.0,
        "total": side.total,
        "over": side.over,
        "reward_chances": dream.reward_chances[0].tolist() if foretold else None,
        "end_chance": float(dream.end_chances[0]) if foretold else None,
    }


def _describe_view(frame: np.ndarray, judged: Judgement, temperature: float) -> dict[str, Any]:
    return {
        "frame": data_uri(frame),
        "tokens": judged.tokens[0].tolist(),
        "policy": _chances(judged, temperature),
        "value": float(judged.values[0]),
    }


def _chances(judged: Judgement, temperature: float) -> list[float]:
    """Chances of the actions at a temperature."""
    logits = judged.logits[0]
    if temperature == 0:
        return functional.one_hot(logits.argmax(), len(logits)).float().tolist()
    return (logits / temperature).softmax(dim=-1).tolist()


def _check_whole(name: str, value: object, most: int = LARGEST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise RequestError(f"{name} is no whole number from 0 to {most}")

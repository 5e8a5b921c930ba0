"""The results of `rem-atari blind`, and the criterion for an agent that has learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rem_atari.evaluation import describe_mean
from rem_atari.report.history import Returns
from rem_atari.runs.reading import is_number, read_json

SCHEMA = 1
"""Version of the file; docs/evaluating.md tells what is in it."""

BLIND_POLICIES = {
    "random": "random play",
    "constant": "best constant action",
    "list": "best list of actions",
    "list_by_start": "best list of actions for each start",
    "copied_by_start": "the script's actions for each start",
}
"""Policies that see nothing, or only which of a few starts it is, with their names. The last repeats the
scripted player's actions after that start in an undisturbed game."""

SCRIPTED = "scripted"
"""A player that sees the game and knows its rules: no rival, but an upper bound."""

POLICY_NAMES = BLIND_POLICIES | {SCRIPTED: "scripted player, which sees"}

CLEAR = 3.0
"""An agent has learned if its mean return is above the best blind policy's by so many standard errors."""


@dataclass(frozen=True)
class Rivals:
    """Mean returns of the policies that were measured, by their names, in the order of `POLICY_NAMES`.

    Attributes:
        returns: of each, over games.
        search_steps: environment steps that each search took.
        data: the whole file.
    """

    returns: Mapping[str, Returns]
    search_steps: int
    data: Mapping[str, Any]

    @property
    def best_blind(self) -> str:
        """Name of the blind policy with the highest mean return."""
        blind = [name for name in self.returns if name in BLIND_POLICIES]
        return max(blind, key=lambda name: self.returns[name].mean)


def read_rivals(path: Path) -> Rivals | None:
    """The results in the file of `rem-atari blind`; None if it is missing or not whole."""
    data = read_json(path)
    if data is None or data.get("schema") != SCHEMA or not is_number(data.get("search_steps")):
        return None
    policies = data.get("policies")
    if not isinstance(policies, dict):
        return None
    returns = {name: _returns(policies[name]) for name in POLICY_NAMES if name in policies}
    known = {name: found for name, found in returns.items() if found is not None}
    if len(known) < len(returns) or not known.keys() & BLIND_POLICIES.keys():
        return None
    return Rivals(known, int(data["search_steps"]), data)


def _returns(policy: Any) -> Returns | None:
    if not isinstance(policy, dict):
        return None
    mean, error, games = (policy.get(name) for name in ("mean_return", "standard_error", "games"))
    if not is_number(mean) or not is_number(games) or not (error is None or is_number(error)):
        return None
    return Returns(mean=mean, standard_error=error, episodes=int(games))


def learned_sentence(agent: Returns, rivals: Rivals) -> str:
    """A sentence that compares the agent of one run with the best policy that sees nothing."""
    blind = rivals.returns[rivals.best_blind]
    mean = describe_mean(blind.mean, blind.standard_error)
    verdict = {
        True: "The agent's is above it by three standard errors, over games of this one run: it has learned.",
        False: "The agent's is not above it by three standard errors, over games of this one run.",
        None: "Whether the agent's is clearly above it cannot be said: a standard error is missing.",
    }[has_learned(agent, rivals)]
    return (
        f"Of the policies that see nothing the best is {POLICY_NAMES[rivals.best_blind]}: mean return"
        f" {mean} over {blind.episodes} games. {verdict}"
    )


def has_learned(agent: Returns, rivals: Rivals) -> bool | None:
    """Whether the agent is clearly above the best blind policy; None where a standard error is unknown."""
    blind = rivals.returns[rivals.best_blind]
    if agent.standard_error is None or blind.standard_error is None:
        return None
    gap = agent.mean - blind.mean
    return gap > 0 and gap > CLEAR * math.hypot(agent.standard_error, blind.standard_error)

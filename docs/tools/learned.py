"""Whether the agents of an experiment have learned: above the best policy that sees nothing, or not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from raw_results import Experiment

from rem_atari.report.history import Returns
from rem_atari.report.rivals import POLICY_NAMES, has_learned
from rem_atari.runs.session import short_commit

VERDICTS = {True: "yes", False: "**no**", None: "–"}


@dataclass(frozen=True)
class Agents:
    """The mean return of an experiment's agents without its variants, and the samples of its error."""

    returns: Returns
    over: str


def agents_of(experiment: Experiment) -> Agents | None:
    """The mean over seeds, with its standard error over seeds; of a single seed over its games."""
    found = [result.agent for result in experiment.results if not result.variant and result.agent is not None]
    if not found:
        return None
    if len(found) == 1:
        return Agents(found[0], f"{found[0].episodes} games of one seed")
    means = [each.mean for each in found]
    error = statistics.stdev(means) / math.sqrt(len(means))
    episodes = sum(each.episodes for each in found)
    mean = Returns(mean=statistics.fmean(means), standard_error=error, episodes=episodes)
    return Agents(mean, f"{len(means)} seeds")


def learned_page_part(experiments: Sequence[Experiment]) -> str:
    """A table of all games whose blind policies were measured, and how they were; empty if there is none."""
    lines, commands = [], []
    for experiment in experiments:
        rivals, agents = experiment.rivals, agents_of(experiment)
        if rivals is None or agents is None:
            continue
        cells = [_returns(rivals.returns.get(name)) for name in POLICY_NAMES]
        verdict = VERDICTS[has_learned(agents.returns, rivals)]
        lines.append([experiment.title, f"{_returns(agents.returns)}, {agents.over}", *cells, verdict])
        games = rivals.returns["random"].episodes
        commands.append(
            f"- {experiment.title}: `{rivals.data.get('command')}`, commit"
            f" {short_commit(rivals.data.get('commit'))}, {games} games a policy"
        )
    if not lines:
        return ""
    titles = ["game", "agent", *POLICY_NAMES.values(), "learned"]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *lines])
    return f"{table}\n\n" + "\n".join(commands) + "\n"


def _returns(found: Returns | None) -> str:
    if found is None:
        return "–"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.2f}"
    return f"{found.mean:.2f}{error}"

"""``rem-atari retrain RUN``: a fresh controller in the dreams of a run that is kept as it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from rem_atari.agent import Agent
from rem_atari.arguments import RetrainArguments
from rem_atari.commands.counting import counting, tell
from rem_atari.commands.tables import format_table
from rem_atari.config import Config
from rem_atari.errors import UsageError
from rem_atari.evaluation import describe_mean, evaluate, playing_conditions
from rem_atari.replay.buffer import Replay
from rem_atari.runs.trained import load_trained
from rem_atari.training.component import Component
from rem_atari.training.controller_phase import ControllerPhase
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import check_config
from rem_atari.training.token_cache import TokenCache

SHOWN = ("imagined_return", "entropy", "value", "grad_norm")
"""Metrics of the controller's updates that say whether it learns."""

ROWS = 6
"""Rows of the table, each the means of as many updates."""


def retrain(arguments: RetrainArguments) -> None:
    """Train a fresh controller, let it play, and print what came of both; nothing is written.

    Raises:
        UsageError: a value is out of its range, or there is no such run, checkpoint, replay or device.
        RunError: no checkpoint can be used, or the replay cannot be read.
    """
    _check(arguments)
    trained = load_trained(arguments.run, step=arguments.step, device=arguments.device, say=tell)
    config = replace(trained.config, controller=arguments.controller)
    check_config(config)
    folder = trained.run.replay
    if not folder.is_dir():
        raise UsageError(f"{arguments.run} has no replay, which dreams begin in; name the folder of a run")
    replay = Replay.load(folder, seed=derive_seed(arguments.seed, "replay"))
    torch.manual_seed(derive_seed(arguments.seed, "controller"))
    agent = trained.agent
    fresh = Agent.from_config(config, agent.controller.num_actions)
    agent.controller = fresh.controller.to(config.device)
    rows = list(_learn(agent, replay, config, arguments))
    print(format_table(("updates", "seconds", *SHOWN), rows, text_columns=0))
    if arguments.games > 0:
        print(_play(agent, playing_conditions(config), arguments))


def _check(arguments: RetrainArguments) -> None:
    if arguments.updates < ROWS:
        raise UsageError(f"--updates is {arguments.updates}, wanted at least {ROWS}")
    for flag, value in (("--games", arguments.games), ("--seed", arguments.seed)):
        if value < 0:
            raise UsageError(f"{flag} is {value}, wanted at least 0")


def _learn(agent: Agent, replay: Replay, config: Config, arguments: RetrainArguments) -> Iterator[list[str]]:
    """Make the updates; a row of the table for each sixth of them."""
    generator = torch.Generator(config.device).manual_seed(derive_seed(arguments.seed, "imagination"))
    component = Component("controller", agent.controller, config.controller.optim, precision=config.precision)
    tokens = TokenCache(replay, agent.tokenizer)
    phase = ControllerPhase(agent.eval(), component, replay, tokens, config.controller, generator, tell)
    if not phase.prepare(0):
        raise UsageError(f"the replay of {arguments.run} has no episode that is long enough to dream from")
    agent.controller.train()
    started, found = time.monotonic(), []
    ends = {arguments.updates * row // ROWS for row in range(1, ROWS + 1)}
    with counting("training", arguments.updates, "updates") as advance:
        for done in range(1, arguments.updates + 1):
            found.append({name: float(value) for name, value in phase.update().items()})
            advance(1)
            if done in ends:
                means = [f"{statistics.fmean(update[name] for update in found):.3g}" for name in SHOWN]
                yield [str(done), f"{time.monotonic() - started:.0f}", *means]
                found = []
    component.settle()
    agent.controller.eval()


def _play(agent: Agent, config: Config, arguments: RetrainArguments) -> str:
    with counting("playing", arguments.games, "games") as advance:
        result = evaluate(
            agent,
            config,
            episodes=arguments.games,
            seed=derive_seed(arguments.seed, "evaluate"),
            after_step=lambda ended: advance(ended) if ended else None,
        )
    mean = describe_mean(result.mean, result.standard_error)
    return f"mean return {mean} over {arguments.games} games at temperature {config.evaluation.temperature:g}"

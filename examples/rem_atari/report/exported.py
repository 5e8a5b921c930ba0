"""The report of an exported agent, which has no recorded games: some are played for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rem_atari.evaluation import EvaluationResult, evaluate, evaluate_random, playing_conditions
from rem_atari.replay.buffer import Replay
from rem_atari.report.contents import RunData
from rem_atari.report.history import MetricLine, read_lines
from rem_atari.report.page import write_page
from rem_atari.runs.durable import make_writable
from rem_atari.runs.trained import TrainedAgent
from rem_atari.training.seeding import derive_seed

STEPS_KEPT = 12_000
"""Steps of either player's games by which the networks are measured."""


def write_agent_report(
    trained: TrainedAgent, name: str, games: int, *, advance: Callable[[int], None]
) -> Path:
    """Write the report of an exported agent, after games of the agent and of random play.

    The agent's games take the place of a run's held-out steps, and those of random play the place of its
    training steps, on which the rivals of the comparisons are fitted.

    Args:
        trained: the agent; the page goes where results about it belong.
        name: what commands take for it.
        games: games of each of the two.
        advance: called with the number of games that ended.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: what was measured in training is damaged.
        RunError: a game fails.
        OSError: the report cannot be written.
    """
    notes = [
        f"An exported agent: {games} games each of it and of random play were played for this page, and"
        " the networks are measured on them. Curves, times and configuration are those of its training."
    ]
    lines = [] if trained.metrics is None else read_lines(trained.metrics, notes)
    make_writable(trained.run.media)
    config = playing_conditions(trained.config)
    side = config.env.frame_size
    random_steps, agent_steps = (Replay((side, side, 3), STEPS_KEPT, seed=config.seed) for _ in range(2))
    random = evaluate_random(
        trained.agent,
        config,
        episodes=games,
        seed=derive_seed(config.seed, "report", 0),
        heldout=random_steps,
        after_step=advance,
    )
    played = evaluate(
        trained.agent,
        config,
        episodes=games,
        seed=derive_seed(config.seed, "report", 1),
        heldout=agent_steps,
        after_step=advance,
    )
    return write_page(
        RunData(
            folder=trained.run,
            name=name,
            config=trained.config,
            lines=[
                *lines,
                _line(trained, "random", random),
                _line(trained, "evaluate", played) | {"final": 1},
            ],
            step=trained.step,
            agent=trained.agent,
            state=trained.state,
            training=random_steps,
            heldout=agent_steps,
            notes=notes,
            edits={},
        )
    )


def _line(trained: TrainedAgent, phase: str, result: EvaluationResult) -> MetricLine:
    """A line such as a run's metrics.jsonl has, for games of the trained agent or beside it."""
    epochs = {} if trained.epoch is None else {"epoch": max(trained.epoch - 1, 0)}
    steps = {} if trained.env_steps is None else {"env_steps": trained.env_steps}
    return {**epochs, **steps, "phase": phase, **result.metrics()}

"""The model card of an exported agent, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.envs import env_name
from rem_atari.evaluation import describe_mean
from rem_atari.runs.session import train_command
from rem_atari.runs.trained import TrainedAgent

EXAMPLE = """\
```python
import rem_atari

agent = rem_atari.load_agent("path/to/this/folder")
env, memory = agent.make_env(), agent.start()
frame, _ = env.reset(seed=0)
action, memory = agent.act(frame, memory)  # play the game
dream = rem_atari.DreamEnv(agent)  # or play in the dream
```"""


def model_card(trained: TrainedAgent, figures: Mapping[str, Any]) -> str:
    """The model card: a description of the agent, its returns, and its training.

    Args:
        trained: the agent as it is exported.
        figures: of "agent" and "random_play" the mean, standard_error and episodes, as far as they were
            measured.
    """
    config = trained.config
    side = config.env.frame_size
    weights = sum(parameter.numel() for parameter in trained.agent.parameters())
    rows = {
        "game": f"{config.env.id or config.env.game}, frames of {side} x {side} pixels",
        "actions": ", ".join(trained.action_names),
        "trained": f"{_number(trained.env_steps)} environment steps, {_number(trained.epoch)} epochs",
        "parameters": f"{weights:,}",
        "world model": _world_model(config),
        "made with": f"`{train_command(config, PRESETS.get(config.preset))}`",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return (
        f"# A REM agent that plays {env_name(config.env)}\n\n{_result(figures, config)}\n\n"
        f"|  |  |\n| --- | --- |\n{table}\n\n{EXAMPLE}\n"
    )


def _result(figures: Mapping[str, Any], config: Config) -> str:
    agent, random = figures.get("agent"), figures.get("random_play")
    if agent is None:
        return "It was not measured."
    text = (
        f"Mean return {describe_mean(agent['mean'], agent['standard_error'])} over"
        f" {agent['episodes']} games at temperature {config.evaluation.temperature:g}"
    )
    if random is None:
        return f"{text}."
    mean = describe_mean(random["mean"], random["standard_error"])
    return f"{text}; random play: {mean} over {random['episodes']} games."


def _number(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"


def _world_model(config: Config) -> str:
    rewards = "sizes" if config.world_model.reward_bins > 0 else "signs"
    return (
        f"POP on RetNet, knows the {rewards} of rewards"
        if config.world_model.pop
        else (f"RetNet, token by token, knows the {rewards} of rewards")
    )

"""``rem-atari blind``: the returns of policies that see nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rem_atari.arguments import DEFAULT_PRESET, BlindArguments
from rem_atari.commands.counting import counting
from rem_atari.commands.tables import format_table
from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.config.reading import flatten
from rem_atari.envs import env_name
from rem_atari.errors import UsageError
from rem_atari.evaluation import EvaluationResult, describe_mean, playing_conditions
from rem_atari.play.blind import MOST_STARTS, BlindPlay, Lists
from rem_atari.play.scripted import scripted_player
from rem_atari.report.history import last_value
from rem_atari.report.rivals import POLICY_NAMES, SCHEMA, SCRIPTED
from rem_atari.runs.command_line import command_line
from rem_atari.runs.durable import replace_file
from rem_atari.runs.folder import open_run_folder
from rem_atari.runs.reading import read_json_lines
from rem_atari.runs.session import changed_flags, describe_session
from rem_atari.training.schedule import replay_capacity
from rem_atari.training.setup import check_config


def blind(arguments: BlindArguments) -> None:
    """Search, measure, write the results, and print a table.

    Raises:
        UsageError: a value is out of its range, or there is no such run or game.
    """
    config, steps, out = _choose(arguments)
    try:
        play = BlindPlay(config, seed=arguments.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    policies = measure_policies(play, config, steps=steps, games=arguments.games)
    data = {
        "schema": SCHEMA,
        "command": blind_command(config, steps=steps, games=arguments.games, seed=arguments.seed),
        "game": env_name(config.env),
        "seed": arguments.seed,
        "search_steps": steps,
        "action_names": play.action_names,
        "policies": policies,
        "env": asdict(config.env),
        **{key: value for key, value in describe_session("cpu").items() if key in ("commit", "versions")},
    }
    print(describe(data))
    if out is not None:
        replace_file(out, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
        print(f"written: {out}")


def _choose(arguments: BlindArguments) -> tuple[Config, int, Path | None]:
    """The game and its conditions, the steps of a search, and the file to write."""
    for name, least in (("games", 2), ("steps", 2), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} is {value}, wanted at least {least}")
    if arguments.run is None:
        preset = PRESETS[arguments.preset]
        config = replace(preset, env=arguments.env)
        steps, out = replay_capacity(config), arguments.out
    else:
        if arguments.preset != DEFAULT_PRESET or arguments.env != PRESETS[arguments.preset].env:
            raise UsageError(f"{arguments.run} has its own game: leave out --preset and --env, or the run")
        run = open_run_folder(arguments.run)
        config = run.load_config()
        collected = last_value(read_json_lines(run.metrics)[0], "env_steps")
        steps, out = int(collected or replay_capacity(config)), arguments.out or run.blind
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"{out} cannot be written: there is no folder {out.parent}")
    config = replace(playing_conditions(config), device="cpu")  # no network plays
    check_config(config)
    return config, arguments.steps or steps, out


def blind_command(config: Config, *, steps: int, games: int, seed: int) -> str:
    """The command line that measures the same, without a run."""
    preset = PRESETS.get(config.preset, PRESETS[DEFAULT_PRESET])
    settings, base = (flatten({"env": asdict(each.env)}) for each in (config, preset))
    always = () if config.env.id is not None else ("env.game",)
    bounds = ["--steps", str(steps), "--games", str(games), "--seed", str(seed)]
    flags = ["--preset", preset.preset, *changed_flags(settings, base, always), *bounds]
    return command_line(config.env, ["blind", *flags])


def measure_policies(play: BlindPlay, config: Config, *, steps: int, games: int) -> dict[str, dict[str, Any]]:
    """Every policy by its name (`rivals.POLICY_NAMES`) as JSON data."""

    def measuring(name: str) -> AbstractContextManager[Callable[[int], None]]:
        return counting(f"playing: {POLICY_NAMES[name]}", games, "games")

    with measuring("random") as advance:
        policies = {"random": _as_data(play.measure_random(games, advance))}
    searches = {"constant": play.find_constant, "list": play.find_lists}
    if 1 < play.num_starts <= MOST_STARTS:
        searches["list_by_start"] = partial(play.find_lists, by_start=True)
    for name, find in searches.items():
        with counting(f"searching: {POLICY_NAMES[name]}", steps, "steps") as advance:
            lists = find(steps, advance)
        with measuring(name) as advance:
            policies[name] = _as_data(play.measure_lists(lists, games, advance), lists)
    player = scripted_player(config.env, play.action_names)
    if player is not None and play.num_starts <= MOST_STARTS:
        lists = play.copy_lists(player)
        with measuring("copied_by_start") as advance:
            policies["copied_by_start"] = _as_data(play.measure_lists(lists, games, advance), lists)
    if player is not None:
        with measuring(SCRIPTED) as advance:
            policies[SCRIPTED] = _as_data(play.measure(player, games, advance))
    return policies


def _as_data(result: EvaluationResult, lists: Lists | None = None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "games": len(result.games),
        "mean_return": result.mean,
        "standard_error": result.standard_error,
        "steps": sum(result.lengths),
    }
    if lists is not None:
        data["lists"] = [" ".join(map(str, actions)) for actions in lists.values()]
    return data


def describe(data: Mapping[str, Any]) -> str:
    """The policies as a table."""
    rows = [
        [
            POLICY_NAMES[name],
            _in_words(policy.get("lists", []), data["action_names"]),
            describe_mean(policy["mean_return"], policy["standard_error"]),
            f"{policy['games']:,}",
        ]
        for name, policy in data["policies"].items()
    ]
    return (
        f"{data['game']}: {data['search_steps']:,} environment steps a search, seed {data['seed']}\n\n"
        f"{format_table(['policy', 'plays', 'mean return', 'games'], rows, text_columns=2)}\n\n"
        "Errors are standard errors over games. An agent has learned where its mean return is above that of\n"
        "the best policy that sees nothing by three standard errors."
    )


def _in_words(lists: list[str], action_names: list[str]) -> str:
    """A constant action by its name; lists by their lengths."""
    lengths = [len(actions.split()) for actions in lists]
    if lengths == [1]:
        return action_names[int(lists[0])]
    return f"{', '.join(map(str, lengths))} actions, again and again" if lengths else ""

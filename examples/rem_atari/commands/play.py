"""``rem-atari play RUN``: the page on which a person plays in the agent's dream."""

from __future__ import annotations

import threading
import webbrowser
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from rem_atari.arguments import PlayArguments
from rem_atari.commands.counting import tell
from rem_atari.commands.evaluate import film_fps
from rem_atari.config import Config
from rem_atari.envs import env_name
from rem_atari.errors import RunError, UsageError
from rem_atari.evaluation import playing_conditions
from rem_atari.inference.agent import LoadedAgent
from rem_atari.inference.loading import MOST_STARTS, load_starts, start_length
from rem_atari.playground.games import KeptStarts, LiveGame, Recorded, ReplayedGames
from rem_atari.playground.server import Stage, address_of, listen, make_server
from rem_atari.replay.buffer import Replay
from rem_atari.replay.shards import has_shards
from rem_atari.report.history import Returns, returns_of
from rem_atari.report.summary import agent_sentence
from rem_atari.runs.exported import is_exported, read_about
from rem_atari.runs.reading import is_number, read_json_lines
from rem_atari.runs.trained import TrainedAgent, load_trained
from rem_atari.training.seeding import derive_seed
from rem_atari.training.setup import check_config

LOCAL = ("127.0.0.1", "localhost", "::1")


def play(arguments: PlayArguments) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UsageError: a value is out of its range, there is no such run, or the port is taken.
        RunError: no checkpoint can be used.
    """
    if arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}, wanted at least 0")
    if arguments.port is not None and not 0 <= arguments.port < 65_536:
        raise UsageError(f"--port is {arguments.port}, wanted 0 to 65535")
    trained = load_trained(arguments.run, step=arguments.step, device=arguments.device, say=tell)
    stage = make_stage(trained, name=str(arguments.run), seed=arguments.seed)
    with listen(arguments.host, arguments.port) as listening:
        address = address_of(listening, arguments.host)
        print(f"play at {address}; Ctrl-C ends it", flush=True)
        if arguments.host not in LOCAL:
            tell("warning: other machines can reach this page and play")
        if arguments.browser:
            threading.Thread(target=_open_page, args=(address,), daemon=True).start()
        with suppress(KeyboardInterrupt):
            make_server(stage, arguments.host).run(sockets=[listening])
    print("ended")


def make_stage(trained: TrainedAgent, *, name: str, seed: int) -> Stage:
    """The data that all tabs of the page share.

    Args:
        trained: the agent.
        name: the name by which it was loaded.
        seed: seed of the games.
    """
    config = playing_conditions(trained.config, num_envs=1)
    check_config(config)
    starts = partial(load_starts, trained, MOST_STARTS)
    agent = LoadedAgent(replace(trained, config=config), name=name, load_starts=starts)
    recorded = _find_recorded(trained, agent)
    fps = film_fps(config)
    about = {
        "game": env_name(config.env),
        "actions": list(agent.action_names),
        "fps": fps,
        "agent": agent_sentence(*_returns_of(trained)),
        "recorded": 0 if recorded is None else len(recorded),
        "command": f"rem-atari play {name}",
    }
    open_game = partial(_open_game, config, seed)
    trial = open_game(0)
    trial.start()  # report a game that cannot be played now
    trial.close()
    return Stage(agent=agent, recorded=recorded, open_game=open_game, about=about, fps=fps)


def _returns_of(trained: TrainedAgent) -> tuple[Returns | None, Returns | None]:
    """Returns of the agent and of random play, as far as the run or the exported agent has them."""
    if is_exported(trained.source):
        figures = read_about(trained.source)["figures"]
        return _figure(figures.get("agent")), _figure(figures.get("random_play"))
    lines, _ = read_json_lines(trained.run.metrics)
    return returns_of(lines, "evaluate"), returns_of(lines, "random")


def _figure(figure: Any) -> Returns | None:
    """Returns in the file of an exported agent, which is not trusted: anyone may have written it."""
    names = ("mean", "standard_error", "episodes")
    if not isinstance(figure, dict) or not all(is_number(figure.get(name)) for name in names):
        return None
    return Returns(
        mean=figure["mean"], standard_error=figure["standard_error"], episodes=int(figure["episodes"])
    )


def _open_game(config: Config, seed: int, number: int) -> LiveGame:
    return LiveGame(config, derive_seed(seed, "play", number))


def _find_recorded(trained: TrainedAgent, agent: LoadedAgent) -> Recorded | None:
    """The run's replay, or the frames that come with the agent; None, and a line on stderr, if neither is."""
    try:
        if is_exported(trained.source):
            return KeptStarts(agent.starts)
        if not has_shards(trained.run.replay):
            tell(f"no recorded frames to start from: {trained.run.replay} holds no replay")
            return None
        return ReplayedGames(Replay.load(trained.run.replay), start_length(trained.config))
    except (RunError, ValueError, OSError) as error:
        tell(f"no recorded frames to start from: {error}")
        return None


def _open_page(address: str) -> None:
    """Open the page in a browser with a window; one in the terminal would write over this program."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if type(browser) is not webbrowser.GenericBrowser:
        browser.open(address)

"""``rem-atari list``: the games, the presets and the agents that come with the package."""

from __future__ import annotations

from importlib.util import find_spec

from rem_atari.arguments import ListArguments
from rem_atari.commands.tables import format_table
from rem_atari.config import Config
from rem_atari.config.presets import CATCH8_ID, CATCH_ID, PRESETS
from rem_atari.scores.published import atari100k_games

PURPOSES = {
    "debug": ("seconds", "runs every part at toy sizes; learns nothing"),
    "tiny": ("4 minutes", "the whole agent on a real Atari game, as much as a CPU bears; learns little"),
    "catch": ("4 minutes", "learns a small game from nothing to nearly perfect"),
    "minatar": ("under an hour", "learns MinAtar's small games; Breakout unless env.id says otherwise"),
    "small": ("about an hour", "learns Krull, a real Atari game, on one core"),
    "paper": ("days on a CPU", "the published agent; wants a GPU, and `rem-atari weights` once before it"),
}
"""Approximate time of each preset on two CPU cores, and its purpose."""


def list_everything(arguments: ListArguments) -> None:
    """Print the presets, the games, or everything."""
    if arguments.what == "presets":
        print("\n".join(PRESETS))
    elif arguments.what == "games":
        print("\n".join(_game_flags()))
    else:
        print(_overview())


def _game_flags() -> list[str]:
    """The flags of `rem-atari train` that select each game."""
    from rem_atari import envs

    return [f"--env.game {game}" for game in envs.list_games()] + [f"--env.id {name}" for name in _ids()]


def _ids() -> list[str]:
    """Games with gymnasium ids: those of this package and, if it is installed, of MinAtar."""
    from rem_atari.envs.minatar import GAMES, NAMESPACE

    minatar = [f"{NAMESPACE}{game}-v1" for game in GAMES] if find_spec("minatar") else []
    return [CATCH_ID, CATCH8_ID, *minatar]


def _overview() -> str:
    from rem_atari import envs
    from rem_atari.runs.trained import list_bundled

    rows = [[name, _default_game(config), *PURPOSES[name]] for name, config in PRESETS.items()]
    presets = format_table(["preset", "game", "time on 2 cores", "what for"], rows, text_columns=4)
    known = set(atari100k_games())
    games = [f"{game}{'*' if game in known else ''}" for game in envs.list_games()]
    minatar = (
        "" if find_spec("minatar") else "\n  (MinAtar's games are not here: pip install 'retpop[minatar]')"
    )
    ids = "\n".join(f"  {name}" for name in _ids())
    agents = "\n".join(f"  {name}" for name in list_bundled())
    return (
        "Presets (rem-atari train --preset NAME; rem-atari benchmark --preset NAME says how long it takes"
        " on this machine):\n\n"
        f"{presets}\n\n"
        f"Atari games (--env.game NAME; * is one of Atari 100K's 26, which rem-atari scores compares):\n\n"
        f"{_columns(games)}\n\n"
        "Other games (--env.id ID; any gymnasium game with pixels and discrete actions will do):\n\n"
        f"{ids}{minatar}\n\n"
        "Trained agents that come with the package (rem-atari evaluate NAME; in Python"
        " rem_atari.load_agent(NAME)):\n\n"
        f"{agents}"
    )


def _default_game(config: Config) -> str:
    return config.env.id or config.env.game


def _columns(names: list[str], width: int = 78) -> str:
    """Names in as many columns as fit, read downwards."""
    cell = max(map(len, names)) + 2
    columns = max(1, (width - 2) // cell)
    rows = -(-len(names) // columns)
    lines = ["".join(name.ljust(cell) for name in names[row::rows]).rstrip() for row in range(rows)]
    return "\n".join(f"  {line}" for line in lines)

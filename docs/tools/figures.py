"""Writes docs/results.md and its curves from the raw results of runs, which lie beside them.

    python docs/tools/figures.py                                        # all pages and pictures anew
    python docs/tools/figures.py --add catch runs/catch-0 --name seed-0 # take in a finished run first

`raw_results.py` describes the files. A test checks that the page is up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from learned import learned_page_part
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from raw_results import CHECKOUT, Experiment, Result, add_result, evaluations, load_experiments

from rem_atari.report.history import MetricLine, Returns, values_of
from rem_atari.report.text import count, duration
from rem_atari.runs.session import short_commit

PAGE = CHECKOUT / "docs" / "results.md"
CURVES = CHECKOUT / "docs" / "results"
COLORS = ("#2a6f97", "#c7741b", "#5b8c5a", "#8a5a9e", "#a8443b", "#6b6b6b", "#3f8f8f", "#b08b2e")

HEAD = """\
# Results

What the agent learned, game by game and preset by preset, whatever it gave. `python docs/tools/figures.py`
writes this page from the raw results in `docs/results/data/`: of every run its configuration, metrics,
quality on held-out steps, and the machine that it ran on. Do not edit it: a test compares it with them.

A return is the mean over whole games, with its standard error over the games of that one run, and the number
of games; *ratio* is that to random play, where that is above 0 by twice its error. *CPU* is the time of all
threads together: machines did other work at the same time, so the wall time, which ends with the last
evaluation, says less. The quality of tokenizer and world model is explained with
[the report](rem_atari.md#the-quality-of-the-model).
"""

LEARNED = """\
## What was learned

Random play is a weak rival: a list of actions that is played whatever happens may score as much as an agent.
So the policies that see nothing of a game stand beside its agents here, as
[`rem-atari blind`](evaluating.md#policies-that-see-nothing) measured them. *Learned* means: above the best of
them by three standard errors. The agents' error is over seeds where there are several, else over the games of
the one seed; that of the other policies is over games. The scripted player sees the game: it is no rival.
"""


def main() -> None:
    """Add a run, if one is named, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("EXPERIMENT", "RUN"), help="a finished run to take in")
    parser.add_argument("--name", help="its name there: seed-N or VARIANT-seed-N")
    arguments = parser.parse_args()
    if arguments.add:
        experiment, run = arguments.add
        if arguments.name is None:
            parser.error("--add needs --name")
        print(add_result(Path(run), experiment, arguments.name))
    experiments = load_experiments()
    PAGE.write_text(render_page(experiments))
    for old in CURVES.glob("*.svg"):  # the raw results lie in a folder beside them
        old.unlink()
    for experiment in experiments:
        draw(experiment, CURVES / f"{experiment.name}.svg")


def render_page(experiments: Sequence[Experiment]) -> str:
    """docs/results.md."""
    learned = learned_page_part(experiments)
    return "\n".join([HEAD, *([LEARNED, learned] if learned else []), *map(_section, experiments)])


def _section(experiment: Experiment) -> str:
    parts = [
        f"## {experiment.title}",
        experiment.text,
        f"![Return over environment steps, {experiment.title}](results/{experiment.name}.svg)",
        *_commands(experiment),
        _table(RUN_COLUMNS, experiment.results),
        _on_the_way(experiment),
        _table(QUALITY_COLUMNS, [result for result in experiment.results if result.quality is not None]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _commands(experiment: Experiment) -> list[str]:
    """The command of each variant, and what it ran on."""
    firsts: dict[str, Result] = {}
    for result in experiment.results:
        firsts.setdefault(result.variant, result)
    lines = []
    for variant, result in firsts.items():
        others = [each.name for each in experiment.results if each.variant == variant][1:]
        seeds = f" (likewise {', '.join(others)})" if others else ""
        lines.append(f"`{result.command}`: {variant or 'the agent'}, {result.name}{seeds}")
    machines = sorted({_machine(result) for result in experiment.results if result.sessions})
    return ["\n".join(f"- {line}" for line in lines), f"On {'; '.join(machines)}." if machines else ""]


def _machine(result: Result) -> str:
    session = result.sessions[0]
    versions = session.get("versions") or {}
    return (
        f"{session.get('processor')}, {count(session.get('cores', 1), 'core')},"
        f" {count(session.get('threads', 1), 'thread')}, {session.get('device')}, torch"
        f" {versions.get('torch')}"
    )


Column = tuple[str, Callable[[Result], str]]
"""A column of a table: its title, and the cell of a run."""

RUN_COLUMNS: tuple[Column, ...] = (
    ("run", lambda result: result.name),
    ("mean return", lambda result: _returns(result.agent)),
    ("temperature", lambda result: f"{result.played_at:g}"),
    ("random play", lambda result: _returns(result.random)),
    ("ratio", lambda result: _ratio(result.agent, result.random)),
    ("environment steps", lambda result: f"{result.env_steps:,}"),
    ("wall time", lambda result: duration(result.seconds)),
    ("CPU", lambda result: "–" if result.cpu_seconds is None else duration(result.cpu_seconds)),
    ("commit", lambda result: short_commit(result.commit)),
)


def _on_the_way(experiment: Experiment) -> str:
    """A table of the evaluations before the last: what had been reached by when."""
    rows = [
        (
            result.name,
            duration(line["seconds"]),
            duration(line["cpu_seconds"]) if "cpu_seconds" in line else "–",
            f"{line['env_steps']:,}",
            f"{result.temperature:g}",
            _returns(found),
            _ratio(found, result.random),
        )
        for result in experiment.results
        for line, found in _before_the_last(result)
    ]
    titles = ("run", "after", "CPU", "environment steps", "temperature", "mean return", "ratio")
    return f"Evaluations on the way:\n\n{_markdown(titles, rows)}" if rows else ""


def _before_the_last(result: Result) -> list[tuple[MetricLine, Returns]]:
    """A run's evaluations without that at its end; one that was stopped may have ended without any."""
    found = list(evaluations(result))
    at_the_end = result.evaluation is None or (found and found[-1][0].get("final"))
    return found[:-1] if at_the_end else found


def _quality(*path: str, digits: int = 3, percent: bool = False) -> Callable[[Result], str]:
    """A column: the number at a path of quality.json."""

    def cell(result: Result) -> str:
        value: Any = result.quality
        for name in path:
            value = None if value is None else value[name]
        if value is None:
            return "–"
        return f"{100 * value:.0f}%" if percent else f"{value:.{digits}g}"

    return cell


def _base_rate(event: str) -> Callable[[Result], str]:
    """A column: the share of the held-out steps with an event, which is the precision of always predicting
    one."""

    def cell(result: Result) -> str:
        scores = (result.quality or {}).get(event)
        return f"{100 * scores['events'] / scores['steps']:.1f}%" if scores and scores["steps"] else "–"

    return cell


def _horizon(result: Result) -> str:
    """PSNR of imagined frames at the first and the last step, and at how many they beat copying."""
    horizon = (result.quality or {}).get("horizon")
    if not horizon or not horizon["steps"]:
        return "–"
    steps = [step["psnr"] for step in horizon["steps"]]
    won = sum(_beats(step["imagined"], step["copy_last_frame"]) for step in steps)
    first, last = (
        f"{_decibel(step['imagined'])} ({_decibel(step['copy_last_frame'])})"
        for step in (steps[0], steps[-1])
    )
    return f"{first} to {last}; {won} of {len(steps)}"


def _beats(ours: float | None, theirs: float | None) -> bool:
    """Whether a PSNR is higher than another; None is a perfect one."""
    return theirs is not None and (ours is None or ours > theirs)


def _decibel(value: float | None) -> str:
    return "∞" if value is None else f"{value:.1f}"


QUALITY_COLUMNS: tuple[Column, ...] = (
    ("held-out quality", lambda result: result.name),
    ("token cross-entropy", _quality("tokens", "cross_entropy", "world_model")),
    ("unigram", _quality("tokens", "cross_entropy", "unigram")),
    ("per place", _quality("tokens", "cross_entropy", "unigram_per_place")),
    ("copy", _quality("tokens", "cross_entropy", "copy_last_frame")),
    ("changed tokens right", _quality("tokens", "changed_accuracy", "world_model", percent=True)),
    ("rewards: recall", _quality("rewards", "recall", percent=True)),
    ("precision", _quality("rewards", "precision", percent=True)),
    ("base rate", _base_rate("rewards")),
    ("ends: recall", _quality("ends", "recall", percent=True)),
    ("precision", _quality("ends", "precision", percent=True)),
    ("base rate", _base_rate("ends")),
    ("imagined PSNR, dB (copy), first to last step; steps won", _horizon),
    ("error on moving pixels", _quality("frames", "moving_mse", "tokenizer")),
    (
        "codes",
        lambda result: (
            f"{_quality('frames', 'codebook', 'used')(result)} of "
            f"{_quality('frames', 'codebook', 'size')(result)}"
        ),
    ),
    ("perplexity", _quality("frames", "codebook", "perplexity")),
)


def _table(columns: Sequence[Column], results: Sequence[Result]) -> str:
    rows = [tuple(cell(result) for _, cell in columns) for result in results]
    return _markdown([title for title, _ in columns], rows) if rows else ""


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _returns(found: Returns | None) -> str:
    if found is None:
        return "–"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.2f}"
    return f"{found.mean:.2f}{error} ({found.episodes})"


def _ratio(agent: Returns | None, random: Returns | None) -> str:
    """The ratio to random play's return; a dash if that is not clearly above 0."""
    if agent is None or random is None or random.mean <= 2 * (random.standard_error or 0.0):
        return "–"
    return f"{agent.mean / random.mean:.1f}"


def draw(experiment: Experiment, path: Path) -> None:
    """Return over environment steps, a colour a run."""
    plt.rcParams |= {"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "retpop"}
    figure, axes = plt.subplots(figsize=(7.4, 3.4), layout="constrained")
    for place, result in enumerate(experiment.results):
        _draw_result(axes, result, COLORS[place % len(COLORS)])
    axes.plot([], [], color="#666", marker="o", linestyle="none", markersize=5, label="evaluation")
    axes.plot([], [], color="#666", linewidth=0.8, linestyle=":", label="random play")
    axes.set(xlabel="environment steps", ylabel="mean return of a game")
    axes.set_title("games while collecting (lines) and in evaluations (dots)", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.savefig(path, metadata={"Date": None, "Description": digest(experiment)})
    plt.close(figure)


def digest(experiment: Experiment) -> str:
    """A digest of a picture's data, by which a test sees whether the picture is up to date."""
    drawn = [(result.name, _drawn(result)) for result in experiment.results]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def _drawn(result: Result) -> dict[str, Any]:
    """The curves of a run: points (environment steps, return, standard error) by name."""
    played = values_of(result.lines, "collect", "mean_game_return", x="env_steps")
    return {
        "collect": [[x, y] for x, y in zip(played.x, played.y, strict=True)],
        "evaluate": [
            [line["env_steps"], found.mean, found.standard_error or 0.0]
            for line, found in evaluations(result)
        ],
        "random": None if result.random is None else result.random.mean,
    }


def _draw_result(axes: Axes, result: Result, color: str) -> None:
    curves = _drawn(result)
    style = "--" if result.variant else "-"
    if curves["collect"]:
        axes.plot(*zip(*curves["collect"], strict=True), color=color, linewidth=1, alpha=0.6, linestyle=style)
    if curves["evaluate"]:
        steps, means, errors = zip(*curves["evaluate"], strict=True)
        axes.errorbar(steps, means, errors, color=color, fmt="o", markersize=5, linewidth=1)
    axes.plot([], [], color=color, linewidth=1.5, linestyle=style, label=result.name)
    if curves["random"] is not None:
        axes.axhline(curves["random"], color=color, linewidth=0.8, linestyle=":")


if __name__ == "__main__":
    main()

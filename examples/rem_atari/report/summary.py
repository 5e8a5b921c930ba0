"""The sentences at the top of the report: the run, its results, and their limits."""

from __future__ import annotations

from html import escape

from rem_atari.evaluation import describe_mean
from rem_atari.report.contents import Report
from rem_atari.report.history import (
    Returns,
    last_value,
    returns_of,
    reward_sizes,
    total_seconds,
    values_of,
    verdict,
    was_trained,
)
from rem_atari.report.rivals import learned_sentence
from rem_atari.report.text import PHASE_NAMES, count, duration, number, section
from rem_atari.runs.reading import is_number

PAPER_EPOCHS, PAPER_STEPS = 600, 100_000
PLUMBING_PRESETS = ("debug", "tiny")
MISSES_NAMED = 3
"""Most misses that the summary names; of more it gives only the number."""
TRAINED_PHASES = ("tokenizer", "world_model", "controller")

VERDICTS = {
    "above": "The agent has learned to play better than random",
    "below": "The agent plays worse than random",
    "unclear": "The agent does not clearly differ from random play",
}


def epochs_begun(report: Report) -> int:
    """Number of epochs that left a line; the lines count them from 0."""
    lines = [line for line in report.lines if line.get("phase") in ("collect", *TRAINED_PHASES)]
    last = last_value(lines, "epoch")
    return 0 if last is None else int(last) + 1


def is_unrecorded(report: Report) -> bool:
    """Whether the agent was exported without what its training measured."""
    return epochs_begun(report) == 0 and any(values_of(report.lines, "evaluate", "final").y)


def what_ran(report: Report) -> str:
    """One sentence on the run's size, and another where the preset is too small to learn a game."""
    if is_unrecorded(report):
        return "The agent came without a record of its training."
    steps = last_value(report.lines, "env_steps") or 0
    epochs = epochs_begun(report)
    time = duration(total_seconds(report.lines))
    text = f"{count(epochs, 'epoch')}, {count(int(steps), 'environment step')}, {time}."
    preset = report.config.preset
    if preset in PLUMBING_PRESETS:
        text += (
            f" The preset “{preset}” shows plumbing, not play: every part of the agent runs, but it trains"
            f" far too little to learn a game (the paper: {PAPER_EPOCHS} epochs, {PAPER_STEPS:,} steps)."
        )
    return text


def agent_sentence(agent: Returns | None, random: Returns | None) -> str:
    """Whether the agent learned, in one sentence: its mean return beside random play's."""
    if agent is None:
        return "How well the agent plays was not measured."
    if random is None:
        return f"Mean return {returns_text(agent)}; random play was not measured."
    learned = VERDICTS[verdict(agent, random)]
    return f"{learned}: mean return {returns_text(agent)}; random play {returns_text(random)}."


def returns_text(returns: Returns) -> str:
    """A mean return with its standard error and number of games."""
    mean = describe_mean(returns.mean, returns.standard_error).replace("-", "−")
    unfinished = f", {returns.unfinished} of them cut off by the clock" if returns.unfinished else ""
    return f"{mean} over {count(returns.episodes, 'game')}{unfinished}"


def learned(report: Report) -> str:
    """Whether the agent learned: its returns beside random play's and those of policies that see nothing."""
    agent, random = returns_of(report.lines, "evaluate"), returns_of(report.lines, "random")
    text = agent_sentence(agent, random)
    if agent is None or report.rivals is None:
        return text
    return f"{text} {learned_sentence(agent, report.rivals)}"


def evaluation_sentence(report: Report) -> str:
    """A sentence on the results of `rem-atari evaluate`, if there are any."""
    found = report.evaluation
    if found is None:
        return ""
    error, normalised = found.get("standard_error"), found.get("human_normalised")
    text = (
        f"In {count(int(found['episodes']), 'whole game')} that rem-atari evaluate played with checkpoint"
        f" {int(found['step'])} at temperature {found['temperature']:g}, the mean return was"
        f" {number(found['mean_return'])}{f' ± {number(error, 2)}' if is_number(error) else ''}"
    )
    return f"{text}, human-normalised {number(normalised)}." if is_number(normalised) else f"{text}."


def comparisons_sentence(report: Report) -> str:
    """How many of the comparisons on held-out frames the agent wins, and which it misses."""
    if not report.comparisons:
        return ""
    missed = [f"{row.measure} against {row.rival}" for row in report.comparisons if not row.passed]
    total = len(report.comparisons)
    won = f"On held-out frames it wins {total - len(missed)} of {count(total, 'comparison')}"
    steps = _imagined_steps_sentence(report)
    if not missed:
        return f"{won}.{steps}"
    names = "; ".join(missed) if len(missed) <= MISSES_NAMED else f"{len(missed)}, marked in the table below"
    return f"{won}; it misses {names}.{steps}"


def _imagined_steps_sentence(report: Report) -> str:
    """The number of steps over which imagination is better than a still picture."""
    if report.quality.horizon is None:
        return ""
    steps = report.quality.horizon.steps
    nearer = sum(step.passed for step in steps)
    won = f"{nearer} of {count(len(steps), 'step')}"
    return f" Imagined frames are nearer to the real ones than the last frame is at {won}."


def warnings_of(report: Report) -> list[str]:
    """Sentences on an early stop and on parts that never trained, then the report's own notes."""
    if is_unrecorded(report):
        return report.notes
    found = []
    if not any(values_of(report.lines, "evaluate", "final").y):
        wanted = count(report.config.schedule.epochs, "epoch")
        found.append(f"This run did not finish: it began {epochs_begun(report)} of {wanted}.")
    for phase in TRAINED_PHASES:
        never_trains = phase == "tokenizer" and report.config.tokenizer.kind == "patches"
        if not never_trains and not was_trained(report.lines, phase):
            name = PHASE_NAMES[phase].removeprefix("train ")
            found.append(f"The {name} never trained: what it does below, it does untrained.")
    if _freeze_was_due(report):
        limit = report.config.tokenizer.freeze_foreground_error
        found.append(
            "The tokenizer was to rest by now, but it never showed an error on foreground pixels of"
            f" {limit:g} or less and trained on."
        )
    sizes = reward_sizes(report.lines)
    learns_signs = report.config.world_model.reward_bins == 0
    if learns_signs and sizes is not None and sizes != (1.0, 1.0):
        found.append(
            f"The game's rewards are from {number(sizes[0])} to {number(sizes[1])} in size; the world model"
            " learns only their signs, so that to the agent each is worth −1, 0 or +1."
        )
    return found + report.notes


def _freeze_was_due(report: Report) -> bool:
    """Whether the tokenizer was to be frozen by now and is not."""
    due = report.config.tokenizer.freeze_epoch
    frozen = values_of(report.lines, "tokenizer", "frozen")
    return due is not None and bool(frozen.y) and frozen.x[-1] >= due and frozen.y[-1] == 0


def header(report: Report) -> str:
    """Title, whether the agent learned, warnings, and how to play in its dream."""
    config = report.config
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in warnings_of(report))
    play = f"<p>Play in its dream: <code>{escape(report.play)}</code></p>" if report.play else ""
    return f"""<header>
<h1>REM on {escape(report.game)}</h1>
<p class="faint">preset {escape(config.preset)} · seed {config.seed} · {escape(versions)}</p>
<p class="lede">{escape(learned(report))}</p>
{notes}{play}
</header>"""


def the_run(report: Report) -> str:
    """The size of the run, and its key figures."""
    return section(
        "The run",
        f"<p>{escape(what_ran(report))} {escape(evaluation_sentence(report))}"
        f" {escape(comparisons_sentence(report))}</p>"
        f'<dl class="figures">{_key_figures(report)}</dl>',
    )


def _key_figures(report: Report) -> str:
    """The handful of numbers that a reader looks for first."""
    agent, random = returns_of(report.lines, "evaluate"), returns_of(report.lines, "random")
    won = sum(row.passed for row in report.comparisons)
    cards = []
    for title, returns in (("Return, agent", agent), ("Return, random play", random)):
        detail = "not measured" if returns is None else f"mean of {count(returns.episodes, 'episode')}"
        cards.append((title, number(None if returns is None else returns.mean), detail))
    cards.append(("Held-out comparisons", f"{won} of {len(report.comparisons)}", "won by the agent"))
    cards.append(("Epochs", f"{epochs_begun(report)} of {report.config.schedule.epochs}", ""))
    cards.append(("Wall time", duration(total_seconds(report.lines)), ""))
    return "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(detail)}</small></dd></div>"
        for title, value, detail in cards
    )

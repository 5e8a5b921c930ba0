"""The sections of the page that show results, each a function from the report to HTML."""

from __future__ import annotations

import json
from html import escape

from rem_atari.config import Config
from rem_atari.films.pictures import DIFFERENCE_CEILING, Film, Scene, data_uri, difference_image, filmstrip
from rem_atari.report.analysis import EventScores
from rem_atari.report.charts import Chart, chart_svg, charts_of
from rem_atari.report.contents import Report
from rem_atari.report.diagnosis import diagnose
from rem_atari.report.findings import Finding, first_sign
from rem_atari.report.history import PhaseThroughput, returns_of, throughput
from rem_atari.report.quality import Comparison
from rem_atari.report.rivals import POLICY_NAMES, learned_sentence
from rem_atari.report.text import PHASE_NAMES, count, duration, number, percent, section, table

STEP_WIDTH, CHANCE_HEIGHT, END_HEIGHT = 10, 14, 10


def curves(report: Report) -> str:
    """Returns and losses over the run."""
    charts = charts_of(report.lines)
    if not charts:
        return section("Curves", "<p>The run left no metrics to draw.</p>")
    lead = "<p>Means over an epoch, as the run logged them. Bars behind evaluations span all episodes.</p>"
    return section("Curves", f'{lead}<div class="charts">{"".join(map(chart_figure, charts))}</div>')


def chart_figure(chart: Chart) -> str:
    """A chart with its title and legend."""
    keys = [
        f'<span style="--line: var(--s{index})">{escape(series.name)}</span>'
        for index, series in enumerate(chart.drawn)
    ]
    if chart.level is not None:
        keys.append(f'<span class="level-key">{escape(chart.level[0])} {number(chart.level[1])}</span>')
    return (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><div class="legend">{"".join(keys)}</div>'
        f"{chart_svg(chart)}</figure>"
    )


def reconstructions(report: Report) -> str:
    """Real frames, the tokenizer's reconstructions, and the difference."""
    if report.quality.frames is None:
        return section("Frames and reconstructions", "<p>There are no held-out frames to show.</p>")
    shown = report.quality.frames.redrawn
    side = shown.frames.shape[1]
    lead = (
        f"<p>Frames of evaluation games, {side}×{side} pixels, that no part was trained on; below each what"
        " the decoder makes of its tokens, and the difference: the largest of the three channels, at its"
        f" brightest from {DIFFERENCE_CEILING} of 255 levels on. Evenly spaced from the best (first) to the"
        " worst (last) of the held-out frames measured.</p>"
    )
    figures = []
    for frame, redrawn, quality in zip(shown.frames, shown.reconstructions, shown.psnr, strict=True):
        images = "".join(
            f'<img class="pixels" alt="{label}" src="{data_uri(image)}" width="{side}" height="{side}">'
            for label, image in (
                ("held-out frame", frame),
                ("reconstruction", redrawn),
                ("difference", difference_image(frame, redrawn)),
            )
        )
        figures.append(f"<figure>{images}<figcaption>PSNR {number(quality)} dB</figcaption></figure>")
    return section("Frames and reconstructions", f'{lead}<div class="redrawn">{"".join(figures)}</div>')


def imagination(report: Report) -> str:
    """The films, stepped together by one player."""
    if not report.scenes:
        return section("Imagination", "<p>There were no held-out frames from which to imagine.</p>")
    length = max(scene.length for scene in report.scenes)
    lead = (
        "<p>The real game, and what the world model dreams from the same frame: with the same actions, and"
        " with those that the agent chooses in the dream.</p>"
    )
    player = (
        '<div class="player"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{length}" value="0" aria-label="Step"><output></output></div>'
    )
    key = (
        '<p class="key small faint"><i class="plus"></i>reward +1 <i class="minus"></i>reward −1 '
        '<i class="end"></i>end of the episode; a full bar is a chance of 1. A column is a step.</p>'
        "<noscript><p>Without scripts the films stand still; <code>media/imagination.gif</code> moves.</p>"
        "</noscript>"
    )
    scenes = "".join(map(_scene, report.scenes))
    explained = f'<p class="small faint">{_how_it_imagines(report.config)}</p>'
    return section("Imagination", f'{lead}{player}<div class="scenes">{scenes}</div>{key}{explained}')


def _how_it_imagines(config: Config) -> str:
    """A paragraph on what the films show and how to judge them."""
    return (
        "The starts are held out, those that a reward or an end follows come first. From each the world model"
        f" imagines on, {_how_it_draws(config)}. Below each frame the reward (of an imagined one"
        " its sign) and the end of the episode, with the chance that the model"
        f" gave them. It was trained on sequences of {config.world_model.sequence_blocks} steps; in what lies"
        f" beyond it has no practice.{_what_ends(config)}"
    )


def _how_it_draws(config: Config) -> str:
    """How the tokens of an imagined frame are drawn, in the midst of a sentence."""
    if not config.world_model.pop:
        return "token by token"
    return {
        "refine": "a few network passes a step, the most certain tokens of a frame first",
        "groups": "one network pass a step, the tokens of a frame drawn in four groups of places",
    }.get(config.world_model.draw, "one network pass a step, all tokens of a frame drawn at once")


def _what_ends(config: Config) -> str:
    """A sentence for games in which an end means different things in training and in held-out games."""
    if config.env.id is not None:
        return ""
    return " It learned from training games, in which a lost life ends an episode; in these games none does."


def _scene(scene: Scene) -> str:
    return f'<div class="scene">{"".join(_film(film, scene.length) for film in scene.films)}</div>'


def _film(film: Film, length: int) -> str:
    """A film as a strip of frames that the script slides along, with captions and chances over the steps."""
    captions = json.dumps([film.caption(step) for step in range(len(film.steps) + 1)], ensure_ascii=False)
    num_frames = len(film.frames)
    strip = data_uri(filmstrip(film.frames))
    style = f"background-image: url({strip}); background-size: {100 * num_frames}% 100%"
    happened, chances = film.caption(0)
    return (
        f'<figure class="film" data-frames="{num_frames}" data-captions="{escape(captions)}">'
        f"<figcaption>{escape(film.title)}</figcaption>"
        f'<div class="screen" role="img" aria-label="{escape(film.title)}" style="{style}"></div>'
        f"{_timeline(film, length)}"
        f'<p class="moment"><b class="happened">{happened}</b><span class="chances">{chances}</span></p>'
        "</figure>"
    )


def _timeline(film: Film, length: int) -> str:
    """A column a step: the chance of reward +1 upwards, of -1 downwards, and of the end below."""
    height = 2 * CHANCE_HEIGHT + END_HEIGHT + 2
    parts = [
        f'<line class="axis" x1="0" x2="{length * STEP_WIDTH}" y1="{CHANCE_HEIGHT}" y2="{CHANCE_HEIGHT}"/>'
    ]
    for index, step in enumerate(film.steps):
        left = index * STEP_WIDTH
        minus, _, plus = step.reward_chances or (float(step.reward < 0), 0.0, float(step.reward > 0))
        end = float(step.ended) if step.end_chance is None else step.end_chance
        bars = (
            ("plus", CHANCE_HEIGHT * (1 - plus), CHANCE_HEIGHT * plus),
            ("minus", float(CHANCE_HEIGHT), CHANCE_HEIGHT * minus),
            ("end", height - END_HEIGHT * end, END_HEIGHT * end),
        )
        parts.append(f'<rect class="here" x="{left}" y="0" width="{STEP_WIDTH}" height="{height}"/>')
        across = f'x="{left + 1}" width="{STEP_WIDTH - 2}"'
        parts.extend(
            f'<rect class="{name}" {across} y="{top:.2f}" height="{tall:.2f}"/>'
            for name, top, tall in bars
            if tall > 0.05
        )
    return (
        f'<svg class="timeline" viewBox="0 0 {length * STEP_WIDTH} {height}" preserveAspectRatio="none"'
        f' aria-hidden="true">{"".join(parts)}</svg>'
    )


def rivals(report: Report) -> str:
    """The agent beside policies that see nothing."""
    title = "Beside policies that see nothing"
    found = report.rivals
    if found is None:
        return section(title, "<p>They were not measured: <code>rem-atari blind</code> does that.</p>")
    agent = returns_of(report.lines, "evaluate")
    rows = [(POLICY_NAMES[name], returns) for name, returns in found.returns.items()]
    if agent is not None:
        rows.append(("the agent, in the last evaluation of its training", agent))
    numeric = ("Mean return", "Standard error", "Games")
    cells = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{number(returns.mean)}</td>'
        f'<td class="number">{number(returns.standard_error, 2)}</td>'
        f'<td class="number">{returns.episodes:,}</td></tr>'
        for name, returns in rows
    )
    lead = (
        "<p>Each was measured on games that no search has played. The best constant action and the best lists"
        f" of actions were sought for {count(found.search_steps, 'environment step')} each; a scripted player"
        f" sees the game. {escape(learned_sentence(agent, found)) if agent is not None else ''}</p>"
    )
    return section(title, lead + table(("Policy", *numeric), cells, numeric=numeric))


def signs(report: Report) -> str:
    """The findings of `rem-atari diagnose`."""
    title = "Signs that it does not learn"
    findings = diagnose(report.lines, report.config, report.quality.to_dict())
    first = first_sign(findings)
    unknown = sum(finding.sign is None for finding in findings)
    begin = (
        f"None is seen{f'; {unknown} cannot be judged' if unknown else ''}."
        if first is None
        else f"Begin with the first that is seen, <b>{escape(first.title.lower())}</b>: those after it may"
        " follow from it."
    )
    lead = (
        "<p>Read off the run's metrics and the measurements above as <code>rem-atari diagnose</code> does, in"
        f" the order in which to heed them. {begin}</p>"
    )
    rows = "".join(map(_sign_row, findings))
    return section(title, f"{lead}{table(('Sign', 'Seen?'), rows)}")


def _sign_row(finding: Finding) -> str:
    badge = {
        True: '<span class="no">seen</span>',
        False: '<span class="yes">not seen</span>',
        None: '<span class="faint small">unknown</span>',
    }[finding.sign]
    advice = f'<p class="small">Try: {escape(finding.advice)}</p>' if finding.advice else ""
    return (
        f'<tr><td>{escape(finding.title)}<p class="small faint">{escape(finding.says)}</p>{advice}</td>'
        f"<td>{badge}</td></tr>"
    )


def speed(report: Report) -> str:
    """The time that each phase took, and its speed."""
    rows = throughput(report.lines)
    if not rows:
        return section("Throughput", "<p>The run left no timings.</p>")
    numeric = ("Work", "Rate", "Time", "Share of the run")
    phases = table(("Phase", *numeric, ""), "".join(map(_throughput_row, rows)), numeric=numeric)
    return section("Throughput", f"<p>Work done over each phase's whole time.</p>{phases}")


def _throughput_row(row: PhaseThroughput) -> str:
    rate = "–" if row.rate is None else f"{number(row.rate)} {row.unit}/s"
    if row.frames_per_second is not None:
        rate += f'<br><span class="faint small">{number(row.frames_per_second)} imagined frames/s</span>'
    if row.imagined_per_env_step is not None:
        rate += f'<br><span class="faint small">{number(row.imagined_per_env_step)} for each real step</span>'
    amount = "–" if row.amount is None else f"{row.amount:,.0f} {row.unit}"
    cells = "".join(
        f'<td class="number">{cell}</td>'
        for cell in (amount, rate, duration(row.seconds), percent(row.share))
    )
    bar = f'<span class="bar" style="width: {100 * row.share:.1f}%"></span>'
    return f'<tr><td>{PHASE_NAMES[row.phase]}</td>{cells}<td class="share">{bar}</td></tr>'


def measures(report: Report) -> str:
    """The agent beside rivals that need no learning, on held-out frames."""
    title = "Measured on held-out frames"
    if not report.comparisons:
        return section(title, "<p>There are no held-out frames to measure on.</p>")
    lead = (
        f"<p>On draws from {count(report.quality.steps, 'frame')} of evaluation games, never trained on. The"
        " rivals are fitted on training frames. A miss is a miss, however small.</p>"
    )
    comparisons = table(
        ("Measure", "Agent", "Rival", "Which rival", "Better?"),
        "".join(map(_comparison_row, report.comparisons)),
        numeric=("Agent", "Rival"),
        style="comparisons",
    )
    return section(title, f"{lead}{comparisons}{_events(report)}{_codebook(report)}")


def _comparison_row(row: Comparison) -> str:
    ours, theirs = (percent(value) if row.percent else number(value) for value in (row.ours, row.theirs))
    badge = '<span class="yes">yes</span>' if row.passed else '<span class="no">no: a miss</span>'
    return (
        f'<tr class="{"won" if row.passed else "missed"}">'
        f'<td>{escape(row.measure)}<p class="small faint">{escape(row.explanation)}</p></td>'
        f'<td class="number ours" data-label="Agent">{ours}</td>'
        f'<td class="number" data-label="Rival">{theirs}</td>'
        f'<td data-label="Which rival">{escape(row.rival)}</td><td>{badge}</td></tr>'
    )


def _events(report: Report) -> str:
    """A table of the world model's scores on events, which are rare and matter most."""
    predictions = report.quality.predictions
    if predictions is None:
        return ""
    steps = predictions.reward_events.steps
    numeric = ("Happened", "Foretold", "Recall", "Precision", "Base rate", "Mean chance given", "Calibration")
    rows = "".join(
        _event_row(name, scores)
        for name, scores in (
            ("Rewards that are not 0", predictions.reward_events),
            ("Ends of an episode", predictions.end_events),
        )
    )
    lead = (
        f"<p>What matters most happens least. Of {count(steps, 'step')}: how often it happened, and how often"
        " the most likely guess was that it would. Recall is the share of what happened that was foretold,"
        " precision the share of what was foretold that happened; foretelling it at every step has the"
        " precision of the base rate. Imagination draws, and"
        " does not take the most likely guess: the chance given is how often it would have shown what came,"
        " and calibration how many events it would have shown, wherever, for each that came: 1 is right, and"
        " with 2 imagination pays twice what the game does."
        "</p>"
    )
    note = (
        '<p class="small faint">Rewards vary too little in these games to be compared: there is none, or the'
        " same one with every end and no other.</p>"
    )
    return lead + table(("Event", *numeric), rows, numeric=numeric) + note * predictions.one_outcome


def _event_row(name: str, scores: EventScores) -> str:
    shares = (
        "–" if share is None else percent(share)
        for share in (scores.recall, scores.precision, scores.base_rate, scores.chance)
    )
    cells = "".join(
        f'<td class="number">{cell}</td>'
        for cell in (
            f"{scores.events:,}",
            f"{scores.predicted:,}",
            *shares,
            "–" if scores.calibration is None else number(scores.calibration),
        )
    )
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _codebook(report: Report) -> str:
    if report.quality.frames is None:
        return ""
    use = report.quality.frames.codebook
    return (
        f"<p>Codebook use: {use.used} of {use.size} codes appear in these frames, with a perplexity of"
        f" {number(use.perplexity)} (the number of codes that, used equally often, would say as much).</p>"
    )

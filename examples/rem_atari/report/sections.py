"""The sections of the page that show results, each a function from the report to HTML."""

from __future__ import annotations

import json
from html import escape

from rem_atari.config import Config
from rem_atari.report.charts import Chart, chart_svg, charts_of
from rem_atari.report.contents import Report
from rem_atari.report.diagnosis import Finding, diagnose, first_sign
from rem_atari.report.figures import DIFFERENCE_CEILING, data_uri, difference_image, filmstrip
from rem_atari.report.films import Film, Scene
from rem_atari.report.history import PhaseThroughput, returns_of, throughput, total_seconds
from rem_atari.report.summary import (
    comparisons_sentence,
    epochs_begun,
    evaluation_sentence,
    returns_sentence,
    warnings_of,
    what_ran,
)
from rem_atari.report.text import PHASE_NAMES, count, duration, number, percent

STEP_WIDTH, CHANCE_HEIGHT, END_HEIGHT = 10, 14, 10


def header(report: Report) -> str:
    """Title, warnings, the summary and the key figures."""
    config = report.config
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in warnings_of(report))
    return f"""<header>
<h1>REM on {escape(report.game)}</h1>
<p class="faint">preset {escape(config.preset)} · seed {config.seed} · {escape(versions)}</p>
<p class="lede">{escape(what_ran(report))}</p>
<p>{escape(returns_sentence(report))} {escape(evaluation_sentence(report))}
{escape(comparisons_sentence(report))}</p>
{notes}
<dl class="figures">{_key_figures(report)}</dl>
</header>"""


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
    """Real frames, what is left of them after the tokenizer, and the difference."""
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
    trained = report.config.world_model.sequence_blocks
    lead = (
        "<p>From each held-out start the world model imagines on, one network pass a step, all tokens of a"
        " frame drawn at once. Beside the real continuation: what it imagines with the same actions, and with"
        " the actions that the controller chooses. Starts that a reward or an end follows come first. Below"
        " each frame the reward (of an imagined one its sign) and the end of the episode, with the chance"
        f" that the model gave them. It was trained on sequences of {trained} steps; in what lies beyond it"
        " has no practice."
        f"{_what_ends(report.config)}</p>"
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
    return section("Imagination", f'{lead}{key}{player}<div class="scenes">{scenes}</div>')


def _what_ends(config: Config) -> str:
    """A sentence where an end means one thing in training and another in the held-out games."""
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


def signs(report: Report) -> str:
    """What `rem-atari diagnose` says."""
    title = "Signs that it does not learn"
    findings = diagnose(report.lines, report.config)
    first = first_sign(findings)
    unknown = sum(finding.sign is None for finding in findings)
    begin = (
        f"None is seen{f'; {unknown} cannot be judged' if unknown else ''}."
        if first is None
        else f"Begin with the first that is seen, <b>{escape(first.title.lower())}</b>: those after it may"
        " follow from it."
    )
    lead = (
        "<p>Read off the run's metrics as <code>rem-atari diagnose</code> does, in the order in which to heed"
        f" them. {begin}</p>"
    )
    rows = "".join(map(_sign_row, findings))
    head = "<thead><tr><th>Sign</th><th>Seen?</th></tr></thead>"
    return section(title, f'{lead}<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>')


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
    """Where the time went, and how fast each phase worked."""
    rows = throughput(report.lines)
    if not rows:
        return section("Throughput", "<p>The run left no timings.</p>")
    head = "".join(
        f'<th class="number">{title}</th>' for title in ("Work", "Rate", "Time", "Share of the run")
    )
    return section(
        "Throughput",
        "<p>Work done over each phase's whole time.</p>"
        f'<div class="scroll"><table><thead><tr><th>Phase</th>{head}<th></th></tr></thead>'
        f"<tbody>{''.join(map(_throughput_row, rows))}</tbody></table></div>",
    )


def _throughput_row(row: PhaseThroughput) -> str:
    rate = "–" if row.rate is None else f"{number(row.rate)} {row.unit}/s"
    if row.frames_per_second is not None:
        rate += f'<br><span class="faint small">{number(row.frames_per_second)} imagined frames/s</span>'
    amount = "–" if row.amount is None else f"{row.amount:,.0f} {row.unit}"
    cells = "".join(
        f'<td class="number">{cell}</td>'
        for cell in (amount, rate, duration(row.seconds), percent(row.share))
    )
    bar = f'<span class="bar" style="width: {100 * row.share:.1f}%"></span>'
    return f'<tr><td>{PHASE_NAMES[row.phase]}</td>{cells}<td class="share">{bar}</td></tr>'


def section(title: str, content: str) -> str:
    """A section of the page; `content` is HTML already."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"

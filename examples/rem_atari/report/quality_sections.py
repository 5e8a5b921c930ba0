"""The sections of the page on how good the networks are, measured on held-out steps."""

from __future__ import annotations

from html import escape

from rem_atari.report.analysis import EventScores
from rem_atari.report.charts import Chart
from rem_atari.report.comparisons import Comparison
from rem_atari.report.contents import Report
from rem_atari.report.history import Series
from rem_atari.report.horizon import Drawn, HorizonErrors, StepErrors
from rem_atari.report.sections import chart_figure, section
from rem_atari.report.text import count, number, percent

HORIZON_CURVES: tuple[tuple[Drawn, str], ...] = (
    ("imagined", "imagined"),
    ("copied", "copy the last frame"),
    ("redrawn", "real, through the tokenizer"),
)
"""The curves over the imagined steps, by the names of `StepErrors`."""


def measures(report: Report) -> str:
    """The agent beside rivals that need no learning, on held-out frames."""
    title = "Measured on held-out frames"
    if not report.comparisons:
        return section(title, "<p>There are no held-out frames to measure on.</p>")
    lead = (
        f"<p>On draws from {count(report.quality.steps, 'frame')} of evaluation games, never trained on. The"
        " rivals are fitted on training frames. A miss is a miss, however small.</p>"
    )
    head = (
        '<thead><tr><th>Measure</th><th class="number">Agent</th><th class="number">Rival</th>'
        "<th>Which rival</th><th>Better?</th></tr></thead>"
    )
    rows = "".join(map(_comparison_row, report.comparisons))
    table = f'<div class="scroll"><table class="comparisons">{head}<tbody>{rows}</tbody></table></div>'
    return section(title, f"{lead}{table}{_events(report)}{_codebook(report)}")


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
    """How often the world model sees coming what matters most, and happens least."""
    predictions = report.quality.predictions
    if predictions is None:
        return ""
    steps = predictions.reward_events.steps
    head = "".join(
        f'<th class="number">{title}</th>'
        for title in ("Happened", "Foretold", "Recall", "Precision", "Mean chance given")
    )
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
        " precision the share of what was foretold that happened. Imagination draws, and"
        " does not take the most likely guess: the chance given is how often it would have shown what came."
        "</p>"
    )
    return (
        f'{lead}<div class="scroll"><table><thead><tr><th>Event</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _event_row(name: str, scores: EventScores) -> str:
    shares = (
        "–" if share is None else percent(share) for share in (scores.recall, scores.precision, scores.chance)
    )
    cells = "".join(
        f'<td class="number">{cell}</td>' for cell in (f"{scores.events:,}", f"{scores.predicted:,}", *shares)
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


def horizon(report: Report) -> str:
    """Imagined frames beside the real ones, step by step."""
    title = "Imagination against the game, step by step"
    errors = report.quality.horizon
    if errors is None:
        return section(title, "<p>There are no held-out frames from which to imagine.</p>")
    lead = (
        f"<p>From {count(errors.starts, 'held-out start')} the world model imagines as many steps as the"
        " controller learns from, under the actions that were really taken, drawing as it does in training."
        " Each imagined frame is compared with the real one of that step: the PSNR of the mean error, in dB;"
        " higher is better. Copying shows the real start, unchanged. The real frame seen through the"
        " tokenizer is what no imagination can surpass, and what the game itself draws, none can foresee.</p>"
    )
    chart = Chart(
        title="PSNR against the real frame, dB",
        x_label="imagined steps",
        series=[_psnr_curve(errors, what, name) for what, name in HORIZON_CURVES],
    )
    drawing = chart_figure(chart) if chart.drawn else ""
    titles = ("Frames", "Imagined", "Copied", "Tokenizer", "Moving: imagined", "Moving: copied")
    head = "".join(f'<th class="number">{title}</th>' for title in titles)
    rows = "".join(map(_horizon_row, errors.steps))
    table = (
        f'<div class="scroll"><table><thead><tr><th>Step</th>{head}<th>Better?</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )
    note = (
        '<p class="small faint">Moving: mean squared error over the pixels in which the real frame'
        " differs from the start.</p>"
    )
    return section(title, f'{lead}<div class="charts">{drawing}</div>{table}{note}')


def _psnr_curve(errors: HorizonErrors, what: Drawn, name: str) -> Series:
    """A curve over the steps, without those at which the copy is perfect."""
    points = [(float(step.step), step.psnr(what)) for step in errors.steps if getattr(step, what) > 0]
    return Series(name, [x for x, _ in points], [y for _, y in points])


def _horizon_row(step: StepErrors) -> str:
    badge = '<span class="yes">yes</span>' if step.passed else '<span class="no">no</span>'
    cells = "".join(
        f'<td class="number">{cell}</td>'
        for cell in (
            f"{step.count:,}",
            *(f"{number(step.psnr(what))} dB" for what, _ in HORIZON_CURVES),
            number(step.imagined_moving),
            number(step.copied_moving),
        )
    )
    return f"<tr><td>{step.step}</td>{cells}<td>{badge}</td></tr>"

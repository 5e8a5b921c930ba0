"""The section of the page that compares dreams with the game."""

from __future__ import annotations

from rem_atari.report.analysis import Drawn, HorizonErrors, StepErrors
from rem_atari.report.charts import Chart
from rem_atari.report.contents import Report
from rem_atari.report.heldout_signs import MOST_DRIFT
from rem_atari.report.history import Series
from rem_atari.report.sections import chart_figure
from rem_atari.report.text import count, number, percent, section, table

HORIZON_CURVES: tuple[tuple[Drawn, str], ...] = (
    ("imagined", "imagined"),
    ("copied", "copy the last frame"),
    ("redrawn", "real, through the tokenizer"),
)
"""The curves over the imagined steps, by the names of `StepErrors`."""


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
    numeric = ("Frames", "Imagined", "Copied", "Tokenizer", "Moving: imagined", "Moving: copied")
    rows = "".join(map(_horizon_row, errors.steps))
    steps = table(("Step", *numeric, "Better?"), rows, numeric=numeric)
    note = (
        '<p class="small faint">Moving: mean squared error over the pixels in which the real frame'
        " differs from the start.</p>"
    )
    charts = f'<div class="charts">{drawing}{_drift_chart(report)}</div>'
    return section(title, f"{lead}{charts}{_drift(report)}{_returns(report)}{steps}{note}")


def _drift_chart(report: Report) -> str:
    """How many imagined frames must show too much or too little, over the steps."""
    drift = report.quality.drift
    if drift is None:
        return ""
    steps = [float(step.step) for step in drift.steps]
    chart = Chart(
        title="Drift: frames with too much or too little of a colour, share",
        x_label="imagined steps",
        series=[
            Series("dreams, at least", steps, [step.distance for step in drift.steps]),
            Series("chance alone", steps, [step.chance for step in drift.steps]),
        ],
        level=("a sign above", MOST_DRIFT),
    )
    return chart_figure(chart)


def _drift(report: Report) -> str:
    """What drift means, and what dreams lose or gain."""
    drift = report.quality.drift
    if drift is None:
        return ""
    worst = drift.worst
    swatch = f'<i class="swatch" style="background: {worst.colour}"></i><code>{worst.colour}</code>'
    return (
        "<p>Drift counts the pixels of each colour in a frame, in dreams from"
        f" {count(drift.starts, 'held-out start')} and in the real frames after as many steps: a thing that"
        " vanishes from a dream, or shows twice, shows here. The curve of dreams is the largest gap between"
        " the two cumulative distributions of any colour; that of chance is what dreams without drift reach"
        f" in one of twenty comparisons. The gap is largest after {count(worst.step, 'step')}, in {swatch}:"
        f" {number(worst.imagined_pixels)} pixels an imagined frame, {number(worst.real_pixels)} a real one;"
        f" {percent(worst.imagined_without)} of the imagined frames and {percent(worst.real_without)} of the"
        " real ones show none of it.</p>"
    )


def _returns(report: Report) -> str:
    """What the controller earns in its dreams, beside the game."""
    returns = report.quality.returns
    if returns is None:
        return ""
    return (
        f"<p>In {count(returns.steps, 'step')} of dreams in which the agent acts it earns"
        f" {number(returns.imagined)}, and from the same states in the game {number(returns.real)} (standard"
        f" error of the difference: {number(returns.standard_error, 2)}).</p>"
    )


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

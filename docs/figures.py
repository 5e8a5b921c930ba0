"""Draws the pictures of the docs from the metrics of runs, which lie beside the agent.

    python docs/figures.py

`examples/rem_atari/results/catch/seed-N.jsonl` is the metrics.jsonl of
``rem-atari train --preset catch --seed N``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "examples" / "rem_atari" / "results"
COLORS = ("#2a6f97", "#c7741b", "#5b8c5a")


def main() -> None:
    """Write every picture."""
    plt.rcParams |= {"font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "retpop"}
    draw_catch(sorted((RESULTS / "catch").glob("seed-*.jsonl")), CHECKOUT / "docs" / "catch.svg")


def draw_catch(runs: list[Path], path: Path) -> None:
    """Return on Catch over environment steps, one line a seed."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for run, color in zip(runs, COLORS, strict=True):
        lines = [json.loads(line) for line in run.read_text().splitlines()]
        played = [line for line in lines if line["phase"] == "collect" and "mean_game_return" in line]
        axes.plot(
            *_curve(played, "mean_game_return"), color=color, linewidth=1.5, label=run.stem.replace("-", " ")
        )
        tested = [line for line in lines if line["phase"] == "evaluate"]
        axes.plot(*_curve(tested, "mean_return"), color=color, marker="o", linestyle="none", markersize=5)
        random = next(line["mean_return"] for line in lines if line["phase"] == "random")
        axes.axhline(random, color=color, linewidth=0.8, linestyle=":")
    axes.plot([], [], color="#666", marker="o", linestyle="none", markersize=5, label="evaluation")
    axes.plot([], [], color="#666", linewidth=0.8, linestyle=":", label="random play")
    axes.set(xlabel="environment steps", ylabel="mean return of a game", ylim=(-1.05, 1.05))
    axes.set_title("Catch: games while collecting (lines) and in evaluations (dots)", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _curve(lines: list[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    return [line["env_steps"] for line in lines], [line[metric] for line in lines]


if __name__ == "__main__":
    main()

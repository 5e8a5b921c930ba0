"""How fast the agent learns in two checkouts, side by side: CPU time of updates at the sizes of a preset.

Both learn by the earlier one's preset, so that both do the same work.

    python -m benchmarks.learning_speed ../earlier-checkout . --rounds 4

Each checkout works in a process of its own, with one thread. They take turns, so that both see the same load
of the machine. Compared are the least CPU time of a round and the median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORK = {"world_model": 5, "imagine": 2, "controller": 2}
"""Parts, and how often a round repeats each: updates, and a batch's imagination alone."""

PRESET = """
import json, sys
try:
    from rem_atari.config.presets import PRESETS
except ImportError:  # where they stood earlier
    from rem_atari.presets import PRESETS
print(json.dumps(PRESETS[sys.argv[1]].to_dict()))
"""

WORKER = """
import json, sys, time
import torch
from rem_atari.config import Config
try:
    from rem_atari.replay.buffer import Replay
except ImportError:
    from rem_atari.replay import Replay
from rem_atari.training.assembly import assemble
from rem_atari.training.setup import prepare_training

config = Config.from_dict(json.loads(sys.argv[1]))
with prepare_training(config) as parts:
    side = config.env.frame_size
    replay = Replay((side, side, 3), 4000, folder=None, seed=0)
    state = assemble(config, parts, replay, lambda text: None)
    state.env.reset()
    generator = torch.Generator().manual_seed(0)
    while replay.num_steps < 1500:
        drawn = torch.randint(state.env.num_actions, (config.env.num_envs,), generator=generator)
        state.env.play(drawn.numpy())
    for name in ("world_model", "controller"):
        state.phases[name].prepare(0)
    state.tokens.tokenize(replay.sample_sequences(1500, config.world_model.sequence_blocks, min_real=1))
    segments = state.phases["controller"].draw()
    # A model that has not learned would end every other episode, and ended ones cost nothing more.
    state.agent.world_model.end_head[-1].bias.data.copy_(torch.tensor([100.0, 0.0]))

    def work(name):
        if name == "imagine":
            with torch.no_grad():
                return state.phases["controller"].imagine(segments)
        module = state.phases[name].component.module.train()
        state.phases[name].update()
        return module.eval()

    print("ready", flush=True)
    for line in sys.stdin:
        name, count = line.split()
        started = time.process_time()
        for _ in range(int(count)):
            work(name)
        print((time.process_time() - started) / int(count), flush=True)
"""


class Side:
    """A checkout at work."""

    def __init__(self, checkout: Path, config: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, config],
            cwd=checkout,  # comes before all paths that modules are looked for in
            env=_environment(checkout),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def seconds(self, part: str, count: int) -> float:
        """CPU time of one of ``count`` repetitions of a part."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{part} {count}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def end(self) -> None:
        """Let the process end."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a checkout's process has ended; its error stands above.")
        return line.strip()


def _environment(checkout: Path) -> dict[str, str]:
    paths = os.pathsep.join((str(checkout.resolve()), str(checkout.resolve() / "examples")))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _config(checkout: Path, preset: str) -> str:
    """A preset of a checkout, as JSON."""
    command = [sys.executable, "-c", PRESET, preset]
    done = subprocess.run(
        command, cwd=checkout, env=_environment(checkout), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a line for each part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_speed", description=__doc__)
    parser.add_argument("checkouts", type=Path, nargs=2, help="an earlier one, and a later one")
    parser.add_argument("--preset", default="minatar")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args(arguments)
    config = _config(options.checkouts[0], options.preset)
    sides = [Side(checkout, config) for checkout in options.checkouts]
    for part, count in WORK.items():
        rounds = [[side.seconds(part, count) for side in sides] for _ in range(options.rounds + 1)][1:]
        before, after = zip(*rounds, strict=True)
        found = [(summary(before), summary(after)) for summary in (min, statistics.median)]
        times = ", ".join(f"{1e3 * b:.1f} -> {1e3 * a:.1f} ms ({b / a:.2f}x)" for b, a in found)
        print(f"{part}: least and median {times}", flush=True)
    for side in sides:
        side.end()


if __name__ == "__main__":
    main()

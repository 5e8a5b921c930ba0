"""Memory: frames take their bytes once, and a long run takes no more than a short one."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rem_atari.replay.buffer import Replay

SHAPE = (64, 64, 3)
FRAME_BYTES = 64 * 64 * 3
MEGABYTE = 2**20


@pytest.fixture
def traced() -> Iterator[None]:
    """Every allocation of Python and numpy is counted."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def fill(replay: Replay, steps: int) -> None:
    frame = np.zeros(replay.frame_shape, dtype=np.uint8)
    for step in range(steps):
        frame[:] = step % 256
        replay.append(step % 4, frame, 0, 0.0, step % 50 > 45, False)
        if (step + 1) % 200 == 0:
            replay.flush()


@pytest.mark.usefixtures("traced")
def test_frames_take_their_bytes_once(tmp_path: Path) -> None:
    """After they are reserved nothing grows, not while they come, are written, sampled and loaded again."""
    steps = 2000
    replay = Replay(SHAPE, steps, folder=tmp_path, seed=0)
    reserved, _ = tracemalloc.get_traced_memory()
    assert steps * FRAME_BYTES < reserved < steps * FRAME_BYTES + MEGABYTE
    fill(replay, steps)
    for _ in range(20):
        replay.sample_sequences(16, 10, min_real=1)
    replay.median_frame()
    now, peak = tracemalloc.get_traced_memory()
    assert now - reserved < MEGABYTE / 2
    # On the way: a shard, its bytes, and a batch; far less than the frames once more.
    assert peak - reserved < 10 * MEGABYTE
    del replay
    tracemalloc.reset_peak()
    loaded = Replay.load(tmp_path)
    assert loaded.num_steps == steps
    now, peak = tracemalloc.get_traced_memory()
    assert now < reserved + MEGABYTE / 2
    assert peak < now + 10 * MEGABYTE


RESIDENT = """
import os
def resident():
    # Bytes in memory now; ru_maxrss would remember what the imports took for a moment.
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
"""

PUBLISHED_SIZE = (
    RESIDENT
    + """
import sys
from pathlib import Path
import numpy as np
from rem_atari.replay.buffer import Replay
before = resident()
replay = Replay((64, 64, 3), 100_000, folder=Path(sys.argv[1]), seed=0)
reserved = resident() - before
frame = np.ones((64, 64, 3), np.uint8)
for step in range(100_000):
    replay.append(0, frame, 0, 0.0, step % 50 == 49, False)
    if step % 200 == 199:
        replay.flush()
filled = resident() - before
for _ in range(200):
    replay.sample_sequences(64, 10, min_real=1)
print(reserved, filled, resident() - before)
"""
)

LONG_RUN = (
    RESIDENT
    + """
import io, sys
from dataclasses import replace
from pathlib import Path
from rem_atari.config.presets import PRESETS
from rem_atari.runs.progress import make_progress
from rem_atari.runs.folder import create_run_folder
from rem_atari.training.setup import prepare_training
from rem_atari.training.signals import StopRequest
from rem_atari.training.trainer import Trainer
debug = PRESETS["debug"]
schedule = replace(debug.schedule, epochs=120, collect_epochs=120)
config = replace(debug, schedule=schedule, evaluation=replace(debug.evaluation, every=0))
class Measuring(Trainer):
    def _save(self, **options):
        super()._save(**options)
        print(resident())
with prepare_training(config) as parts:
    run = create_run_folder(Path(sys.argv[1]), config)
    Measuring(config, run, parts, make_progress([], 120, io.StringIO()), StopRequest()).run()
"""
)


def numbers_of(script: str, folder: Path) -> list[int]:
    """What a script prints in a process of its own."""
    command = [sys.executable, "-c", script, str(folder)]
    return [int(word) for word in subprocess.check_output(command, text=True, timeout=600).split()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_published_size_takes_1_2_gigabytes_and_only_as_it_fills(tmp_path: Path) -> None:
    frames = 100_000 * FRAME_BYTES
    reserved, filled, sampled = numbers_of(PUBLISHED_SIZE, tmp_path)
    assert reserved < 0.02 * frames
    assert frames < filled < 1.05 * frames
    assert sampled < filled + 32 * MEGABYTE


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_long_run_takes_no_more_than_a_short_one(tmp_path: Path) -> None:
    """Beyond its experience: 24 x 24 pixels in three colours, 32 steps an epoch."""
    resident = numbers_of(LONG_RUN, tmp_path / "run")
    assert len(resident) == 120
    experience = 90 * 32 * (24 * 24 * 3 + 100)
    assert resident[-1] - resident[29] < experience + 8 * MEGABYTE

"""An environment that raises, crashes or hangs: another takes its place, and nothing else is lost."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from faulty_env import FUSES, FaultyCatch, lay_fuses, make_faulty

from rem_atari.cli import main
from rem_atari.config import EnvConfig
from rem_atari.envs import UnknownGameError, make_env, process, vector
from rem_atari.envs.catch import Catch
from rem_atari.envs.vector import VectorEnv
from rem_atari.errors import EnvironmentDiedError, RunWarning
from rem_atari.play.real_env import RealEnv
from rem_atari.replay.buffer import Replay
from rem_atari.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which processes there are")

STAY = 1


class InTurn:
    """Builds the environments given one after another, then Catch; for processes it does so when pickled."""

    def __init__(self, *makes: Callable[[], gymnasium.Env]) -> None:
        self._makes = iter(makes)

    def __call__(self) -> gymnasium.Env:
        return next(self._makes, Catch)()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (next(self._makes, Catch),)


def pids_of(env: VectorEnv) -> list[int]:
    return [host.pid for host in env._hosts]


def is_gone(pid: int, seconds: float = 0.0) -> bool:
    """Whether there is no such process any more, not even a zombie; or it ends within so many seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with open(descriptor, "rb"):
        return seconds > 0 and bool(select.select([descriptor], [], [], seconds)[0])


def play(env: RealEnv, steps: int) -> None:
    for _ in range(steps):
        env.play(np.array([STAY] * env.num_envs))


def take_steps(env: VectorEnv, steps: int) -> int:
    """Start and step all environments: how many steps were lost."""
    env.reset()
    return sum(int(env.step([STAY] * env.num_envs).lost.sum()) for _ in range(steps))


def ball_rows(frames: np.ndarray) -> list[int]:
    """The cell's row that the ball is in, for frames (E, 24, 24, 3) of Catch."""
    return [int((frame == 255).all(axis=-1).any(axis=-1).argmax()) // 4 for frame in frames]


FAULTS = {
    "raise": "it raised ValueError: the ball is gone",
    "exit": r"its process \d+ ended with exit code 5",
    "kill": r"its process \d+ was killed by SIGKILL",
    "stop": r"its process \d+ did not answer within 3 s",
    "sleep": r"its process \d+ did not answer within 3 s",
}


def test_each_way_to_die_costs_one_open_episode_and_nothing_else(tmp_path: Path) -> None:
    faulty = [partial(make_faulty, lay_fuses(tmp_path / fault, fault), 2) for fault in FAULTS]
    make = InTurn(Catch, *faulty, Catch)  # the first one is looked at in this process
    with closing(VectorEnv(make, len(FAULTS) + 1, seed=3, processes=True, timeout=3.0)) as env:
        env.reset()
        before = pids_of(env)
        assert not env.step([STAY] * 6).lost.any()
        with pytest.warns(RunWarning) as warned:
            step = env.step([STAY] * 6)
        for index, (warning, complaint) in enumerate(zip(warned, FAULTS.values(), strict=True)):
            assert re.match(f"environment {index} died: {complaint}; a new one", str(warning.message))
        assert step.lost.tolist() == step.truncated.tolist() == [True] * 5 + [False]
        assert not step.terminated.any()
        assert step.rewards.tolist() == [0] * 6
        assert ball_rows(step.frames) == [0] * 5 + [2], "new games, and the old one that goes on"
        assert [game.length for game in env.open_games()] == [0] * 5 + [2]
        after = pids_of(env)
        assert [old == new for old, new in zip(before, after, strict=True)] == [False] * 5 + [True]
        assert [is_gone(pid) for pid in before] == [True] * 5 + [False]
        games = [game for _ in range(5) for game in env.step([STAY] * 6).game_returns]
        assert [game.length for game in games] == [5] * 6, "whole games only: those given up are not reported"
    assert all(is_gone(pid) for pid in after)


def test_an_exception_is_survived_without_processes_too(tmp_path: Path) -> None:
    make = partial(make_faulty, lay_fuses(tmp_path / "fuses", "raise"), 3)
    env = VectorEnv(make, 2, seed=3)
    env.reset()
    env.step([STAY] * 2)
    env.step([STAY] * 2)
    with pytest.warns(RunWarning, match="environment 0 died: it raised ValueError: the ball is gone"):
        step = env.step([STAY] * 2)
    assert step.lost.tolist() == [True, False]
    assert ball_rows(step.frames) == [0, 3]


def test_the_replay_ends_the_open_episode_as_truncated_and_invents_no_step(tmp_path: Path) -> None:
    class NoTokenizer:
        embed = staticmethod(lambda codes: codes)

    make = partial(make_faulty, lay_fuses(tmp_path / "fuses", "raise"), 4)
    replay = Replay((24, 24, 3), 100, seed=0)
    env = RealEnv(VectorEnv(make, 2, seed=3), NoTokenizer(), replay)
    env._frames = env._env.reset()
    with pytest.warns(RunWarning):
        play(env, 7)
    # Environment 0: 3 steps, then lost, then 3 steps of a new game; environment 1: 5 steps and 2.
    assert replay.num_steps == 6 + 7
    assert replay.num_episodes == 4
    batch = replay.sample_sequences(200, 5, min_real=1)
    lengths = {
        tuple(mask): (ended, cut)
        for mask, ended, cut in zip(
            batch.mask.tolist(), batch.ended.any(1).tolist(), batch.truncated.any(1).tolist(), strict=True
        )
    }
    assert (False, True) in lengths.values(), "an episode that was cut short"
    assert (True, False) in lengths.values(), "an episode that ended"


@pytest.mark.parametrize("at", [-1, 0, 1], ids=["built", "reset", "step"])
def test_one_that_dies_again_and_again_stops_the_run(tmp_path: Path, at: int) -> None:
    make = partial(make_faulty, lay_fuses(tmp_path / "fuses", *["raise"] * 10), at)
    env = VectorEnv(InTurn(Catch, partial(make_faulty, tmp_path / "fuses", 1), make, make, make), 2, seed=0)
    complaint = r"environment 1 died 4 times within 1000 steps; the last time it raised .*the ball is gone"
    with pytest.warns(RunWarning), pytest.raises(EnvironmentDiedError, match=complaint):
        take_steps(env, 5)


def test_deaths_far_apart_do_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "DEATH_WINDOW", 30)
    env = VectorEnv(partial(make_faulty, lay_fuses(tmp_path / "fuses", *["raise"] * 10), 10), 1, seed=0)
    with pytest.warns(RunWarning):
        assert take_steps(env, 95) == 9


def test_successors_are_seeded_and_differently(tmp_path: Path) -> None:
    def seeds(seed: int, folder: Path) -> list[int]:
        built: list[FaultyCatch] = []

        def make() -> FaultyCatch:
            built.append(FaultyCatch(folder, 2))
            return built[-1]

        lay_fuses(folder, *["raise"] * 4)
        env = VectorEnv(make, 2, seed=seed)
        with pytest.warns(RunWarning):
            take_steps(env, 8)
        return [env.first_seed for env in built]

    first = seeds(0, tmp_path / "a")
    assert len(first) == len(set(first)) == 6
    assert first == seeds(0, tmp_path / "b")
    assert not set(first) & set(seeds(1, tmp_path / "c"))


def test_processes_play_exactly_what_this_process_plays() -> None:
    config = EnvConfig(id="rem_atari/Catch-v0", frame_size=24)
    make = partial(make_env, config, training=True)
    draw = np.random.default_rng(0)
    actions = draw.integers(3, size=(23, 3))
    with (
        closing(VectorEnv(make, 3, seed=5, processes=True)) as there,
        closing(VectorEnv(make, 3, seed=5)) as here,
        closing(VectorEnv(make, 3, seed=9, processes=True)) as resumed,
    ):
        assert (there.num_actions, there.action_names) == (here.num_actions, here.action_names)
        assert (there.reset() == here.reset()).all()
        for step in range(23):
            if step == 12:
                states = json.loads(json.dumps(there.resume_states()))
                assert states == here.resume_states()
                assert resumed.resume(states, seed=0) == [None] * 3
                assert resumed.open_games() == here.open_games()
            answers = [env.step(actions[step]) for env in (there, here, *([resumed] if step >= 12 else []))]
            for answer in answers:
                assert (answer.frames == answers[0].frames).all()
                assert answer.rewards.tolist() == answers[0].rewards.tolist()
                assert answer.terminated.tolist() == answers[0].terminated.tolist()
                assert answer.game_returns == answers[0].game_returns
        # SIGINT and SIGTERM are the parent's business; a dead one cannot be saved, and saving does not wait.
        os.kill(pids_of(there)[0], signal.SIGTERM)
        os.kill(pids_of(there)[0], signal.SIGINT)
        os.kill(pids_of(there)[1], signal.SIGKILL)
        assert [state is None for state in there.resume_states()] == [False, True, False]
        with pytest.warns(RunWarning, match="environment 1 died"):
            assert there.step([STAY] * 3).lost.tolist() == [False, True, False]
        states[0]["env"]["layers"].pop()
        with pytest.raises(ValueError, match=r"environment 0 cannot go on .*consists of"):
            here.resume(states, seed=0)


def test_what_cannot_be_built_fails_alike_with_processes() -> None:
    make = partial(make_env, EnvConfig(id="Nowhere-v0"), training=True)
    for processes in (False, True):
        with pytest.raises(UnknownGameError, match="Nowhere"):
            VectorEnv(make, 1, seed=0, processes=processes)


def test_one_that_hangs_while_it_starts_or_closes_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    monkeypatch.setattr(process, "CLOSE_SECONDS", 0.1)
    host = process.ProcessHost(partial(make_faulty, lay_fuses(tmp_path / "fuses", "sleep"), -1), timeout=9.0)
    host.start("describe")
    with pytest.raises(EnvironmentDiedError, match=r"did not answer within 0\.5 s"):
        host.finish()
    host.begin_close()
    host.close()
    assert is_gone(host.pid)


PARENT = """
import sys
from functools import partial
from pathlib import Path
sys.path[:] = {path!r}
from faulty_env import make_faulty
from rem_atari.envs.vector import VectorEnv
if __name__ == "__main__":
    env = VectorEnv(partial(make_faulty, Path({fuses!r}), 1), 2, seed=0, processes=True, timeout=1.0)
    env.reset()
    print(*[host.pid for host in env._hosts], flush=True)
    env._hosts[0].start("step", 1)
    sys.stdin.read()
"""


def test_no_process_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    """One waits for its next question, the other one hangs where even the interpreter stands still."""
    fuses = lay_fuses(tmp_path / "fuses", "sleep in C")
    code = PARENT.format(path=sys.path, fuses=str(fuses))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(is_gone(pid) for pid in pids)
        parent.kill()
    assert all(is_gone(pid, seconds=30) for pid in pids)


@pytest.mark.usefixtures("without_report")
def test_a_run_that_ends_with_its_environments_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FUSES, str(lay_fuses(tmp_path / "fuses", *["raise"] * 20)))
    run = tmp_path / "run"
    words = ["--env.id", "faulty_env:Faulty-v0", "--evaluation.random-episodes", "0", "--run", str(run)]
    assert main(["train", "--preset", "debug", *words]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"rem-atari: environment \d died 4 times within 1000 steps; the last time it raised ValueError:"
        r" the ball is gone",
        last,
    )
    shutil.rmtree(tmp_path / "fuses")
    (tmp_path / "fuses").mkdir()
    assert load_checkpoint(run / "checkpoints").state["env_steps"] == 2 * 4 * 5
    assert main(["resume", str(run)]) == 0


@pytest.mark.slow
def test_a_run_whose_environments_die_goes_on_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FUSES, str(lay_fuses(tmp_path / "fuses", "kill", "raise")))
    run = tmp_path / "run"
    words = ["--env.id", "faulty_env:Faulty-v0", "--env.processes", "--run", str(run)]
    assert main(["train", "--preset", "debug", *words]) == 0
    errors = capsys.readouterr().err
    assert re.search(
        r"rem-atari: warning: environment \d died: its process \d+ was killed by SIGKILL", errors
    )
    assert re.search(r"rem-atari: warning: environment \d died: it raised ValueError", errors)
    assert (run / "report.html").is_file()

"""Collecting: what is recorded is what was played, whoever plays; bounds; what the statistics say."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rem_atari.config import ControllerConfig
from rem_atari.config.presets import PRESETS
from rem_atari.envs.catch import Catch
from rem_atari.envs.vector import GameReturn, VectorEnv
from rem_atari.errors import StoppedError
from rem_atari.models.controller import Carry, Controller
from rem_atari.models.tokenizer import Tokenizer
from rem_atari.play import collector
from rem_atari.play.collector import Collection, collect, collect_random
from rem_atari.play.real_env import RealEnv
from rem_atari.replay.buffer import Replay, ReplayFullError

FRAME = (24, 24, 3)
DEBUG = PRESETS["debug"]


class Row(NamedTuple):
    frame: np.ndarray
    action: int
    reward: float
    terminated: bool
    truncated: bool


def catch_envs(num_envs: int = 2) -> VectorEnv:
    return VectorEnv(Catch, num_envs, seed=7)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(DEBUG.tokenizer, frame_size=24)


class SpyReplay(Replay):
    """A replay that also keeps what it was given, by environment."""

    def __init__(self, capacity: int = 1000) -> None:
        super().__init__(FRAME, capacity, seed=0)
        self.given: dict[int, list[Row]] = defaultdict(list)

    def append(
        self, env_index: int, frame: np.ndarray, action: int, reward: float, terminated: bool, truncated: bool
    ) -> None:
        super().append(env_index, frame, action, reward, terminated, truncated)
        self.given[env_index].append(Row(frame.copy(), action, reward, terminated, truncated))

    def actions(self, env_index: int) -> list[int]:
        return [row.action for row in self.given[env_index]]


class SpyController(Controller):
    """A controller that remembers the actions it was told and the codes it saw."""

    def __init__(self, tokenizer: Tokenizer, cfg: ControllerConfig = DEBUG.controller) -> None:
        torch.manual_seed(1)
        super().__init__(
            cfg, grid=tokenizer.grid, code_dim=tokenizer.code_dim, frame_size=FRAME, num_actions=3
        )
        self.told: list[Tensor] = []
        self.seen: list[Tensor] = []

    def forward(self, codes: Tensor, carry: Carry):
        self.seen.append(codes)
        return super().forward(codes, carry)

    def observe_action(self, actions: Tensor, carry: Carry) -> Carry:
        self.told.append(actions)
        return super().observe_action(actions, carry)


def make(tokenizer: Tokenizer, *, num_envs: int = 2, capacity: int = 1000) -> tuple[RealEnv, SpyReplay]:
    replay = SpyReplay(capacity)
    env = RealEnv(catch_envs(num_envs), tokenizer, replay)
    env.reset()
    return env, replay


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nothing(steps: int) -> None:
    """An `after_step` that lets the collection go on."""


def play(
    env: RealEnv,
    controller: Controller,
    carry: Carry | None = None,
    *,
    steps: int,
    seed: int | torch.Generator = 0,
) -> Collection:
    source = generator(seed) if isinstance(seed, int) else seed
    collection = Collection(carry)
    collect(
        env,
        controller,
        collection,
        steps=steps,
        temperature=1.0,
        epsilon=0.3,
        generator=source,
        after_step=nothing,
    )
    return collection


def play_random(env: RealEnv, *, steps: int) -> Collection:
    collection = Collection()
    collect_random(env, collection, steps=steps, generator=generator(), after_step=nothing)
    return collection


def assert_recorded_what_was_played(replay: SpyReplay, num_envs: int) -> None:
    """Play the recorded actions again, in environments of the same seed, and compare everything."""
    again = catch_envs(num_envs)
    frames = again.reset()
    for rows in zip(*(replay.given[index] for index in range(num_envs)), strict=True):
        answer = again.step([row.action for row in rows])
        for index, row in enumerate(rows):
            np.testing.assert_array_equal(row.frame, frames[index])  # the frame that was acted on
            assert row.reward == answer.rewards[index]
            assert row.terminated == answer.terminated[index]
            assert not row.truncated
        frames = answer.frames


def test_collect_records_frames_acted_on_and_actions_taken(tokenizer: Tokenizer) -> None:
    env, replay = make(tokenizer, num_envs=3)
    controller = SpyController(tokenizer)
    stats = play(env, controller, steps=60)
    assert stats.steps == replay.num_steps == 60
    assert_recorded_what_was_played(replay, 3)
    assert torch.stack(controller.told).T.tolist() == [replay.actions(index) for index in range(3)]


def test_collect_random_records_in_the_same_way(tokenizer: Tokenizer) -> None:
    env, replay = make(tokenizer, num_envs=3)
    stats = play_random(env, steps=300)
    assert stats.steps == replay.num_steps == 300
    assert_recorded_what_was_played(replay, 3)
    actions = [replay.actions(index) for index in range(3)]
    assert (abs(np.bincount(np.ravel(actions), minlength=3) - 100) < 5 * math.sqrt(300 * 2 / 9)).all()
    assert len(set(map(tuple, actions))) == 3  # every environment has draws of its own


def test_the_controller_sees_the_codes_of_the_frames_it_acts_on(tokenizer: Tokenizer) -> None:
    env, replay = make(tokenizer)
    controller = SpyController(tokenizer)
    play(env, controller, steps=20)
    for seen, *rows in zip(controller.seen, replay.given[0], replay.given[1], strict=True):
        frames = torch.from_numpy(np.stack([row.frame for row in rows]))
        torch.testing.assert_close(seen, tokenizer.embed(tokenizer.encode(frames)), rtol=0, atol=0)


def test_step_answers_in_tokens(tokenizer: Tokenizer) -> None:
    env, _ = make(tokenizer)
    for time in range(1, 11):
        answer = env.step(torch.tensor([0, 2]))
        torch.testing.assert_close(
            answer.seen, tokenizer.embed(tokenizer.encode(torch.from_numpy(env.frames)))
        )
        assert answer.seen.shape == (2, tokenizer.num_tokens, tokenizer.code_dim)
        assert answer.rewards.dtype == torch.float32
        over = time % 5 == 0
        assert answer.ended.tolist() == answer.restarted.tolist() == [over, over]
        assert not answer.truncated.any()
        assert (answer.rewards != 0).tolist() == [over, over]


class Cut(Catch):
    """Catch that is cut short after two steps."""

    def step(self, action: int):
        frame, reward, terminated, _, info = super().step(action)
        return frame, reward, terminated, self._ball_row == 2, info


def test_truncations_restart_and_are_recorded_apart(tokenizer: Tokenizer) -> None:
    replay = Replay(FRAME, 100, seed=0)
    env = RealEnv(VectorEnv(Cut, 1, seed=0), tokenizer, replay)
    env.reset()
    answers = [env.step(torch.tensor([1])) for _ in range(4)]
    assert [bool(answer.restarted) for answer in answers] == [False, True, False, True]
    assert [bool(answer.truncated) for answer in answers] == [False, True, False, True]
    assert not any(bool(answer.ended) for answer in answers)
    batch = replay.sample_sequences(20, 4, min_real=2)
    assert batch.mask.sum(1).tolist() == [2] * 20
    assert batch.truncated[:, 1].all()
    assert not batch.ended.any()


def test_two_collections_equal_one_and_nothing_is_lost_between(tokenizer: Tokenizer) -> None:
    whole_env, whole = make(tokenizer)
    play(whole_env, SpyController(tokenizer), steps=88)
    env, replay = make(tokenizer)
    source, controller, carry = generator(), SpyController(tokenizer), None
    for steps in (6, 40, 42):  # none of them ends where an episode does
        carry = play(env, controller, carry, steps=steps, seed=source).carry
    for index in range(2):
        assert replay.actions(index) == whole.actions(index)
        for one, other in zip(replay.given[index], whole.given[index], strict=True):
            np.testing.assert_array_equal(one.frame, other.frame)


def test_collecting_takes_no_gradient(tokenizer: Tokenizer) -> None:
    env, _ = make(tokenizer)
    controller = SpyController(tokenizer)
    carry = play(env, controller, steps=4).carry
    assert not any(part.requires_grad for part in carry)
    assert not env.observe().requires_grad


def test_statistics(tokenizer: Tokenizer) -> None:
    env, replay = make(tokenizer)
    controller = SpyController(tokenizer)
    torch.nn.init.zeros_(controller.actor.weight)
    torch.nn.init.zeros_(controller.actor.bias)
    stats = play(env, controller, steps=54)
    assert stats.metrics()["entropy"] == pytest.approx(math.log(3))
    assert stats.episodes == len(stats.games) == 10
    rewards = [row.reward for index in range(2) for row in replay.given[index]]
    assert sum(game.raw_return for game in stats.games) == sum(rewards)
    assert all(game.length == 5 for game in stats.games)
    # The next collection counts its own games, those that began before it included.
    stats = play(env, controller, steps=6)
    assert stats.episodes == len(stats.games) == 2
    assert [game.length for game in stats.games] == [5, 5]


def test_metrics() -> None:
    games = [GameReturn(0, 3.0, 5), GameReturn(1, 6.0, 5)]
    collection = Collection(steps=40, episodes=4, games=games, total_entropy=20.0, seconds=2.0)
    metrics = {"steps": 40, "episodes": 4, "entropy": 0.5, "phase_seconds": 2.0, "rate": 20.0}
    assert collection.metrics() == metrics | {"mean_game_return": 4.5}
    collection.games.clear()
    assert collection.metrics() == metrics


def test_a_collection_survives_as_json() -> None:
    games = [GameReturn(0, 3.0, 5), GameReturn(1, 6.1, 5)]
    collection = Collection(steps=40, episodes=4, games=games, total_entropy=0.1 + 0.2, seconds=2.0)
    again = Collection.from_state(json.loads(json.dumps(collection.state())), None)
    assert again == collection


def test_steps_are_rounded_up_to_all_environments(tokenizer: Tokenizer) -> None:
    env, replay = make(tokenizer, num_envs=3)
    assert play(env, SpyController(tokenizer), steps=7).steps == 9
    assert play_random(env, steps=7).steps == 9
    assert replay.num_steps == 18


@pytest.mark.parametrize("who", ["controller", "nobody"])
def test_each_step_is_told_and_the_clock_looked_at_after_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """The clock moves a second a step of two environments."""
    env, replay = make(tokenizer)
    controller = SpyController(tokenizer)
    told: list[int] = []
    monkeypatch.setattr(collector.time, "monotonic", lambda: float(len(told)))

    def collect_for(seconds: float | None) -> Collection:
        told.clear()
        collection = Collection()
        bounds = {"steps": 100, "generator": generator(), "after_step": told.append, "max_seconds": seconds}
        if who == "nobody":
            collect_random(env, collection, **bounds)
        else:
            collect(env, controller, collection, temperature=1.0, epsilon=0.0, **bounds)
        return collection

    assert collect_for(3.0).steps == 6
    assert told == [2, 2, 2]
    assert collect_for(0.0).steps == 2
    assert collect_for(1e6).steps == collect_for(None).steps == 100
    assert sum(told) == 100
    assert replay.num_steps == 208


@pytest.mark.parametrize("who", ["controller", "nobody"])
def test_a_collection_that_was_stopped_goes_on_as_if_it_had_not_been(tokenizer: Tokenizer, who: str) -> None:
    """Stopped after every step: the same steps, the same numbers, the same memory as in one go."""

    def stop(steps: int) -> None:
        raise StoppedError("enough")

    def go(env: RealEnv, collection: Collection, source: torch.Generator, after_step: Callable) -> None:
        common = {"steps": 54, "generator": source, "after_step": after_step}
        if who == "nobody":
            collect_random(env, collection, **common)
        else:
            controller = SpyController(tokenizer)
            collect(env, controller, collection, temperature=1.0, epsilon=0.3, **common)

    whole_env, whole_replay = make(tokenizer)
    whole = Collection()
    go(whole_env, whole, generator(), nothing)
    env, replay = make(tokenizer)
    collection, source = Collection(), generator()
    while collection.steps < 54:
        before = collection.steps
        with pytest.raises(StoppedError):
            go(env, collection, source, stop)
        assert collection.steps == replay.num_steps == before + 2
    assert collection.state() | {"seconds": 0} == whole.state() | {"seconds": 0}
    if who == "controller":
        assert all(torch.equal(one, other) for one, other in zip(collection.carry, whole.carry, strict=True))
    for index in range(2):
        assert replay.actions(index) == whole_replay.actions(index)


def test_playing_without_a_replay(tokenizer: Tokenizer) -> None:
    env = RealEnv(catch_envs(), tokenizer, None)
    env.reset()
    assert play(env, SpyController(tokenizer), steps=10).steps == 10


def test_a_full_replay_is_an_error_or_ends_the_recording(tokenizer: Tokenizer) -> None:
    env, _ = make(tokenizer, capacity=7)
    with pytest.raises(ReplayFullError, match="capacity is 7"):
        play_random(env, steps=20)
    replay = SpyReplay(7)
    env = RealEnv(catch_envs(), tokenizer, replay, stop_recording_when_full=True)
    env.reset()
    assert play_random(env, steps=20).steps == 20
    assert replay.num_steps == 6  # a step of all environments or none
    assert_recorded_what_was_played(replay, 2)
    batch = replay.sample_segments(100, 3, min_real=3)
    assert batch.truncated[:, 2].all()


def test_reset_gives_up_open_episodes(tokenizer: Tokenizer) -> None:
    env, replay = make(tokenizer, num_envs=1)
    env.step(torch.tensor([1]))
    env.reset()
    for _ in range(5):
        env.step(torch.tensor([1]))
    assert replay.num_episodes == 2
    batch = replay.sample_sequences(50, 6, min_real=1)
    assert set(batch.mask.sum(1).tolist()) == {1, 2, 3, 4, 5}
    assert batch.truncated.any()


def test_games_are_handed_over_once(tokenizer: Tokenizer) -> None:
    env, _ = make(tokenizer)
    for _ in range(7):
        env.step(torch.tensor([1, 1]))
    assert [game.env_index for game in env.take_finished_games()] == [0, 1]
    assert env.take_finished_games() == []
    assert [game.length for game in env.open_games()] == [2, 2]


def test_reset_comes_first(tokenizer: Tokenizer) -> None:
    env = RealEnv(catch_envs(), tokenizer, None)
    with pytest.raises(RuntimeError, match=r"reset\(\) comes first"):
        env.step(torch.tensor([0, 0]))

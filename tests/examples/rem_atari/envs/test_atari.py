"""Atari preprocessing against raw frames stepped by hand; lives, bounds, seeds, names."""

from __future__ import annotations

import builtins
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from PIL import Image

from rem_atari.config import Config, EnvConfig
from rem_atari.envs import MissingExtraError, UnknownGameError, env_name, list_games, make_env
from rem_atari.envs.atari import NOOP, LifeLossEndsEpisode, NoopStart, SkipFrames
from rem_atari.runs.folder import default_run_path

NO_LIMIT = 10**9

# fmt: off
ATARI_100K = (
    "Alien", "Amidar", "Assault", "Asterix", "BankHeist", "BattleZone", "Boxing", "Breakout",
    "ChopperCommand", "CrazyClimber", "DemonAttack", "Freeway", "Frostbite", "Gopher", "Hero",
    "Jamesbond", "Kangaroo", "Krull", "KungFuMaster", "MsPacman", "Pong", "PrivateEye", "Qbert",
    "RoadRunner", "Seaquest", "UpNDown",
)
# fmt: on


def raw_game(game: str) -> gymnasium.Env:
    """The plain game, every frame, as gymnasium itself registers it."""
    list_games()  # registers them
    return gymnasium.make(f"{game}NoFrameskip-v4", disable_env_checker=True)


def resized(frame: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.BILINEAR))


class ScriptedGame(gymnasium.Env):
    """A game of `length` raw frames; frame t shows brightness `shades[t]`, lives follow `lives`."""

    def __init__(
        self,
        length: int,
        *,
        lives: list[int] | None = None,
        shades: list[int] | None = None,
        cut: bool = False,
    ) -> None:
        self.observation_space = Box(0, 255, (8, 8, 3), np.uint8)
        self.action_space = Discrete(3)
        self.length, self.cut = length, cut
        self.lives = lives or [1] * (length + 1)
        self.shades = shades or list(range(length + 1))
        self.games = 0
        self.actions: list[int] = []

    def _answer(self) -> tuple[np.ndarray, dict[str, Any]]:
        return np.full((8, 8, 3), self.shades[self.frame], np.uint8), {"lives": self.lives[self.frame]}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.frame = 0
        self.games += 1
        return self._answer()

    def step(self, action: int):
        self.frame += 1
        self.actions.append(action)
        over = self.frame >= self.length
        frame, info = self._answer()
        return frame, 1.0, over and not self.cut, over and self.cut, info


# --- against the emulator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("game", ["Breakout", "Pong", "MsPacman"])
def test_evaluation_frames_equal_raw_frames_stepped_by_hand(game: str) -> None:
    env = make_env(EnvConfig(game=game), training=False)
    raw = raw_game(game)
    seed = 5
    seen, _ = env.reset(seed=seed)
    raw.reset(seed=seed)
    frame, *_ = raw.step(NOOP)  # evaluation: exactly one no-op, one raw frame
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(seen, resized(frame))
    differs_from_maximum_first = False
    for action in np.random.default_rng(0).integers(env.action_space.n, size=60):
        seen, reward, terminated, truncated, _ = env.step(int(action))
        played = [raw.step(int(action)) for _ in range(4)]
        last_two = [played[2][0], played[3][0]]
        np.testing.assert_array_equal(seen, np.maximum(*(resized(frame) for frame in last_two)))
        assert reward == sum(float(step[1]) for step in played)
        assert not terminated
        assert not truncated
        differs_from_maximum_first |= bool((seen != resized(np.maximum(*last_two))).any())
    assert differs_from_maximum_first  # so the order is tested


def test_training_frames_equal_raw_frames_stepped_by_hand_over_a_life_loss() -> None:
    env = make_env(EnvConfig(game="Breakout"), training=True)
    raw = raw_game("Breakout")
    seed = 11
    seen, _ = env.reset(seed=seed)
    raw.reset(seed=seed)
    noops = raw.unwrapped.np_random.integers(1, 30, endpoint=True)
    for _ in range(noops):
        frame, *_ = raw.step(NOOP)
    np.testing.assert_array_equal(seen, resized(frame))
    lives, lives_lost = 5, 0
    rng = np.random.default_rng(0)
    for _ in range(150):
        action = int(rng.integers(4))
        seen, _, terminated, _, _ = env.step(action)
        played = [raw.step(action) for _ in range(4)]
        lives_now = played[-1][4]["lives"]
        assert terminated == (lives_now < lives)
        assert not env.game_over
        if terminated:
            lives_lost += 1
            seen, _ = env.reset()
            played = [raw.step(NOOP) for _ in range(4)]  # one no-op action
        np.testing.assert_array_equal(seen, np.maximum(resized(played[2][0]), resized(played[3][0])))
        lives = lives_now
        if lives_lost == 2:
            return
    pytest.fail("no two lives were lost")


def test_bound_on_raw_frames_counts_no_ops_skips_and_all_lives() -> None:
    env = make_env(EnvConfig(game="Breakout", max_raw_frames=401), training=True)
    _, info = env.reset(seed=3)
    noops = info["episode_frame_number"]
    frames, lives_lost, truncated = noops, 0, False
    assert 1 <= noops <= 30
    while not truncated:
        _, _, terminated, truncated, info = env.step(1)
        frames += 4 if not truncated else (401 - frames)
        if terminated and not env.game_over:
            lives_lost += 1
            env.reset()
            frames += 4
        assert info["episode_frame_number"] <= 401
    assert env.game_over
    assert info["episode_frame_number"] == frames == 401
    assert lives_lost >= 1
    _, info = env.reset()
    assert info["episode_frame_number"] <= 30  # a new game, not the next life
    assert info["lives"] == 5


@pytest.mark.parametrize(("training", "wanted"), [(True, 60), (False, 90)])
def test_each_use_has_its_bound(training: bool, wanted: int) -> None:
    env = make_env(EnvConfig(game="Pong", max_raw_frames=60, eval_max_raw_frames=90), training=training)
    env.reset(seed=0)
    truncated = False
    while not truncated:
        *_, terminated, truncated, info = env.step(NOOP)
        assert not terminated
    assert info["episode_frame_number"] == wanted


@pytest.mark.parametrize(
    ("game", "num_actions"), [("Breakout", 4), ("Pong", 6), ("MsPacman", 9), ("Freeway", 3)]
)
def test_minimal_action_sets(game: str, num_actions: int) -> None:
    env = make_env(EnvConfig(game=game), training=True)
    assert env.action_space == Discrete(num_actions)
    assert env.observation_space == Box(0, 255, (64, 64, 3), np.uint8)


def test_frame_size_and_skip_are_configurable() -> None:
    env = make_env(EnvConfig(game="Pong", frame_size=32, frame_skip=2), training=False)
    frame, info = env.reset(seed=0)
    assert frame.shape == (32, 32, 3)
    before = info["episode_frame_number"]
    assert env.step(0)[4]["episode_frame_number"] == before + 2


def test_games_repeat_with_their_seed_and_differ_without() -> None:
    def play(seed: int) -> np.ndarray:
        env = make_env(EnvConfig(game="Breakout"), training=True)
        frames = [env.reset(seed=seed)[0]]
        for action in np.random.default_rng(1).integers(4, size=60):
            frame, _, terminated, _, _ = env.step(int(action))
            frames.append(env.reset()[0] if terminated else frame)
        return np.stack(frames)

    np.testing.assert_array_equal(play(0), play(0))
    assert (play(0) != play(1)).any()


# --- against scripted games -------------------------------------------------------------------------------


def test_no_ops_at_the_start_are_drawn_from_the_environments_generator() -> None:
    env = NoopStart(ScriptedGame(100), most=30)
    counts = []
    for seed in range(300):
        frame, _ = env.reset(seed=seed)
        counts.append(int(frame[0, 0, 0]))
        assert counts[-1] == np.random.Generator(np.random.PCG64(seed)).integers(1, 30, endpoint=True)
    assert (min(counts), max(counts)) == (1, 30)
    assert len(set(counts)) == 30


def test_no_ops_that_end_the_game_start_another() -> None:
    game = ScriptedGame(3)
    env = NoopStart(game, most=30)
    for seed in range(20):
        frame, _ = env.reset(seed=seed)
        assert frame[0, 0, 0] < 3  # never the frame after the game


@pytest.mark.parametrize(
    ("length", "shades", "wanted", "frames"),
    [
        (9, [0, 90, 80, 10, 20, 30, 0, 0, 0, 0], 20, 4),  # a whole skip: the larger of frames 3 and 4
        (9, [0, 90, 80, 30, 20, 30, 0, 0, 0, 0], 30, 4),
        (3, [0, 90, 80, 10], 80, 3),  # over at the third frame: the larger of 2 and 3
        (2, [0, 5, 80], 80, 2),
        (1, [200, 5], 5, 1),  # over at the first: that one alone, nothing from before
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_maximum_of_the_last_two_frames_there_are(
    length: int, shades: list[int], wanted: int, frames: int, cut: bool
) -> None:
    env = SkipFrames(ScriptedGame(length, shades=shades, cut=cut), skip=4, size=8)
    env.reset()
    frame, reward, terminated, truncated, _ = env.step(2)
    assert (frame == wanted).all()
    assert reward == frames
    assert (terminated, truncated) == ((False, False) if length > 4 else (not cut, cut))
    assert env.unwrapped.actions == [2] * frames


def test_an_ended_skip_leaves_nothing_for_the_next_game() -> None:
    env = SkipFrames(ScriptedGame(5, shades=[0, 1, 1, 1, 1, 250]), skip=4, size=8)
    env.reset()
    env.step(0)
    assert (env.step(0)[0] == 250).all()
    assert (env.reset()[0] == 0).all()
    assert (env.step(0)[0] == 1).all()


def test_a_life_loss_ends_the_episode_but_not_the_game() -> None:
    game = ScriptedGame(4, lives=[3, 3, 2, 2, 2])
    env = LifeLossEndsEpisode(game)
    env.reset()
    assert (env.game_over, env.reset_reward) == (False, 0.0)
    *_, terminated, truncated, _ = env.step(1)
    assert (terminated, truncated, env.game_over) == (False, False, False)
    *_, terminated, truncated, _ = env.step(1)
    assert (terminated, truncated, env.game_over) == (True, False, False)
    frame, _ = env.reset()
    assert game.games == 1
    assert game.actions == [1, 1, NOOP]
    assert (frame == 3).all()
    assert (env.game_over, env.reset_reward) == (False, 1.0)
    *_, terminated, truncated, _ = env.step(1)
    assert (terminated, truncated, env.game_over) == (True, False, True)
    env.reset()
    assert game.games == 2


def test_a_no_op_that_ends_the_game_is_told() -> None:
    game = ScriptedGame(2, lives=[3, 2, 2])
    env = LifeLossEndsEpisode(game)
    env.reset()
    assert env.step(1)[2]
    frame, _ = env.reset()
    assert (env.game_over, env.reset_reward) == (True, 1.0)
    assert game.games == 2
    assert (frame == 0).all()


def test_life_loss_and_truncation_at_once_end_the_game() -> None:
    game = ScriptedGame(2, lives=[3, 3, 2], cut=True)
    env = LifeLossEndsEpisode(game)
    env.reset()
    env.step(1)
    *_, terminated, truncated, _ = env.step(1)
    assert (terminated, truncated, env.game_over) == (True, True, True)
    env.reset()
    assert game.games == 2


def test_a_last_life_shown_as_zero_is_played_on() -> None:
    env = LifeLossEndsEpisode(ScriptedGame(3, lives=[1, 0, 0, 0]))
    env.reset()
    assert not env.step(1)[2]
    assert not env.step(1)[2]
    assert env.step(1)[2]


def test_a_reset_with_a_seed_or_amid_a_life_starts_a_new_game() -> None:
    game = ScriptedGame(9, lives=[3, 2] + [2] * 8)
    env = LifeLossEndsEpisode(game)
    env.reset()
    for games, (continues, seed) in enumerate([(False, 7), (True, None), (True, 7)], start=2):
        assert env.step(1)[2]  # a life is lost
        if continues:
            env.reset()
        frame, _ = env.reset(seed=seed)
        assert game.games == games
        assert (frame == 0).all()
        assert (env.game_over, env.reset_reward) == (False, 0.0)
    assert game.actions == [1, 1, NOOP, 1, NOOP]


# --- names, errors, other environments --------------------------------------------------------------------


def test_list_games_names_those_of_atari_100k() -> None:
    assert len(ATARI_100K) == 26
    assert set(ATARI_100K) <= set(list_games())


@pytest.mark.parametrize(
    ("game", "close"), [("breakout", "Breakout"), ("Ms-Pacman", "MsPacman"), ("Pongg", "Pong")]
)
def test_unknown_game_names_close_ones(game: str, close: str) -> None:
    with pytest.raises(UnknownGameError, match=rf"{game}.*\b{close}\b"):
        make_env(EnvConfig(game=game), training=True)


def test_a_game_without_a_no_op_is_refused() -> None:
    with pytest.raises(UnknownGameError, match="Backgammon has no no-op"):
        make_env(EnvConfig(game="Backgammon"), training=True)


@pytest.mark.parametrize("name", ["frame_size", "frame_skip", "noop_max", "max_raw_frames"])
def test_numbers_below_one_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"env\.{name} is 0"):
        make_env(EnvConfig(**{name: 0}), training=True)


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ale_py")
    plain_import = builtins.__import__

    def without_ale(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ale_py":
            raise ModuleNotFoundError("No module named 'ale_py'", name="ale_py")
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ale)
    with pytest.raises(MissingExtraError, match=r"ale_py.*pip install 'retpop\[atari\]'"):
        make_env(EnvConfig(), training=True)
    make_env(EnvConfig(id="rem_atari/Catch-v0", frame_size=24), training=True)  # needs no emulator


@pytest.mark.parametrize("name", ["rem_atari/Cathc-v0", "NoSuchEnvironment-v0", "no_such_module:Game-v0"])
def test_unknown_id(name: str) -> None:
    with pytest.raises(UnknownGameError, match=name):
        make_env(EnvConfig(id=name), training=True)


class Wide(ScriptedGame):
    """Another image than the agent's, in a game that never ends."""

    def __init__(self) -> None:
        super().__init__(NO_LIMIT, lives=[1], shades=[0])
        self.observation_space = Box(0, 255, (20, 30, 3), np.uint8)

    def _answer(self) -> tuple[np.ndarray, dict[str, Any]]:
        return np.random.default_rng(self.frame).integers(256, size=(20, 30, 3), dtype=np.uint8), {}


def test_another_environment_is_resized_bounded_and_otherwise_left_alone() -> None:
    gymnasium.register("rem_atari_tests/Wide-v0", entry_point=Wide)
    cfg = EnvConfig(id="rem_atari_tests/Wide-v0", frame_size=16, max_raw_frames=3, eval_max_raw_frames=5)
    env = make_env(cfg, training=True)
    assert env.observation_space == Box(0, 255, (16, 16, 3), np.uint8)
    env.reset(seed=0)
    answers = [env.step(1) for _ in range(3)]
    raw = np.random.default_rng(2).integers(256, size=(20, 30, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(raw).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(answers[1][0], wanted)
    assert [answer[3] for answer in answers] == [False, False, True]
    assert env.unwrapped.actions == [1, 1, 1]
    env = make_env(cfg, training=False)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(5)] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        (EnvConfig(game="MsPacman"), "MsPacman"),
        (EnvConfig(id="rem_atari/Catch-v0"), "Catch"),
        (EnvConfig(id="ALE/Pong-v5"), "Pong"),
        (EnvConfig(id="MinAtar/Breakout-v1"), "MinAtar-Breakout"),
        (EnvConfig(id="package:space/Some_Game-v12"), "Some_Game"),
        (EnvConfig(id="CartPole-v1"), "CartPole"),
        (EnvConfig(id="MiniGrid-Empty-5x5-v0"), "MiniGrid-Empty-5x5"),
        (EnvConfig(id="My-very.odd-Game-v0"), "My-very.odd-Game"),
        (EnvConfig(id="Unversioned"), "Unversioned"),
    ],
)
def test_env_name(cfg: EnvConfig, name: str) -> None:
    assert env_name(cfg) == name


@pytest.mark.parametrize(
    "cfg", [EnvConfig(game="../up"), EnvConfig(id="a/..-v0"), EnvConfig(id="MiniGrid-Empty-5x5-v0")]
)
def test_whatever_a_game_is_called_its_run_lies_in_runs(cfg: EnvConfig) -> None:
    path = default_run_path(Config(), env_name(cfg), datetime(2031, 2, 3, 4, 5, 6))
    assert path.parent == Path("runs")
    assert path.name.endswith("-paper-0-20310203-040506")

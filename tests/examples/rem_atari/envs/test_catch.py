"""Catch: its rules, its picture, and what random play returns."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rem_atari.config import EnvConfig
from rem_atari.envs import make_env
from rem_atari.envs.catch import BALL, LEFT, PADDLE, RIGHT, STAY, Catch


def cell_of(frame: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int]:
    """Row and column of the one cell (4x4 pixels) of this colour."""
    pixels = np.argwhere((frame == colour).all(axis=-1))
    cells = {(int(row) // 4, int(column) // 4) for row, column in pixels}
    assert len(cells) == 1
    assert len(pixels) == 16
    return cells.pop()


def test_satisfies_gymnasiums_own_checks() -> None:
    check_env(Catch(render_mode="rgb_array"), skip_render_check=True)


def test_the_picture_shows_ball_and_paddle_and_nothing_else() -> None:
    env = Catch()
    frame, _ = env.reset(seed=0)
    assert frame.shape == (24, 24, 3)
    assert frame.dtype == np.uint8
    assert (frame != 0).any(axis=-1).sum() == 32
    for step in range(5):
        row, _ = cell_of(frame, BALL)
        assert row == step
        if step < 4:
            assert cell_of(frame, PADDLE)[0] == 5
        frame, *_ = env.step(STAY)


@pytest.mark.parametrize("actions", [(RIGHT, LEFT, LEFT, STAY), (LEFT,) * 4, (RIGHT,) * 4])
def test_the_ball_falls_straight_and_the_paddle_moves_and_stops_at_the_walls(
    actions: tuple[int, ...],
) -> None:
    env = Catch()
    for seed in range(8):
        frame, _ = env.reset(seed=seed)
        _, ball = cell_of(frame, BALL)
        _, paddle = cell_of(frame, PADDLE)
        for action in actions:
            frame, reward, terminated, truncated, _ = env.step(action)
            paddle = min(max(paddle + {LEFT: -1, STAY: 0, RIGHT: 1}[action], 0), 5)
            assert cell_of(frame, BALL)[1] == ball
            assert cell_of(frame, PADDLE)[1] == paddle
            assert (reward, terminated, truncated) == (0.0, False, False)


@pytest.mark.parametrize("seed", range(20))
def test_following_the_ball_always_catches_it_and_fleeing_never(seed: int) -> None:
    for follows, wanted in ((True, 1.0), (False, -1.0)):
        env = Catch()
        frame, _ = env.reset(seed=seed)
        _, ball = cell_of(frame, BALL)
        _, paddle = cell_of(frame, PADDLE)
        target = ball if follows else 5 * (ball < 3)
        rewards, ended = [], False
        while not ended:
            action = STAY + int(np.sign(target - paddle))
            paddle += action - STAY
            _, reward, ended, truncated, _ = env.step(action)
            assert not truncated
            rewards.append(reward)
        assert rewards == [0.0] * 4 + [wanted]


def test_random_play_returns_minus_two_thirds() -> None:
    env = Catch()
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    returns = []
    for action in rng.integers(3, size=5 * 3000):
        _, reward, ended, _, _ = env.step(int(action))
        if ended:
            returns.append(reward)
            env.reset()
    # The standard error is 2 * sqrt(1/6 * 5/6 / 3000) = 0.0136.
    assert len(returns) == 3000
    assert np.mean(returns) == pytest.approx(-2 / 3, abs=0.05)


def test_starts_are_seeded_and_uniform_over_ball_and_paddle() -> None:
    env = Catch()
    env.reset(seed=0)
    counts = np.zeros((6, 6))
    for _ in range(3600):
        frame, _ = env.reset()
        counts[cell_of(frame, BALL)[1], cell_of(frame, PADDLE)[1]] += 1
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert chi_square < 67  # 35 degrees of freedom: 0.1% of fair games exceed 66.6
    np.testing.assert_array_equal(Catch().reset(seed=4)[0], Catch().reset(seed=4)[0])


def test_registered_with_its_sizes() -> None:
    env = make_env(EnvConfig(id="rem_atari/Catch-v0", frame_size=24), training=True)
    assert env.observation_space.shape == (24, 24, 3)
    env = make_env(EnvConfig(id="rem_atari/Catch8-v0", frame_size=32), training=True)
    assert env.observation_space.shape == (32, 32, 3)
    env = gymnasium.make("rem_atari/Catch-v0", cells=8, cell_pixels=5)
    assert env.reset(seed=0)[0].shape == (40, 40, 3)


def test_rendering_is_the_frame() -> None:
    env = Catch(render_mode="rgb_array")
    frame, _ = env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), frame)
    assert Catch().render() is None


def test_actions_have_names() -> None:
    meanings = Catch().get_action_meanings()
    assert (meanings[LEFT], meanings[STAY], meanings[RIGHT]) == ("LEFT", "STAY", "RIGHT")
    assert len(meanings) == Catch().action_space.n


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="cells is 1"):
        Catch(cells=1)
    with pytest.raises(ValueError, match="cell_pixels is 0"):
        Catch(cell_pixels=0)
    with pytest.raises(ValueError, match="'human'"):
        Catch(render_mode="human")
    env = Catch()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action is 3"):
        env.step(3)

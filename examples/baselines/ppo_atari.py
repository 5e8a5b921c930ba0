"""PPO on an Atari game with as many steps as an agent of `rem-atari` had: what one would pick otherwise.

    python examples/baselines/ppo_atari.py Krull --steps 70000

The settings are those of stable-baselines3's zoo for Atari: 84 x 84 grey pixels, four frames, clipped
rewards, eight games side by side. The games that it is judged by are those of `rem-atari evaluate`: no sticky
actions, raw rewards, whole games, actions drawn. Needs the extra `atari` and
`pip install stable-baselines3 opencv-python-headless`.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import ale_py
import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack

from rem_atari.evaluation import describe_mean, standard_error

GAMES_AT_ONCE, FRAMES = 8, 4


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The settings, from the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("game", help="name of the game in ale-py, such as Krull")
    parser.add_argument("--steps", type=int, default=70_000, help="environment steps, of four frames each")
    parser.add_argument("--games", type=int, default=100, help="games to judge it by")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def make_game(game: str, *, training: bool) -> gymnasium.Env:
    """The game as the zoo's agents see it; in training a lost life ends an episode, and rewards are signs."""
    env = gymnasium.make(
        f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=False
    )
    noops = 30 if training else 1
    return AtariWrapper(Monitor(env), noop_max=noops, terminal_on_life_loss=training, clip_reward=training)


def make_games(game: str, seed: int, *, training: bool) -> VecEnv:
    """Games side by side, each with its last frames."""
    env = DummyVecEnv([partial(make_game, game, training=training)] * GAMES_AT_ONCE)
    env.seed(seed)
    return VecFrameStack(env, FRAMES)


def falling(start: float, remaining: float) -> float:
    """A setting that falls to 0 with the remaining share of training."""
    return start * remaining


def main(words: list[str] | None = None) -> float:
    """Train, and return the mean return over whole games."""
    options = arguments(words)
    torch.set_num_threads(1)
    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    started = time.process_time()
    policy = PPO(
        "CnnPolicy",
        make_games(options.game, options.seed, training=True),
        learning_rate=partial(falling, 2.5e-4),
        clip_range=partial(falling, 0.1),
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        ent_coef=0.01,
        vf_coef=0.5,
        seed=options.seed,
    )
    policy.learn(options.steps)
    seconds = time.process_time() - started
    returns, _ = evaluate_policy(
        policy,
        make_games(options.game, options.seed + 1, training=False),
        n_eval_episodes=options.games,
        deterministic=False,
        return_episode_rewards=True,
    )
    mean = sum(returns) / len(returns)
    print(
        f"PPO on {options.game}, seed {options.seed}: {describe_mean(mean, standard_error(returns))} over"
        f" {len(returns)} games after {policy.num_timesteps:,} steps and {seconds:.0f} CPU-seconds"
    )
    return mean


if __name__ == "__main__":
    main()

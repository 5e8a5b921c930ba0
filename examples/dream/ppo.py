"""PPO learns in a dream: stable-baselines3 trains in a world model alone, then plays the real game.

    python examples/dream/ppo.py                           # in the dream of the bundled Catch agent
    python examples/dream/ppo.py runs/pong --steps 200000  # in that of your own run

Not one step of the real game is taken until the training is over. Needs `pip install stable-baselines3`.
"""

from __future__ import annotations

import argparse
import statistics

import gymnasium
from stable_baselines3 import PPO

import rem_atari


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The settings, from the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("agent", nargs="?", default="catch", help="whose dream: a run, an export, or a name")
    parser.add_argument("--steps", type=int, default=8_192, help="steps to dream")
    parser.add_argument("--horizon", type=int, default=50, help="most steps of a dream")
    parser.add_argument("--games", type=int, default=200, help="real games to play before and after")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def play(policy: PPO, env: gymnasium.Env, games: int) -> float:
    """Mean return of the policy over real games."""
    returns = []
    for seed in range(games):
        frame, _ = env.reset(seed=seed)
        total, is_over = 0.0, False
        while not is_over:
            action, _ = policy.predict(frame, deterministic=True)
            frame, reward, terminated, truncated, _ = env.step(int(action))
            total, is_over = total + float(reward), terminated or truncated
        returns.append(total)
    return statistics.fmean(returns)


def main(words: list[str] | None = None) -> float:
    """Train in the dream, and return the mean return in the real game."""
    options = arguments(words)
    agent = rem_atari.load_agent(options.agent)
    game = agent.make_env()
    policy = PPO("MlpPolicy", rem_atari.DreamEnv(agent, horizon=options.horizon), seed=options.seed)
    print(f"before: mean return {play(policy, game, options.games):.2f} over {options.games} real games")
    policy.learn(options.steps)
    learned = play(policy, game, options.games)
    print(f"after {policy.num_timesteps:,} dreamt steps: {learned:.2f}")
    return learned


if __name__ == "__main__":
    main()

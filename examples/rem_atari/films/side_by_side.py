"""The agent at play, step by step: the game, its reconstruction from tokens, the imagination."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rem_atari.agent import Agent
from rem_atari.config import Config
from rem_atari.evaluation import make_test_envs
from rem_atari.films.panels import Panel, draw_panels
from rem_atari.play.imagination import ImaginedEnv
from rem_atari.play.real_env import RealEnv
from rem_atari.play.rollout import rollout
from rem_atari.training.seeding import derive_seed


@dataclass(frozen=True, kw_only=True)
class RealStep:
    """A step of the real game.

    Attributes:
        action: name of the action.
        reward: its raw reward.
        game_return: sum of the game's raw rewards up to here.
        ended: the game ended or was truncated with it.
    """

    action: str
    reward: float
    game_return: float
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One picture of the film.

    Attributes:
        step: steps of the agent before it.
        frame: of the game, uint8 (S, S, 3).
        decoded: the same frame from its tokens.
        imagined: the world model's frame.
        dream_step: imagined steps since it last saw the game; 0: it has just seen the game.
        latest: the step that led here, which may have ended the game; None at the start of the film.
        imagined_reward: sign of its reward as imagined; None at the start of the film.
        dream_over: the imagined episode has ended; its frames have no meaning now.
        ending: if a game ended: the picture before this one, of the game's final frame.
    """

    step: int
    frame: np.ndarray
    decoded: np.ndarray
    imagined: np.ndarray
    dream_step: int
    latest: RealStep | None
    imagined_reward: float | None
    dream_over: bool
    ending: Moment | None = None


class _Dream:
    """Imagination alongside the game: it gets every action, but sees the game only at `begin`.

    The steps of the episode just before are its context, as many as in the dreams that the controller learns
    from.
    """

    def __init__(self, agent: Agent, context: int, generator: torch.Generator) -> None:
        self._env = ImaginedEnv(agent.world_model, agent.tokenizer, generator, agent.show)
        self._past: deque[tuple[Tensor, Tensor]] = deque(maxlen=context)
        self.steps = 0
        self.over = False

    @property
    def tokens(self) -> Tensor:
        """The tokens of the imagined observation, (1, K)."""
        return self._env.tokens

    def begin(self, tokens: Tensor) -> None:
        """See the game: its frame as tokens (1, K)."""
        if self._past:
            past_tokens, past_actions = (torch.stack(part, dim=1) for part in zip(*self._past, strict=True))
            self._env.reset(tokens, past_tokens, past_actions)
        else:
            self._env.reset(tokens)
        self.steps, self.over = 0, False

    def step(self, tokens: Tensor, action: Tensor) -> float:
        """The reward imagined for `action` (1,); the game's frame, `tokens` (1, K), is stored as context."""
        self._past.append((tokens, action))
        answer = self._env.step(action)
        self.steps += 1
        reward = 0.0 if self.over else float(answer.rewards)
        self.over = self.over or bool(answer.ended)
        return reward

    def forget(self) -> None:
        """Forget the episode, because another begins."""
        self._past.clear()


class _Player:
    """The agent in the real game."""

    def __init__(self, agent: Agent, config: Config, seed: int) -> None:
        envs = make_test_envs(config, 1, derive_seed(seed, "record"))
        self._agent = agent
        self._temperature = config.evaluation.temperature
        self._names = envs.action_names
        self._generator = torch.Generator(config.device).manual_seed(derive_seed(seed, "record", "actions"))
        self._env = RealEnv(envs, agent.tokenizer, None, device=config.device, show=agent.show)
        self._carry = agent.controller.initial_carry(1)
        self._observation: Tensor | None = None
        self.latest: RealStep | None = None

    @property
    def frame(self) -> Tensor:
        """The frame to act on, uint8 (1, S, S, 3) on the CPU."""
        return torch.from_numpy(self._env.frames)

    @property
    def last_frame(self) -> Tensor | None:
        """The final frame of a game that ended in the last step, uint8 (1, S, S, 3); None: none ended."""
        frame = self._env.last_frames.get(0)
        return None if frame is None else torch.from_numpy(frame)[None]

    def start(self) -> None:
        """Begin the first game."""
        self._observation = self._env.reset()

    def step(self) -> Tensor:
        """Take a step and return the action, (1,). The result is in `latest`."""
        assert self._observation is not None  # start() comes first
        played, self._carry, self._observation = rollout(
            self._env,
            self._agent.controller,
            self._carry,
            self._observation,
            1,
            temperature=self._temperature,
            generator=self._generator,
        )
        reward, goes_on = float(played.rewards), self.latest is not None and not self.latest.ended
        self.latest = RealStep(
            action=self._names[int(played.actions)],
            reward=reward,
            game_return=reward + (self.latest.game_return if goes_on and self.latest else 0.0),
            ended=bool(played.ended | played.truncated),
        )
        return played.actions[:, 0]

    def close(self) -> None:
        """Close the game."""
        self._env.close()


@torch.no_grad()
def play(agent: Agent, config: Config, *, steps: int, dream_steps: int, seed: int) -> Iterator[Moment]:
    """Let the agent play the real game for some steps, and its world model imagine along.

    Args:
        agent: in eval mode, on `config.device`.
        config: the game, the temperature of the evaluation, the context of dreams.
        steps: steps of the agent, so that there are `steps` + 1 moments.
        dream_steps: steps imagined before the game is shown again; at least 1.
        seed: seed of the game, the actions and the imagination.
    """
    generator = torch.Generator(config.device).manual_seed(derive_seed(seed, "record", "dreams"))
    dream = _Dream(agent, config.controller.context_frames, generator)
    imagined_reward, ending = None, None

    def look(step: int, frame: Tensor, tokens: Tensor, ending: Moment | None = None) -> Moment:
        decoded = agent.tokenizer.decode(torch.cat([tokens, dream.tokens])).cpu().numpy()
        return Moment(
            step=step,
            frame=frame[0].numpy(),
            decoded=decoded[0],
            imagined=decoded[1],
            dream_step=dream.steps,
            latest=player.latest,
            imagined_reward=imagined_reward,
            dream_over=dream.over,
            ending=ending,
        )

    with closing(_Player(agent, config, seed)) as player:
        player.start()
        for step in range(steps + 1):
            frame, latest = player.frame, player.latest
            tokens = agent.tokenizer.encode(frame.to(config.device))
            if latest is None or latest.ended or dream.steps > dream_steps:
                dream.begin(tokens)
            yield look(step, frame, tokens, ending)
            imagined_reward, ending = dream.step(tokens, player.step()), None
            if player.last_frame is not None:
                last = player.last_frame
                ending = look(step + 1, last, agent.tokenizer.encode(last.to(config.device)))
                dream.forget()


def draw(moment: Moment, dream_steps: int) -> np.ndarray:
    """The moment as one picture (H, W, 3): three panels, a title above each, a caption below."""
    happened, real, latest = f"step {moment.step}", "", moment.latest
    if latest is not None:
        happened += f": {latest.action}"
        real = f"return {latest.game_return:g}" + (f", reward {latest.reward:+g}" if latest.reward else "")
        if latest.ended:
            real = f"game over, {real}"
    if moment.dream_step == 0:
        state = "is shown the game"
    else:
        state = f"step {moment.dream_step} of {dream_steps} by itself"
    believed = f"imagined reward {moment.imagined_reward:+g}" if moment.imagined_reward else ""
    if moment.dream_over:
        believed = "the imagined episode is over"
    return draw_panels(
        [
            Panel(moment.frame, "the game", happened, real),
            Panel(moment.decoded, "decoded from its tokens"),
            Panel(moment.imagined, "imagined", state, believed, faded=moment.dream_over),
        ]
    )

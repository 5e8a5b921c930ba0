"""Films of the world model's imagination from held-out starts: tensors in, films out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rem_atari.agent import Agent
from rem_atari.films.pictures import Film, FilmStep, Scene
from rem_atari.models.sequence_tokens import SequenceTokens
from rem_atari.play.imagination import ImaginedEnv
from rem_atari.play.rollout import TokenStep, rollout


class _WatchedEnv:
    """An ImaginedEnv that keeps the tokens of every observation it shows."""

    def __init__(self, env: ImaginedEnv, tokens: Tensor) -> None:
        self._env = env
        self.num_actions = env.num_actions
        self.seen = [tokens]

    def step(self, actions: Tensor) -> TokenStep:
        answer = self._env.step(actions)
        self.seen.append(self._env.tokens)
        return answer


@dataclass(frozen=True)
class Dream:
    """B imagined episodes of T steps: tokens (B, T+1, K), actions, rewards and ended (B, T)."""

    tokens: Tensor
    actions: Tensor
    rewards: Tensor
    ended: Tensor


@torch.no_grad()
def make_scenes(
    agent: Agent,
    frames: Tensor,
    batch: SequenceTokens,
    *,
    context: int,
    action_names: Sequence[str],
    temperature: float,
    seed: int,
) -> list[Scene]:
    """Imagine episodes from held-out starts.

    Args:
        agent: in eval mode.
        frames: held-out frames, uint8 (B, T, S, S, 3).
        batch: the same as tokens; the first `context` + 1 steps of each row are real.
        context: real steps that the world model and the controller take in before the start.
        action_names: a name for each action.
        temperature: temperature of the controller's actions.
        seed: seed of everything drawn.
    Returns:
        B scenes of three films of at most T - 1 - context steps: the real continuation, the imagined one with
        the same actions, and the imagined one in which the controller chooses.
    """
    generator = torch.Generator(batch.tokens.device).manual_seed(seed)
    dreams = {
        "imagined, same actions": dream_along(agent, batch, context, generator),
        "imagined, agent plays": dream_freely(agent, batch, context, temperature, generator),
    }
    same, own = (
        _imagined_films(agent, batch, context, dream, title, action_names) for title, dream in dreams.items()
    )
    scenes = []
    for row, (along, free) in enumerate(zip(same, own, strict=True)):
        real = _real_film(frames[row, context:], batch, row, context, action_names)
        scenes.append(Scene([real, _cut(along, len(real.steps)), free]))
    return scenes


def dream_along(agent: Agent, batch: SequenceTokens, context: int, generator: torch.Generator) -> Dream:
    """Imagine the episodes with the actions that were really taken."""
    env, _ = _start(agent, batch, context, generator)
    actions = batch.actions[:, context:-1]
    answers = [env.step(action) for action in actions.unbind(dim=1)]
    return Dream(
        torch.stack(env.seen, dim=1),
        actions,
        torch.stack([answer.rewards for answer in answers], dim=1),
        torch.stack([answer.ended for answer in answers], dim=1),
    )


def dream_freely(
    agent: Agent,
    batch: SequenceTokens,
    context: int,
    temperature: float,
    generator: torch.Generator,
) -> Dream:
    """Imagine episodes in which the controller acts, its memory warmed up on the context."""
    env, codes = _start(agent, batch, context, generator)
    past = agent.show(batch.tokens[:, :context])
    carry = agent.controller.burn_in(past, batch.actions[:, :context], batch.mask[:, :context])
    steps = batch.tokens.shape[1] - 1 - context
    played, _, _ = rollout(
        env, agent.controller, carry, codes, steps, temperature=temperature, generator=generator
    )
    return Dream(torch.stack(env.seen, dim=1), played.actions, played.rewards, played.ended)


def _start(
    agent: Agent, batch: SequenceTokens, context: int, generator: torch.Generator
) -> tuple[_WatchedEnv, Tensor]:
    """An imagined environment at step `context` of every row, and the controller's first observation."""
    env = ImaginedEnv(agent.world_model, agent.tokenizer, generator, agent.show)
    start = batch.tokens[:, context]
    codes = env.reset(start, batch.tokens[:, :context], batch.actions[:, :context])
    return _WatchedEnv(env, start), codes


def _imagined_films(
    agent: Agent, batch: SequenceTokens, context: int, dream: Dream, title: str, names: Sequence[str]
) -> list[Film]:
    """A film for every row of a dream.

    The chances of rewards and ends come from one pass over the imagined episode as a sequence, which equals
    the single steps (a law of retention).
    """
    tokens = torch.cat([batch.tokens[:, :context], dream.tokens[:, :-1]], dim=1)
    actions = torch.cat([batch.actions[:, :context], dream.actions], dim=1)
    logits = agent.world_model(tokens, actions, agent.tokenizer.codes, skip_blocks=context)
    reward_chances = agent.world_model.reward_code.sign_logits(logits.rewards).exp().tolist()
    end_chances = logits.ends.softmax(dim=-1)[..., 1].tolist()
    frames = agent.tokenizer.decode(dream.tokens).cpu().numpy()
    films = []
    for row in range(tokens.shape[0]):
        steps = []
        for step, action in enumerate(dream.actions[row].tolist()):
            imagined = FilmStep(
                action=names[action],
                reward=int(dream.rewards[row, step].sign()),
                ended=bool(dream.ended[row, step]),
                reward_chances=tuple(reward_chances[row][step]),
                end_chance=end_chances[row][step],
            )
            steps.append(imagined)
            if imagined.ended:
                break
        shown = len(steps) if steps[-1].ended else len(steps) + 1
        films.append(Film(title=title, frames=frames[row, :shown], steps=steps))
    return films


def _real_film(frames: Tensor, batch: SequenceTokens, row: int, context: int, names: Sequence[str]) -> Film:
    """The real continuation of a row from step `context` on; `frames` (T, S, S, 3) begin there.

    The last frame of the row only shows the result of the step before it. If the episode has no more frames,
    its step is shown too, as the end or the truncation.
    """
    real = int(batch.mask[row, context:].sum())
    complete = real == frames.shape[0]
    steps = []
    for step in range(real - 1 if complete else real):
        at = context + step
        ended = bool(batch.ended[row, at])
        steps.append(
            FilmStep(
                action=names[int(batch.actions[row, at])],
                reward=float(batch.rewards[row, at]),
                ended=ended,
                cut=not complete and not ended and step == real - 1,
            )
        )
    return Film(title="real", frames=frames[:real].cpu().numpy(), steps=steps)


def _cut(film: Film, steps: int) -> Film:
    """The film's first `steps` steps; no real actions are known after them."""
    if len(film.steps) <= steps:
        return film
    return Film(title=film.title, frames=film.frames[: steps + 1], steps=film.steps[:steps])

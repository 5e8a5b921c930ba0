"""The user's interface to a trained agent: frames in, actions out, and dreams."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import gymnasium
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rem_atari.checks import check_count, check_seed, check_temperature, rows_of
from rem_atari.config import Config
from rem_atari.inference.dream import Dream
from rem_atari.models.controller import Carry, reset_carry
from rem_atari.play.imagination import state_at
from rem_atari.play.rollout import choose_actions
from rem_atari.replay.starts import Starts
from rem_atari.runs.trained import TrainedAgent
from rem_atari.training.seeding import derive_seed


@dataclass(frozen=True, eq=False)
class Memory:
    """The agent's memory of n games and the seed of its next actions: a value.

    Attributes:
        carry: the recurrent cell's state, tensors (n, width).
        steps: actions taken so far.
        seed: seed of the next action, together with `steps`.
        owner: digest of the controller's weights; the memory is only valid for this controller.
    """

    carry: Carry
    steps: int
    seed: int
    owner: str

    def __len__(self) -> int:
        return len(self.carry[0])

    def restart(self, restarted: ArrayLike) -> Memory:
        """The memory with the games in `restarted`, bool (n,), reset to the start of a new game."""
        rows = torch.as_tensor(np.asarray(restarted, dtype=bool), device=self.carry[0].device)
        if rows.shape != (len(self),):
            raise ValueError(
                f"Memory.restart(): restarted has shape {tuple(rows.shape)}; wanted ({len(self)},)."
            )
        return replace(self, carry=reset_carry(self.carry, rows))

    def select(self, indices: ArrayLike) -> Memory:
        """The memory of some of the n games, in the order given."""
        rows = rows_of("Memory.select()", indices)
        return replace(self, carry=tuple(part[rows] for part in self.carry))


@dataclass(frozen=True, eq=False)
class Judgement:
    """The agent's judgement of n observations.

    Attributes:
        tokens: the observations, int64 (n, K).
        policy: probabilities of the actions, float32 (n, A), before any temperature.
        values: expected discounted return from here on, float32 (n,).
        logits: logarithms of the probabilities up to a constant, tensor (n, A).
        memory: the memory after the observations; `LoadedAgent.observe_action` comes next.
    """

    tokens: np.ndarray
    policy: np.ndarray
    values: np.ndarray
    logits: Tensor
    memory: Memory


class LoadedAgent:
    """A trained agent in eval mode, as `rem_atari.load_agent` gives it.

    Frames are uint8 (S, S, 3), as `make_env` gives them, or (n, S, S, 3) for n games side by side. Methods
    take and return numpy arrays. They draw by the seeds in memory and dream, so they are functions of their
    arguments.

    Attributes:
        networks: tokenizer, world model and controller.
        config: the configuration of its run.
        name: the place it was loaded from.
        action_names: a name for each action.
        sees: the content of its frames in a few words; None if an earlier version trained it.
    """

    def __init__(self, trained: TrainedAgent, name: str, load_starts: Callable[[], Starts]) -> None:
        self.networks = trained.agent
        self.config: Config = trained.config
        self.name = name
        self.action_names = trained.action_names
        self.sees = trained.sees
        self._load_starts = load_starts
        self._device = torch.device(trained.config.device)

    def __repr__(self) -> str:
        game = self.config.env.id or self.config.env.game
        return f"LoadedAgent({self.name!r}, game {game}, {self.num_actions} actions, on {self._device})"

    @property
    def num_actions(self) -> int:
        """Number of actions A; an action is an integer in [0, A)."""
        return self.networks.controller.num_actions

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Shape of a frame, (S, S, 3)."""
        return (self.config.env.frame_size, self.config.env.frame_size, 3)

    @cached_property
    def starts(self) -> Starts:
        """Real frames to begin dreams at, which came with the agent or come from its run's replay.

        Raises:
            UsageError: there are none.
        """
        return self._load_starts()

    def make_env(self) -> gymnasium.Env:
        """The game, prepared as in an evaluation; the agent takes its frames.

        Raises:
            ValueError: the game is not installed.
        """
        from rem_atari.envs import make_env

        return make_env(self.config.env, training=False)

    def start(self, n: int = 1, *, seed: int = 0) -> Memory:
        """The memory at the start of n games; their actions are drawn by `seed`.

        Raises:
            ValueError: n is no integer or below 1, or the seed negative.
        """
        check_count("LoadedAgent.start()", "n", n)
        check_seed("LoadedAgent.start()", seed)
        return self._memory(self.networks.controller.initial_carry(int(n)), seed)

    @torch.no_grad()
    def remember(self, starts: Starts, *, seed: int = 0) -> Memory:
        """The memory of the steps before the last frames of `starts`."""
        if not isinstance(starts, Starts):
            raise TypeError(f"LoadedAgent.remember(): starts is a {type(starts).__name__}; wanted Starts.")
        check_seed("LoadedAgent.remember()", seed)
        seen = self.networks.show(self._tokens_of(starts.frames[:, :-1]))
        actions, mask = (self._tensor(column[:, :-1]) for column in (starts.actions, starts.mask))
        return self._memory(self.networks.controller.burn_in(seen, actions, mask), seed)

    @torch.no_grad()
    def judge(self, seen: np.ndarray | Dream, memory: Memory) -> Judgement:
        """The agent's judgement of a frame or a dream.

        Raises:
            ValueError: the frame is of another shape or type, there are more or fewer than the games that
                the memory is of, or the memory is another agent's.
        """
        self._check_memory("judge", memory)
        tokens = self._dreamt("judge", seen) if isinstance(seen, Dream) else self._encode("judge", seen)
        if len(tokens) != len(memory):
            raise ValueError(
                f"LoadedAgent.judge(): {len(tokens)} observations for a memory of {len(memory)} games."
            )
        decision = self.networks.controller(self.networks.show(tokens), memory.carry)
        return Judgement(
            tokens=tokens.cpu().numpy(),
            policy=decision.logits.softmax(dim=-1).cpu().numpy(),
            values=decision.value.cpu().numpy(),
            logits=decision.logits,
            memory=replace(memory, carry=decision.carry),
        )

    @torch.no_grad()
    def observe_action(self, action: ArrayLike, memory: Memory) -> Memory:
        """The memory after an action, int or (n,), chosen by the agent or not."""
        self._check_memory("observe_action", memory)
        actions = self._actions("observe_action", action, len(memory))
        carry = self.networks.controller.observe_action(actions, memory.carry)
        return replace(memory, carry=carry, steps=memory.steps + 1)

    def act(
        self, seen: np.ndarray | Dream, memory: Memory, *, temperature: float | None = None
    ) -> tuple[int | np.ndarray, Memory]:
        """Choose an action, and update the memory with it.

        Args:
            seen: a frame (S, S, 3), frames (n, S, S, 3), or a dream.
            memory: from `start` or the call before.
            temperature: of the choice; 0: the most likely action; None: the run's own for evaluations.

        Returns:
            The action, an int for a single frame and int64 (n,) otherwise; and the memory.

        Raises:
            ValueError: as `judge`, or the temperature is below 0.
        """
        judged = self.judge(seen, memory)
        chosen = self.choose(judged, temperature=temperature)
        memory = self.observe_action(chosen, judged.memory)
        is_single = not isinstance(seen, Dream) and np.ndim(seen) == 3
        return (int(chosen[0]) if is_single else chosen), memory

    def choose(self, judged: Judgement, *, temperature: float | None = None) -> np.ndarray:
        """Choose an action for each of n observations, int64 (n,); the memory does not change.

        Raises:
            ValueError: the temperature is below 0.
        """
        temperature = self.config.evaluation.temperature if temperature is None else temperature
        check_temperature("LoadedAgent.choose()", temperature)
        generator = self._generator(judged.memory.seed, "action", judged.memory.steps)
        return choose_actions(judged.logits, generator, temperature=temperature).cpu().numpy()

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Tokens of a frame, int64 (K,), or of n frames, (n, K).

        Raises:
            ValueError: the frames are of another shape or type.
        """
        tokens = self._encode("encode", frames).cpu().numpy()
        return tokens if np.ndim(frames) == 4 else tokens[0]

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """The frame of tokens (K,), uint8 (S, S, 3), or of (n, K), (n, S, S, 3).

        Raises:
            ValueError: these are no tokens.
        """
        given, tokenizer = np.asarray(tokens), self.networks.tokenizer
        fits = given.dtype.kind in "iu" and given.shape[-1:] == (tokenizer.num_tokens,) and given.ndim < 3
        if not fits or not ((given >= 0) & (given < tokenizer.codebook_size)).all():
            raise ValueError(
                f"LoadedAgent.decode(): tokens is {given.dtype} {given.shape}; wanted integers from 0 to"
                f" {tokenizer.codebook_size - 1}, ({tokenizer.num_tokens},) or (n, {tokenizer.num_tokens})."
            )
        return tokenizer.decode(self._tensor(given.astype(np.int64))).cpu().numpy()

    @torch.no_grad()
    def dream(self, start: np.ndarray | Starts, *, seed: int = 0) -> Dream:
        """Begin a dream.

        Args:
            start: a frame (S, S, 3), frames (n, S, S, 3), or starts, whose frames before the last are read
                first, as many as in training.
            seed: seed of the dream.

        Raises:
            ValueError: the frames are of another shape or type, or the seed is negative.
        """
        check_seed("LoadedAgent.dream()", seed)
        if not isinstance(start, Starts):
            start = Starts.at(self._checked_frames("dream", start))
        tokens = self._tokens_of(start.frames[:, -1])
        before = min(self.config.controller.context_frames, start.mask.shape[1] - 1)
        context = None
        if before > 0:
            read = slice(-1 - before, -1)
            seen = self._tokens_of(start.frames[:, read])
            context = (seen, self._tensor(start.actions[:, read]), self._tensor(start.mask[:, read]))
        state = state_at(self.networks.world_model, self.networks.tokenizer.codes, tokens, context)
        return Dream.at(tokens.cpu().numpy(), state, seed)

    @torch.no_grad()
    def imagine(self, dream: Dream | np.ndarray, action: ArrayLike, *, temperature: float = 1.0) -> Dream:
        """The dream after an action.

        Args:
            dream: from `dream` or the call before, or frames at which one begins.
            action: an int for all games, or (n,).
            temperature: of the draws of tokens, reward and end; 0: always the most likely.

        Raises:
            ValueError: there is no such action, or the temperature is below 0.
        """
        check_temperature("LoadedAgent.imagine()", temperature)
        if not isinstance(dream, Dream):
            dream = self.dream(dream)
        imagined = self.networks.world_model.imagine(
            self._dreamt("imagine", dream),
            self._actions("imagine", action, len(dream)),
            self.networks.tokenizer.codes,
            dream.state,
            self._generator(dream.seed, "dream", dream.steps),
            temperature=temperature,
        )
        return dream.after(imagined, self.networks.world_model.reward_code)

    def _memory(self, carry: Carry, seed: int) -> Memory:
        return Memory(carry, steps=0, seed=seed, owner=self._digest)

    @cached_property
    def _digest(self) -> str:
        """The digest of the controller's weights, computed at the first call."""
        digest = hashlib.sha256()
        for weights in self.networks.controller.state_dict().values():
            digest.update(weights.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _check_memory(self, caller: str, memory: Memory) -> None:
        if not isinstance(memory, Memory):
            raise TypeError(f"LoadedAgent.{caller}(): memory is a {type(memory).__name__}; wanted a Memory.")
        if memory.owner != self._digest:
            raise ValueError(
                f"LoadedAgent.{caller}(): memory is another agent's; wanted one that {self.name!r} gave."
            )

    def _dreamt(self, caller: str, dream: Dream) -> Tensor:
        """Tokens (n, K) of a dream."""
        wanted = self.networks.tokenizer.num_tokens
        if dream.tokens.shape[1] != wanted:
            raise ValueError(
                f"LoadedAgent.{caller}(): the dream has {dream.tokens.shape[1]} tokens a frame; wanted"
                f" {wanted}. It is another agent's."
            )
        return self._tensor(dream.tokens)

    def _encode(self, caller: str, frames: np.ndarray) -> Tensor:
        return self._tokens_of(self._checked_frames(caller, frames))

    def _tokens_of(self, frames: np.ndarray) -> Tensor:
        """Tokens (..., K) of frames (..., S, S, 3)."""
        return self.networks.tokenizer.encode(self._tensor(frames))

    def _checked_frames(self, caller: str, frames: np.ndarray) -> np.ndarray:
        """Frames (n, S, S, 3)."""
        given = np.asarray(frames)
        if given.dtype != np.uint8 or given.ndim not in (3, 4) or given.shape[-3:] != self.frame_shape:
            shape = ", ".join(map(str, self.frame_shape))
            what = "" if self.sees is None else f"; they show {self.sees}"
            raise ValueError(
                f"LoadedAgent.{caller}(): the frame is {given.dtype} {given.shape}; wanted uint8 ({shape}) or"
                f" (n, {shape}), as the environment of make_env() gives them{what}."
            )
        return given if given.ndim == 4 else given[None]

    def _actions(self, caller: str, action: ArrayLike, count: int) -> Tensor:
        """Actions (count,) of one for all, or of (count,)."""
        given = np.asarray(action)
        fits = given.dtype.kind in "iu" and given.shape in ((), (count,))
        if not fits or not ((given >= 0) & (given < self.num_actions)).all():
            raise ValueError(
                f"LoadedAgent.{caller}(): action is {action!r}; wanted an integer from 0 to"
                f" {self.num_actions - 1}, or {count} of them."
            )
        return self._tensor(np.broadcast_to(given, (count,)).astype(np.int64))

    def _generator(self, seed: int, purpose: str, step: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(derive_seed(int(seed), purpose, step))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

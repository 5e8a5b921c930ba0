"""The world model as an environment: the controller acts in it through the same loop as in the game."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rem_atari.models.base_tokenizer import BaseTokenizer
from rem_atari.models.base_world_model import BaseWorldModel
from rem_atari.models.code_network import Codes, ReadCodes
from rem_atari.models.memory import Memory
from rem_atari.play.rollout import TokenStep

Context = tuple[Tensor, Tensor, Tensor | None]
"""The N real observations before a start, (B, N, K) int64, the actions taken on them, (B, N) int64, and a
mask, (B, N) bool, False where a step is padding, on the left; None: all are real."""


def state_at(world_model: BaseWorldModel, codes: Codes, tokens: Tensor, context: Context | None) -> Memory:
    """The memory that `world_model.imagine` wants at observations `tokens` (B, K), after a context if any."""
    if context is None:
        state = world_model.init_state(tokens.shape[0])
    else:
        seen, actions, mask = context
        state = world_model.take_in(seen, actions, codes, mask=mask)
    return world_model.begin(tokens, codes, state)


class ImaginedEnv:
    """B imagined episodes side by side (a `rollout.TokenEnv`).

    In a step the world model reads the observation and the action, and gives the reward, the end and the next
    observation, each drawn from its distribution (but for `mean_rewards`); with POP that is one pass. An
    episode that has ended is not restarted. Its later steps have no meaning, and training must leave them
    out. Nothing here has a gradient, and nothing waits for the device, unless ended episodes are skipped.

    With POP the tokens of an observation are drawn independently of each other (that is what makes it fast),
    so where the world can go one way or another a drawn frame may show both or neither; other values of
    `world_model.draw` make that rarer.

    Args:
        world_model: in eval mode.
        tokenizer: gives the codes of the tokens.
        generator: source of the draws, on the models' device.
        show: what the controller sees of tokens, as `Agent.show`; None: their codes.
        disagreement_weight: what a step pays besides for each nat that the world model's heads disagree about
            a token.
        mean_rewards: pay the mean of a reward's distribution, and not a reward drawn from it.
        skip_ended: imagine nothing for episodes that have ended: they go on showing what they showed last,
            without rewards. That saves their part of the work, and waits for the device at every step.

    Raises:
        ValueError: the world model is in training mode, in which dropout would garble what it imagines, or it
            has no heads that could disagree and should pay for it.
    """

    def __init__(
        self,
        world_model: BaseWorldModel,
        tokenizer: BaseTokenizer,
        generator: torch.Generator,
        show: Callable[[Tensor], Tensor] | None = None,
        disagreement_weight: float = 0.0,
        mean_rewards: bool = False,
        skip_ended: bool = False,
    ) -> None:
        if world_model.training:
            raise ValueError("ImaginedEnv: world_model is in training mode; call world_model.eval() first.")
        if disagreement_weight != 0 and world_model.disagreement is None:
            raise ValueError(
                f"controller.disagreement_weight is {disagreement_weight} and"
                " world_model.disagreement_heads is 0; wanted at least 2 heads."
            )
        self.num_actions = world_model.action_embedding.num_embeddings
        self._world_model = world_model
        self._tokenizer = tokenizer
        self._generator = generator
        self._show = tokenizer.embed if show is None else show
        self._disagreement_weight = disagreement_weight
        self._mean_rewards = mean_rewards
        self._skip_ended = skip_ended
        self._imagined: Tensor | None = None  # the episodes that are, (n,) int64; None: all
        self._codes: ReadCodes | None = None
        self._state: Memory | None = None
        self._tokens: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """Tokens of the observations to act on next, (B, K) int64.

        Raises:
            ValueError: `reset` has not been called.
        """
        if self._tokens is None:
            raise ValueError("ImaginedEnv: there is no observation yet; call reset() first.")
        return self._tokens

    @torch.no_grad()
    def reset(
        self,
        tokens: Tensor,
        context_tokens: Tensor | None = None,
        context_actions: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Begin B imagined episodes.

        Args:
            tokens: the observations to begin with, (B, K) int64.
            context_tokens: the N real observations before them, (B, N, K) int64; None: no context.
            context_actions: the actions taken on those, (B, N) int64; given exactly if `context_tokens` is.
            context_mask: (B, N) bool, False where a context is padding, on the left; None: all are real.

        Returns:
            What the controller sees of `tokens`: their codes, (B, K, E), unless `show` says otherwise.

        Raises:
            ValueError: only one of context tokens and actions is given.
        """
        if (context_tokens is None) != (context_actions is None):
            raise ValueError("ImaginedEnv.reset(): context_tokens and context_actions must come together.")
        context = None if context_tokens is None else (context_tokens, context_actions, context_mask)
        self._codes = self._world_model.read_codes(self._tokenizer.codes)
        self._state = state_at(self._world_model, self._codes, tokens, context)
        self._tokens, self._imagined = tokens, None
        return self._show(tokens)

    @torch.no_grad()
    def step(self, actions: Tensor) -> TokenStep:
        """Imagine what follows the actions (B,) int64."""
        rows, before = self._imagined, self.tokens
        if rows is not None:
            before, actions = before[rows], actions[rows]
        answer = self._world_model.imagine(before, actions, self._codes, self._state, self._generator)
        self._state = answer.state
        self._tokens = self._among_all(answer.tokens, self.tokens)
        nothing = torch.zeros_like(self._tokens[:, 0])
        paid = answer.rewards
        if self._mean_rewards:
            paid = self._world_model.reward_code.mean(answer.reward_logits)
        rewards, ended = (self._among_all(x, nothing.to(x.dtype)) for x in (paid, answer.ended))
        never = torch.zeros_like(ended)
        bonus = None
        if self._disagreement_weight != 0:
            more = self._disagreement_weight * answer.disagreement
            bonus = self._among_all(more, nothing.to(more.dtype))
        if self._skip_ended:
            self._leave_out(answer.ended)
        shown = self._show(self._tokens)
        return TokenStep(shown, rewards, ended, truncated=never, restarted=never, bonus=bonus)

    def _among_all(self, values: Tensor, others: Tensor) -> Tensor:
        """Values (n, ...) of the imagined episodes, and those of the others out of (B, ...)."""
        return values if self._imagined is None else others.index_copy(0, self._imagined, values)

    def _leave_out(self, ended: Tensor) -> None:
        """Imagine those of the imagined episodes no more that have ended, (n,) bool, unless all have."""
        going_on = (~ended).nonzero().squeeze(1)
        if 0 < len(going_on) < len(ended):
            self._state = self._state.select(going_on)
            self._imagined = going_on if self._imagined is None else self._imagined[going_on]

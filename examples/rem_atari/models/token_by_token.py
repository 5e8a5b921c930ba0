"""The world model without POP: it writes the tokens of a next observation one after another.

This ablation shows what POP saves: the same decoder and heads, K passes for an imagined
observation instead of one. Token i of an observation is predicted from everything before it, the tokens
0 .. i-1 of the same observation included, so its draws agree with each other, which POP's do not.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rem_atari.config import WorldModelConfig
from rem_atari.models.base_world_model import BaseWorldModel, Imagined
from rem_atari.models.code_network import Codes
from rem_atari.models.memory import Memory
from rem_atari.models.sampling import sample_categorical
from rem_atari.models.sequence_loss import SequenceLogits


class TokenByTokenWorldModel(BaseWorldModel):
    """Predicts every token from the output at the token before it, as a language model does.

    The memory that it imagines from has seen all but the last token of the current observation: that token
    and the action are read together, and every drawn token but the last is read to draw the next.

    Args:
        cfg: sizes; `context_blocks` is at least 1, because no token precedes the first block of a sequence.
        num_tokens, code_dim, codebook_size, num_actions, code_parts: as `BaseWorldModel`.

    Raises:
        ValueError: as `BaseWorldModel`, or there is no context.

    Source: arXiv 2402.05643, section 4 (the ablation "no POP"); IRIS, arXiv 2209.00588.
    """

    def __init__(self, cfg: WorldModelConfig, **sizes: int) -> None:
        if cfg.context_blocks < 1:
            raise ValueError(
                "world_model.context_blocks is 0; with world_model.pop off it must be at least 1, because"
                " nothing stands before the first token of a sequence that could predict it."
            )
        super().__init__(cfg, **sizes)

    def forward(
        self, tokens: Tensor, actions: Tensor, codebook: Codes, *, skip_blocks: int = 1
    ) -> SequenceLogits:
        """See `BaseWorldModel.forward`; at least one block must be left out."""
        codes = self.read_codes(codebook)
        if skip_blocks < 1:
            raise ValueError(
                f"TokenByTokenWorldModel(): skip_blocks is {skip_blocks}; it must be at least 1, because"
                " nothing predicts the first token of a sequence."
            )
        read, _ = self.decoder(self._embed_blocks(self._embed_tokens(tokens, codes), actions))
        first = skip_blocks * self.block_size
        # The output at a token predicts the token after it; the one before an action predicts no token.
        before = read[:, first - 1 : -1].unflatten(1, (-1, self.block_size))[:, :, : self.num_tokens]
        at_action = read.unflatten(1, (-1, self.block_size))[:, skip_blocks:, -1]
        return SequenceLogits(
            tokens=self._token_logits(before, codes),
            rewards=self.reward_head(at_action),
            ends=self.end_head(at_action),
        )

    def begin(self, tokens: Tensor, codebook: Codes, state: Memory) -> Memory:
        """The memory after all but the last token of the observations (B, K)."""
        shown = self._embed_tokens(tokens[:, :-1], self.read_codes(codebook))
        _, memory = self.decoder(self._place(shown, 0), state.decoder)
        return state._replace(decoder=memory)

    def imagine(
        self,
        tokens: Tensor,
        actions: Tensor,
        codebook: Codes,
        state: Memory,
        generator: torch.Generator,
        *,
        temperature: float = 1.0,
    ) -> Imagined:
        """Draw what follows observations and actions: reward and end, then token by token."""
        codes = self.read_codes(codebook)
        last = self._embed_tokens(tokens[:, -1:], codes)
        action = self.action_embedding(actions)[:, None]
        block = self._place(torch.cat((last, action), dim=1), self.num_tokens - 1)
        out, memory = self.decoder(block, state.decoder)
        at_action = out[:, -1]
        reward_logits, end_logits = self.reward_head(at_action), self.end_head(at_action)
        rewards = self.reward_code.draw(reward_logits, generator, temperature=temperature)
        draw = partial(sample_categorical, generator=generator, temperature=temperature)
        ended = draw(end_logits).bool()
        drawn = [draw(self._token_logits(at_action, codes))]
        for place in range(self.num_tokens - 1):
            embedded = self._embed_tokens(drawn[-1][:, None], codes)
            out, memory = self.decoder(self._place(embedded, place), memory)
            drawn.append(draw(self._token_logits(out[:, -1], codes)))
        state = state._replace(decoder=memory)
        return Imagined(rewards, ended, torch.stack(drawn, dim=1), state, reward_logits, end_logits)

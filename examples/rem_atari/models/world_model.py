"""The POP world model: a RetNet that reads observations and actions and predicts what comes next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rem_atari.config import WorldModelConfig
from rem_atari.models.base_world_model import BaseWorldModel, Imagined
from rem_atari.models.code_network import Codes, ReadCodes
from rem_atari.models.disagreement import divergence
from rem_atari.models.local_past import LocalPast
from rem_atari.models.memory import Memory
from rem_atari.models.sampling import sample_categorical, sample_coupled
from rem_atari.models.sequence_loss import SequenceLogits


class WorldModelStep(NamedTuple):
    """The world model's outputs for an observation and an action.

    Attributes:
        reward_logits: of the reward, (B, C), classes as in `RewardCode`.
        end_logits: of the episode continuing (0) or ending (1), (B, 2).
        predicted: the outputs at the places of the next observation, (B, M, width).
        state: the memory after observation and action.
        prediction_tokens: the inputs for the next observation's tokens, (B, 1, K, width).
        disagreement: how far the heads of `Disagreement` differ about the next observation, the mean of its
            tokens in nats, (B,); None: there are no such heads.
    """

    reward_logits: Tensor
    end_logits: Tensor
    predicted: Tensor
    state: Memory
    prediction_tokens: Tensor
    disagreement: Tensor | None


class WorldModel(BaseWorldModel):
    """Predicts rewards, ends and next observations, all tokens of an observation in one pass (POP).

    K learned prediction embeddings (or, with `shared_prediction_token`, one that stands in all K places),
    started from the state before a block, give that block's K observation tokens.

    Args:
        cfg, num_tokens, code_dim, codebook_size, num_actions, code_parts: as `BaseWorldModel`.

    Source: arXiv 2402.05643; 4,628,997 parameters at the published size with 18 actions.
    """

    def forward(
        self, tokens: Tensor, actions: Tensor, codebook: Codes, *, skip_blocks: int = 0
    ) -> SequenceLogits:
        """See `BaseWorldModel.forward`."""
        codes = self.read_codes(codebook)
        observations = self._embed_tokens(tokens, codes)
        stream = self._stream(self._sequence_prediction_tokens(observations, actions, skip_blocks))
        return self._predict_blocks(observations, actions, codes, stream, skip_blocks)

    def _sequence_prediction_tokens(self, observations: Tensor, actions: Tensor, skip_blocks: int) -> Tensor:
        """What a sequence's observations are predicted from besides the memory, (B, N', K, width).

        Predicted are those of the blocks that are not skipped, and with `local_outcomes` the one after the
        last. The observations given are embedded, (B, N, K, width).
        """
        frames = 1 if self.local_past is None else self.local_past.frames
        seen = self._see(observations, actions)
        nothing = seen.new_zeros(seen.shape[0], frames, *seen.shape[2:])
        last = seen.shape[1] + frames if self.cfg.local_outcomes else -1
        return self._prediction_tokens(torch.cat((nothing, seen), dim=1)[:, skip_blocks:last])

    def _predict_blocks(
        self, observations: Tensor, actions: Tensor, codes: ReadCodes, stream: Tensor, skip_blocks: int
    ) -> SequenceLogits:
        """`forward`, given embedded observations and the prediction stream's input, (B, N', M, width)."""
        at_action, predicted, _ = self.decoder.pop(
            self._embed_blocks(observations, actions),
            stream,
            block_size=self.block_size,
            offset=skip_blocks,
            main_out="last",
        )
        at_action = at_action[:, skip_blocks:]
        blocks = at_action.shape[1]
        of_tokens, of_outcomes = predicted[:, :blocks], predicted[:, -blocks:]
        given = self._given_neighbours(of_tokens, observations[:, skip_blocks:])
        heads = None if self.disagreement is None else self.disagreement(of_tokens, len(codes))
        return SequenceLogits(
            tokens=self._token_logits(given, codes),
            rewards=self._outcome(self.reward_head, at_action, of_outcomes),
            ends=self._outcome(self.end_head, at_action, of_outcomes),
            heads=heads,
        )

    def begin(self, tokens: Tensor, codebook: Codes, state: Memory) -> Memory:
        """The memory before the observations, as it is: `imagine` reads them with their actions."""
        return state

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
        """Draw what follows observations and actions; the tokens as `world_model.draw` says."""
        codes = self.read_codes(codebook)
        step = self.step(tokens, actions, codes, state)
        return Imagined(
            rewards=self.reward_code.draw(step.reward_logits, generator, temperature=temperature),
            ended=sample_categorical(step.end_logits, generator, temperature=temperature).bool(),
            tokens=self._draw_tokens(step, tokens, codes, generator, temperature),
            state=step.state,
            reward_logits=step.reward_logits,
            end_logits=step.end_logits,
            disagreement=step.disagreement,
        )

    def step(self, tokens: Tensor, actions: Tensor, codebook: Codes, state: Memory) -> WorldModelStep:
        """Read one block and predict what follows it, in one pass of the decoder.

        Args:
            tokens: the observation, (B, K) int64.
            actions: the action taken on it, (B,) int64.
            codebook: the tokenizer's codes, (V, E).
            state: the memory before the block.
        """
        codes = self.read_codes(codebook)
        block = self._embed_tokens(tokens[:, None], codes), actions[:, None]
        seen = self._see(*block)
        prediction_tokens = self._prediction_tokens(torch.cat((state.recent, seen), dim=1))
        at_action, predicted, memory = self.decoder.pop(
            self._embed_blocks(*block),
            self._stream(prediction_tokens),
            state.decoder,
            block_size=self.block_size,
            offset=1,
            main_out="last",
        )
        at_action, predicted = at_action[:, 0], predicted[:, 0]
        return WorldModelStep(
            reward_logits=self._outcome(self.reward_head, at_action, predicted),
            end_logits=self._outcome(self.end_head, at_action, predicted),
            predicted=predicted,
            state=Memory(memory, self._keep(state, seen)),
            prediction_tokens=prediction_tokens,
            disagreement=self._disagreement(predicted, codes),
        )

    def token_logits(self, step: WorldModelStep, codebook: Codes) -> Tensor:
        """Logits of the next observation's tokens after a step, each place for itself, (B, K, V)."""
        return self._token_logits(step.predicted, self.read_codes(codebook))

    def _draw_tokens(
        self,
        step: WorldModelStep,
        before: Tensor,
        codes: ReadCodes,
        generator: torch.Generator,
        temperature: float,
    ) -> Tensor:
        """The tokens of the observations after those `before`, (B, K) int64 both."""
        logits = self.token_logits(step, codes)
        if self.cfg.draw == "coupled":
            return sample_coupled(logits, before, generator, temperature=temperature)
        return sample_categorical(logits, generator, temperature=temperature)

    def _given_neighbours(self, predicted: Tensor, observations: Tensor) -> Tensor:
        """What tokens are predicted from.

        Args:
            predicted: the decoder's outputs at their places, (B, N, M, width).
            observations: the embedded observations that are predicted, (B, N, K, width).
        """
        return predicted

    def _disagreement(self, predicted: Tensor, codes: ReadCodes) -> Tensor | None:
        """How far heads differ about the tokens of outputs (B, K, width): the mean in nats, (B,)."""
        if self.disagreement is None:
            return None
        return divergence(self.disagreement(predicted, len(codes))).mean(dim=-1)

    def _make_local_past(self, cfg: WorldModelConfig) -> LocalPast | None:
        if cfg.local_frames == 0:
            return None
        return LocalPast(cfg.embed_dim, cfg.local_frames, self.num_tokens)

    def _make_prediction_embedding(self, cfg: WorldModelConfig) -> nn.Embedding:
        return nn.Embedding(1 if cfg.shared_prediction_token else self.num_tokens, cfg.embed_dim)

    def _outcome(self, head: nn.Sequential, at_action: Tensor, led_to: Tensor) -> Tensor:
        """Logits (..., C) of the reward or the end.

        Args:
            head: what gives them.
            at_action: the outputs at the action tokens, (..., width).
            led_to: those at the predictions of the observations that follow, (..., M, width).
        """
        if not self.cfg.local_outcomes:
            return head(at_action)
        # An event happens in one place, so the largest logits over places count.
        said = head[:-1](torch.cat((at_action[..., None, :], led_to), dim=-2))
        return head[-1](said.amax(dim=-2))

    def _prediction_tokens(self, seen: Tensor) -> Tensor:
        """What N observations are predicted from besides the memory, (B, N, K, width).

        Args:
            seen: the N observations before them, and the F - 1 before those, as `_see` shows them.
        """
        learned = self.prediction_embedding.weight
        if self.local_past is None:
            return learned.expand(*seen.shape[:2], self.num_tokens, learned.shape[-1])
        return learned + self.local_past(seen)

    def _stream(self, prediction_tokens: Tensor) -> Tensor:
        """The prediction stream, (B, N, M, width), M being K, of prediction tokens (B, N, K, width)."""
        return prediction_tokens

"""What every world model shares: a RetNet that reads observations and actions, heads, and the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from rem_atari.config import WorldModelConfig
from rem_atari.models.code_network import CodeNetwork, Codes, ReadCodes
from rem_atari.models.disagreement import Disagreement
from rem_atari.models.heads import code_logits, make_head
from rem_atari.models.local_past import LocalPast
from rem_atari.models.memory import Memory
from rem_atari.models.rewards import RewardCode
from rem_atari.models.sequence_loss import SequenceLogits, WorldModelLoss, sequence_loss
from rem_atari.models.sequence_tokens import SequenceTokens
from retpop import RetNetConfig, RetNetDecoder


class Imagined(NamedTuple):
    """What a world model imagines after observations and actions.

    Attributes:
        rewards: the rewards, or their signs, see `RewardCode.draw`; (B,) float32.
        ended: the episode ended, (B,) bool.
        tokens: the next observations, (B, K) int64.
        state: the memory from which imagination continues.
        reward_logits: the logits of the rewards, (B, C), classes as in `RewardCode`.
        end_logits: the logits of the ends, continuing (0) or ending (1), (B, 2).
        disagreement: as in `WorldModelStep`, (B,).
    """

    rewards: Tensor
    ended: Tensor
    tokens: Tensor
    state: Memory
    reward_logits: Tensor
    end_logits: Tensor
    disagreement: Tensor | None = None


class BaseWorldModel(nn.Module, ABC):
    """A RetNet decoder over blocks, and heads for observation tokens, rewards and ends.

    A block is the K tokens of an observation and the action taken on it. The decoder reads blocks; its output
    at the action token gives reward and end. Subclasses differ in how they predict the K tokens of the next
    observation.

    Observation tokens are embedded with the tokenizer's codebook, which every method is handed and into which
    no gradient flows; with `code_network`, by a network that reads it; or, with `own_token_embedding`, with a
    table of the model's own (the codebook handed in is then not read). The decoder starts as
    `retpop.RetNetDecoder` initialises it, each layer for itself (the published agent starts all layers as
    copies of one); heads and embeddings start as torch initialises them.

    Args:
        cfg: sizes.
        num_tokens: K, tokens of an observation.
        code_dim: E, dimension of the tokenizer's codes.
        codebook_size: the most codes that there will be.
        num_actions: number of actions.
        code_parts: the number of parts that a code consists of, see `BaseTokenizer.code_parts`.

    Raises:
        ValueError: the codes do not fit the decoder's width and the model has no table of its own, the
            context leaves no block to learn from, or there are heads that cannot disagree.
    """

    def __init__(
        self,
        cfg: WorldModelConfig,
        *,
        num_tokens: int,
        code_dim: int,
        codebook_size: int,
        num_actions: int,
        code_parts: int = 1,
    ) -> None:
        super().__init__()
        _check_config(cfg, code_dim)
        width = cfg.embed_dim
        self.cfg = cfg
        self.reward_code = RewardCode(cfg.reward_bins)
        self.num_tokens = num_tokens
        self.block_size = num_tokens + 1
        self.context_blocks = cfg.context_blocks
        self.local_past = self._make_local_past(cfg)
        self.token_embedding = nn.Embedding(codebook_size, width) if cfg.own_token_embedding else None
        self.code_network = None
        if cfg.code_network > 0:
            self.code_network = CodeNetwork(code_dim, code_parts, cfg.code_network, width)
        self.action_embedding = nn.Embedding(num_actions, width)
        self.prediction_embedding = self._make_prediction_embedding(cfg)
        self.position_embedding = nn.Embedding(self.block_size, width) if cfg.position_in_block else None
        self.decoder = RetNetDecoder(
            RetNetConfig(
                embed_dim=width,
                num_heads=cfg.num_heads,
                num_layers=cfg.num_layers,
                ffn_dim=cfg.ffn_dim,
                decay="log_spaced",
                position="retnet",
                dropout=cfg.dropout,
            )
        )
        self.token_head = make_head(width, codebook_size)
        self.reward_head = make_head(width, self.reward_code.num_classes)
        self.end_head = make_head(width, 2)
        self.disagreement = None
        if cfg.disagreement_heads != 0:
            self.disagreement = Disagreement(width, codebook_size, cfg.disagreement_heads)
        if self.code_network is not None:
            nn.init.zeros_(self.token_head[-1].weight)  # what codes look like comes first
        if cfg.reward_bins > 0:
            # The mean of all bins: rewards start at 0, not at what random weights make of the largest bins.
            nn.init.zeros_(self.reward_head[-1].weight)
            nn.init.zeros_(self.reward_head[-1].bias)

    @abstractmethod
    def forward(
        self, tokens: Tensor, actions: Tensor, codebook: Codes, *, skip_blocks: int = 0
    ) -> SequenceLogits:
        """Predictions over whole sequences, from an empty memory.

        Args:
            tokens: observations, (B, N, K) int64.
            actions: (B, N) int64.
            codebook: the tokenizer's codes, (V, E); fewer than `codebook_size` where some are still to come.
            skip_blocks: number of first blocks whose predictions are left out.
        """

    @abstractmethod
    def begin(self, tokens: Tensor, codebook: Codes, state: Memory) -> Memory:
        """The memory that `imagine` needs at observations (B, K), from the memory before them."""

    @abstractmethod
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
        """Draw what follows observations and actions.

        Args:
            tokens: the observations, (B, K) int64.
            actions: the actions taken on them, (B,) int64.
            codebook: the tokenizer's codes, (V, E).
            state: from `begin` at these observations, or from the `imagine` that gave them.
            generator: source of the draws, on the model's device.
            temperature: temperature of the draws; 0: always the most likely.
        """

    def hidden_layers(self) -> list[nn.Module]:
        """The parts between embeddings and heads."""
        return [part for part in (self.decoder, self.local_past) if part is not None]

    def init_state(self, batch_size: int) -> Memory:
        """The memory before `batch_size` sequences have begun."""
        weight = self.action_embedding.weight
        memory = self.decoder.init_state(batch_size, device=weight.device, dtype=weight.dtype)
        kept = (0, 0)
        if self.local_past is not None:
            kept = (self.local_past.frames - 1, self.num_tokens, weight.shape[1])
        return Memory(memory, weight.new_zeros(batch_size, *kept))

    def loss(self, batch: SequenceTokens, codebook: Codes, weights: Tensor | None = None) -> WorldModelLoss:
        """The training loss: the weighted sum of the cross-entropies of tokens, rewards and ends.

        The first `context_blocks` of a sequence and padding carry no loss, and a truncated step teaches no
        end, because the episode might have gone on. Padding must be on the right.

        Args:
            batch: sequences of more than `context_blocks` steps.
            codebook: the tokenizer's codes, (V, E).
            weights: the weight of each sequence in all means, (B,) float32; None: equal weights.

        Raises:
            ValueError: the sequences are no longer than the context.
        """
        skipped = self.context_blocks
        if batch.tokens.shape[1] <= skipped:
            raise ValueError(
                f"WorldModel.loss(): the sequences have {batch.tokens.shape[1]} blocks; wanted more than "
                f"world_model.context_blocks, which is {skipped}."
            )
        logits = self(batch.tokens, batch.actions, codebook, skip_blocks=skipped)
        return sequence_loss(logits, batch, self.reward_code, self.cfg, weights)

    def take_in(
        self,
        tokens: Tensor,
        actions: Tensor,
        codebook: Codes,
        state: Memory | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Memory:
        """The memory after reading blocks, without predicting anything.

        Args:
            tokens: observations, (B, N, K) int64.
            actions: (B, N) int64.
            codebook: the tokenizer's codes, (V, E).
            state: the memory before them; None: empty.
            mask: (B, N) bool, False where a block is padding, which comes before all real blocks and leaves
                an empty memory; None: all are real.
        """
        codes = self.read_codes(codebook)
        before = self.init_state(tokens.shape[0]) if state is None else state
        observations = self._embed_tokens(tokens, codes)
        seen = self._see(observations, actions)
        blocks = self._embed_blocks(observations, actions)
        is_first = None
        if mask is not None and mask.shape[1] > 1:  # memory starts anew at the first real block
            is_first = functional.pad(mask[:, 1:] & ~mask[:, :-1], (1, 0))
        if mask is not None:
            seen = seen * mask.view(*mask.shape, *(1,) * (seen.dim() - 2))
        no_predictions = blocks.new_empty(blocks.shape[0], 0, self.num_tokens, blocks.shape[-1])
        _, _, memory = self.decoder.pop(
            blocks,
            no_predictions,
            before.decoder,
            block_size=self.block_size,
            reset=is_first,
            main_out="last",
        )
        if mask is not None:
            memory = memory.reset(~mask[:, -1])
        return Memory(memory, self._keep(before, seen))

    def _see(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The input of `LocalPast` for embedded frames (B, N, K, width) and the actions (B, N) taken on them.

        (B, N, K, width), or without one nothing, (B, N, 0).
        """
        if self.local_past is None:
            return observations.new_empty(*actions.shape, 0)
        return observations + self.action_embedding(actions)[:, :, None]

    def _keep(self, before: Memory, seen: Tensor) -> Tensor:
        """The last of the frames that the memory holds and of those `seen` after them."""
        together = torch.cat((before.recent, seen), dim=1)
        return together[:, together.shape[1] - before.recent.shape[1] :]

    def _make_prediction_embedding(self, cfg: WorldModelConfig) -> nn.Embedding | None:
        """The embedding of prediction tokens, if the model has any."""
        return None

    def _make_local_past(self, cfg: WorldModelConfig) -> LocalPast | None:
        """The module that reads the last frames, if the model has it."""
        return None

    def _embed_blocks(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Embedded observations (B, N, K, width) and actions (B, N) as a stream, (B, N·(K+1), width)."""
        blocks = torch.cat([observations, self.action_embedding(actions)[:, :, None]], dim=2)
        return rearrange(self._place(blocks, 0), "b n l e -> b (n l) e")

    def read_codes(self, codebook: Codes) -> ReadCodes:
        """The tokenizer's codes, (V, E), as the weights at this time read them.

        Every method that wants the codes takes the result in their place. That saves time where the weights
        stay the same for many calls.
        """
        if isinstance(codebook, ReadCodes):
            return codebook
        if self.code_network is not None:
            return self.code_network(codebook)
        own = self.token_embedding
        return ReadCodes(codebook.detach() if own is None else own.weight, None, len(codebook))

    def _embed_tokens(self, tokens: Tensor, codes: ReadCodes) -> Tensor:
        return functional.embedding(tokens, codes.embeddings)

    def _token_logits(self, predicted: Tensor, codes: ReadCodes) -> Tensor:
        """What the decoder's outputs (..., width) say of a token: logits of the codes there are, (..., V)."""
        return code_logits(self.token_head, predicted, len(codes), codes.head_weights)

    def _place(self, embedded: Tensor, first: int) -> Tensor:
        """Add to (..., n, width) the embeddings of places `first` .. `first + n - 1` of a block, if any."""
        if self.position_embedding is None:
            return embedded
        return embedded + self.position_embedding.weight[first : first + embedded.shape[-2]]


def _check_config(cfg: WorldModelConfig, code_dim: int) -> None:
    if cfg.own_token_embedding and cfg.code_network > 0:
        raise ValueError(
            f"world_model.code_network is {cfg.code_network} and world_model.own_token_embedding is on;"
            " tokens are embedded by one of them, so wanted 0 or off."
        )
    if not cfg.own_token_embedding and cfg.code_network == 0 and cfg.embed_dim != code_dim:
        raise ValueError(
            f"world_model.embed_dim is {cfg.embed_dim} and tokenizer.code_dim is {code_dim}; observation "
            "tokens are embedded with the codes, so the two must be equal unless "
            "world_model.own_token_embedding is on."
        )
    if cfg.disagreement_heads != 0 and (not cfg.pop or cfg.draw == "refine"):
        raise ValueError(
            f"world_model.disagreement_heads is {cfg.disagreement_heads}; wanted 0 with world_model.pop off"
            " or world_model.draw refine, where no pass predicts all tokens from what came before alone."
        )
    if not 0 <= cfg.context_blocks < cfg.sequence_blocks:
        raise ValueError(
            f"world_model.context_blocks is {cfg.context_blocks}; it must be at least 0 and below "
            f"world_model.sequence_blocks, which is {cfg.sequence_blocks}."
        )

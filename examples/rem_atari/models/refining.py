"""The world model that draws an observation in a few passes; each pass reads the tokens drawn before."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rem_atari.config import WorldModelConfig
from rem_atari.models.code_network import Codes, ReadCodes
from rem_atari.models.controller import entropy
from rem_atari.models.sampling import sample_categorical
from rem_atari.models.sequence_loss import SequenceLogits
from rem_atari.models.world_model import WorldModel, WorldModelStep


class RefiningWorldModel(WorldModel):
    """Predicts all unknown tokens of an observation in one pass, given those that are known.

    K hints precede the K prediction tokens of a block: the prediction embedding of each place, plus the
    embedding of its token if that is known. In training a random share of each observation is known, none of
    it in half of the blocks; only unknown tokens carry a loss. Imagination draws in passes: the first knows
    nothing and keeps the tokens it is surest of, the next reads these and keeps more, and the last draws the
    few that are left. So tokens that depend on each other agree, at the cost of more passes. The parameters
    are those of `WorldModel`.

    Which tokens are kept depends on the entropy of their distributions and not on what was drawn, so draws
    follow the model's distribution of one token given others. (To keep what was drawn with a high chance, as
    MaskGIT does, would draw likely tokens too often.)

    Args:
        cfg, num_tokens, code_dim, codebook_size, num_actions, code_parts: as `WorldModel`.

    Raises:
        ValueError: as `WorldModel`, or `local_outcomes` is on.

    Source: MaskGIT, arXiv 2202.04200, with the entropy for its confidence.
    """

    def __init__(self, cfg: WorldModelConfig, **sizes: int) -> None:
        if cfg.local_outcomes:
            raise ValueError(
                "world_model.local_outcomes is on with world_model.draw refine; in training the predictions"
                " read parts of what the action led to, and would give rewards and ends away."
            )
        super().__init__(cfg, **sizes)

    def forward(
        self, tokens: Tensor, actions: Tensor, codebook: Codes, *, skip_blocks: int = 0
    ) -> SequenceLogits:
        """See `BaseWorldModel.forward`; in eval mode no token is known."""
        codes = self.read_codes(codebook)
        if not self.training:
            return super().forward(tokens, actions, codes, skip_blocks=skip_blocks)
        known = _some(tokens)
        observations = self._embed_tokens(tokens, codes)
        plain = self._sequence_prediction_tokens(observations, actions, skip_blocks)
        stream = self._with_hints(plain, tokens[:, skip_blocks:], known[:, skip_blocks:], codes)
        logits = self._predict_blocks(observations, actions, codes, stream, skip_blocks)
        return logits._replace(unknown=~known[:, skip_blocks:])

    def _draw_tokens(
        self,
        step: WorldModelStep,
        before: Tensor,
        codes: ReadCodes,
        generator: torch.Generator,
        temperature: float,
    ) -> Tensor:
        logits, tokens = self.token_logits(step, codes), torch.zeros_like(before)
        known = torch.zeros_like(before, dtype=torch.bool)
        left = _schedule(self.num_tokens, self.cfg.refine_passes)
        for now, later in pairwise(left):
            drawn = sample_categorical(logits, generator, temperature=temperature)
            tokens = torch.where(known, tokens, drawn)
            if later == 0:
                break
            doubt = entropy(logits.float()).masked_fill(known, torch.inf)
            kept = doubt.topk(now - later, dim=-1, largest=False).indices
            known = known.scatter(-1, kept, True)
            logits = self._predict_unknown(tokens, known, codes, step)
        return tokens

    def _predict_unknown(
        self, tokens: Tensor, known: Tensor, codes: ReadCodes, step: WorldModelStep
    ) -> Tensor:
        """Logits (B, K, V) of the observation after `step`, given its known tokens (B, K)."""
        stream = self._with_hints(step.prediction_tokens, tokens[:, None], known[:, None], codes)
        nothing = stream.new_empty(stream.shape[0], 0, stream.shape[-1])
        _, predicted, _ = self.decoder.pop(nothing, stream, step.state.decoder, block_size=self.block_size)
        return self._token_logits(predicted[:, 0], codes)

    def _with_hints(self, plain: Tensor, tokens: Tensor, known: Tensor, codes: ReadCodes) -> Tensor:
        """The prediction stream's input, given some of the tokens (B, N, K): (B, N, 2 K, width)."""
        hints = plain + self._embed_tokens(tokens, codes) * known[..., None]
        return torch.cat((hints, plain), dim=2)

    def _stream(self, prediction_tokens: Tensor) -> Tensor:
        return torch.cat((prediction_tokens, prediction_tokens), dim=2)

    def _token_logits(self, predicted: Tensor, codes: ReadCodes) -> Tensor:
        return super()._token_logits(predicted[..., self.num_tokens :, :], codes)


def _some(tokens: Tensor) -> Tensor:
    """A random choice of the tokens (B, N, K) of each block, none in half of the blocks, bool."""
    share = torch.rand(*tokens.shape[:2], 1, device=tokens.device) * 2 - 1
    return torch.rand(tokens.shape, device=tokens.device) < share


def _schedule(num_tokens: int, passes: int) -> list[int]:
    """The number of unknown tokens before each pass, and finally 0; it shrinks by a constant factor.

    A pass draws its tokens independently of each other; the last ones, the least certain, are few.
    """
    left = [round(num_tokens ** (1 - each / passes)) for each in range(passes)]
    return list(dict.fromkeys([*left, 0]))

"""The tokenizer: a VQ-VAE that turns a frame into a square of tokens and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rem_atari.config import TokenizerConfig
from rem_atari.models.conv_tokenizer import ConvTokenizer, Quantized, count_uses


class Tokenizer(ConvTokenizer):
    """A convolutional encoder, a learned codebook and a convolutional decoder.

    A token is the index of the code nearest to the encoder's output at its patch. The codes start uniformly
    in ±1/codebook_size.

    Args:
        cfg: sizes and weights of the losses.
        frame_size: S, the side of a frame in pixels.

    Raises:
        ValueError: as `ConvTokenizer`.

    Source: arXiv 2402.05643 (the VQ-VAE of IRIS, arXiv 2209.00588, without attention and residual blocks);
    3,189,667 parameters at the published size.
    """

    uses: Tensor
    """How often training used each code since dead codes were last restarted, (V,) int64."""

    def __init__(self, cfg: TokenizerConfig, frame_size: int) -> None:
        super().__init__(cfg, frame_size, code_dim=cfg.code_dim, codebook_size=cfg.codebook_size)
        nn.init.uniform_(self.codebook.weight, -1 / cfg.codebook_size, 1 / cfg.codebook_size)
        self.register_buffer("uses", torch.zeros(cfg.codebook_size, dtype=torch.int64))

    def _add_codes(self) -> None:
        self.codebook = nn.Embedding(self.codebook_size, self.code_dim)

    @property
    def codes(self) -> Tensor:
        """The codebook as a table without gradient, (V, E)."""
        return self.codebook.weight.detach()

    @torch.no_grad()
    def initialize_codebook(self, frames: Tensor, generator: torch.Generator) -> None:
        """Replace every code by an encoder output of `frames`, spread out as k-means++ spreads its centres.

        Args:
            frames: uint8 (B, S, S, 3).
            generator: source of the choice, on the module's device.
        """
        outputs = self._encoder_output(frames).flatten(0, 1)
        self.codebook.weight.copy_(_spread(outputs, self.codebook_size, outputs.new_empty(0), generator))
        self.uses.zero_()

    @torch.no_grad()
    def restart_dead_codes(self, frames: Tensor, generator: torch.Generator) -> int:
        """Move the codes that training has not used since the last call onto encoder outputs of `frames`.

        The outputs are chosen far from the codes in use and from each other. Counting starts anew.

        Args:
            frames: uint8 (B, S, S, 3).
            generator: source of the choice, on the module's device.

        Returns:
            The number of codes moved.
        """
        dead = self.uses == 0
        count = int(dead.sum())
        if count > 0:
            outputs = self._encoder_output(frames).flatten(0, 1)
            self.codebook.weight[dead] = _spread(outputs, count, self.codebook.weight[~dead], generator)
        self.uses.zero_()
        return count

    def _nearest(self, outputs: Tensor) -> Tensor:
        """Index of the code nearest to each encoder output: (B, K, E) to int64 (B, K)."""
        # In bfloat16 the distances to neighbouring codes would often be equal.
        with torch.autocast(outputs.device.type, enabled=False):
            distances = _distances(outputs.flatten(0, 1), self.codes)
        return distances.argmin(dim=-1).unflatten(0, outputs.shape[:2])

    def _quantize(self, outputs: Tensor) -> Quantized:
        """The nearest codes. They move towards the outputs, and the outputs towards their codes."""
        with torch.no_grad():
            tokens = self._nearest(outputs)
            if self.training:
                self.uses += count_uses(tokens, self.codebook_size)
        nearest = self.codebook(tokens)
        codebook = functional.mse_loss(nearest, outputs.detach())
        commitment = functional.mse_loss(outputs, nearest.detach())
        return Quantized(
            tokens,
            codes=outputs + (nearest - outputs).detach(),
            loss=self.cfg.codebook_weight * codebook + self.cfg.commitment_weight * commitment,
            metrics={"codebook": codebook, "commitment": commitment},
        )


def _distances(rows: Tensor, codes: Tensor) -> Tensor:
    """Squared distances (n, V) of rows (n, E) to codes (V, E), less each row's own |row|²."""
    return torch.addmm(codes.square().sum(dim=-1), rows, codes.T, alpha=-2)


def _spread(rows: Tensor, count: int, codes: Tensor, generator: torch.Generator) -> Tensor:
    """Choose `count` of the rows (n, E), far from the codes (V, E) that are there and from each other.

    Each is drawn with a chance in proportion to its squared distance from the nearest one already there
    (k-means++, Arthur and Vassilvitskii 2007). So the few patches that show an object get codes too, where a
    uniform choice would take the background again and again.
    """
    if len(codes) > 0:
        nearest = torch.cdist(rows, codes).amin(dim=-1).square()
    else:
        nearest = torch.ones_like(rows[:, 0])
    chosen = []
    for _ in range(count):
        # The tiny constant keeps the draw possible where every row coincides with a code.
        index = torch.multinomial(nearest + 1e-12, 1, generator=generator)
        chosen.append(rows[index])
        nearest = torch.minimum(nearest, (rows - rows[index]).square().sum(dim=-1))
    return torch.cat(chosen)

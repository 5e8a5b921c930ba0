"""Tokenizers with a convolutional encoder and decoder around codes of some kind."""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from rem_atari.config import TokenizerConfig
from rem_atari.models.base_tokenizer import BaseTokenizer, foreground_of, to_floats
from rem_atari.models.lpips import Lpips


class Quantized(NamedTuple):
    """Encoder outputs as codes.

    Attributes:
        tokens: indices of the codes, (B, K) int64.
        codes: the codes, through which gradients pass straight to the outputs, (B, K, E).
        loss: the weighted part of the loss that comes from quantising; a scalar.
        metrics: measurements of quantising.
    """

    tokens: Tensor
    codes: Tensor
    loss: Tensor
    metrics: dict[str, Tensor]


class ConvTokenizer(BaseTokenizer):
    """A convolutional encoder, codes, and a convolutional decoder.

    The side of a frame is halved between one of the configured channels and the next. A token is the index of
    the code for the encoder's output at its patch. The encoder also sees the patch's surroundings, unless it
    is patchwise. Weights start as torch initialises them.

    Args:
        cfg: sizes and weights of the losses.
        frame_size: S, the side of a frame in pixels.
        code_dim, codebook_size: as `BaseTokenizer`.

    Raises:
        ValueError: the frame cannot be halved so often, the groups do not divide every layer's channels, or
            a patchwise encoder's last norm has a group for each number and would make it constant.
    """

    def __init__(self, cfg: TokenizerConfig, frame_size: int, *, code_dim: int, codebook_size: int) -> None:
        super().__init__(cfg, frame_size, code_dim=code_dim, codebook_size=codebook_size)
        if any(channels % cfg.groups != 0 for channels in cfg.channels):
            raise ValueError(
                f"tokenizer.groups is {cfg.groups}; it must divide each of tokenizer.channels {cfg.channels}."
            )
        if cfg.patchwise and cfg.groups == cfg.channels[-1]:
            raise ValueError(
                f"tokenizer.groups is {cfg.groups}, the last of tokenizer.channels {cfg.channels}: "
                "with tokenizer.patchwise norms over one number each make all patches equal; give fewer."
            )
        widest = cfg.channels[-1]
        self.encoder = _encoder(cfg.channels, cfg.groups)
        self.to_code = nn.Conv2d(widest, code_dim, kernel_size=1)
        self._add_codes()
        self.from_code = nn.Conv2d(code_dim, widest, kernel_size=1)
        self.decoder = _decoder(cfg.channels, cfg.groups)

    @abstractmethod
    def _add_codes(self) -> None:
        """Register the codes, between encoder and decoder."""

    @abstractmethod
    def _nearest(self, outputs: Tensor) -> Tensor:
        """Index of the code that stands for each encoder output: (B, K, E) to int64 (B, K)."""

    @abstractmethod
    def _quantize(self, outputs: Tensor) -> Quantized:
        """Encoder outputs (B, K, E) as codes, for training."""

    def compile_networks(self) -> None:
        """See `BaseTokenizer.compile_networks`."""
        self.encoder.compile()
        self.decoder.compile()

    def loss(
        self, frames: Tensor, *, background: Tensor | None, perceptual: Lpips | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss on a batch of frames.

        The decoder sees codes; its gradient passes them straight through to the encoder.

        Args:
            frames: uint8 (B, S, S, 3).
            background: uint8 (S, S, 3), the median frame. Pixels that differ from it count 1 +
                foreground_weight times in the reconstruction. None: all count once.
            perceptual: the network of the perceptual loss; None without it, where perceptual_weight is 0.

        Returns:
            The loss, and the metrics as scalars without gradient: loss, reconstruction (mean squared error of
            all pixels, unweighted, frames in [-1, 1]), those of the codes, codes_used (distinct codes in the
            batch); with a background, foreground_error (mean squared error of the foreground's pixels;
            NaN if there are none); with a perceptual network, perceptual (mean distance of LPIPS).

        Raises:
            ValueError: the frames have another shape, or a perceptual or foreground weight comes without the
                network or the background that it needs.
        """
        self._check_frames("loss", frames, leading="B")
        self._check_loss_settings(background, perceptual)
        quantized = self._quantize(self._encoder_output(frames))
        image_loss, image_metrics = self._image_loss(
            self._reconstruct(quantized.codes), frames, background, perceptual
        )
        loss = image_loss + quantized.loss
        metrics = {"loss": loss, **quantized.metrics, **image_metrics}
        metrics["codes_used"] = (count_uses(quantized.tokens, self.codebook_size) > 0).sum().float()
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def _tokenize(self, frames: Tensor) -> Tensor:
        return self._nearest(self._encoder_output(frames))

    def _draw(self, tokens: Tensor) -> Tensor:
        return self._reconstruct(self.embed(tokens))

    def _encoder_output(self, frames: Tensor) -> Tensor:
        """The encoder's output for each patch: uint8 (B, S, S, 3) to (B, K, E)."""
        images = _to_images(to_floats(frames))
        if self.cfg.patchwise:
            images = rearrange(images, "b c (h p) (w q) -> (b h w) c p q", h=self.grid, w=self.grid)
        outputs = rearrange(self.to_code(self.encoder(images)).float(), "b e h w -> (b h w) e")
        return outputs.unflatten(0, (frames.shape[0], self.num_tokens))

    def _reconstruct(self, codes: Tensor) -> Tensor:
        """Frames of codes: (B, K, E) to (B, S, S, 3) about [-1, 1]."""
        squares = rearrange(codes, "b (h w) e -> b e h w", h=self.grid)
        return rearrange(self.decoder(self.from_code(squares)).float(), "b c h w -> b h w c")

    def _image_loss(
        self, reconstructed: Tensor, frames: Tensor, background: Tensor | None, perceptual: Lpips | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a reconstruction (B, S, S, 3) of frames, and its metrics."""
        wanted = to_floats(frames)
        weighted, metrics = self._pixel_losses((reconstructed - wanted).square(), frames, background)
        loss = self.cfg.reconstruction_weight * weighted
        if perceptual is not None:
            metrics["perceptual"] = perceptual(_to_images(reconstructed), _to_images(wanted)).mean()
            loss = loss + self.cfg.perceptual_weight * metrics["perceptual"]
        return loss, metrics

    def _pixel_losses(
        self, errors: Tensor, frames: Tensor, background: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean of squared errors (B, S, S, 3); the metrics reconstruction and foreground_error."""
        reconstruction = errors.mean()
        if background is None:
            return reconstruction, {"reconstruction": reconstruction}
        foreground = foreground_of(frames, background)[..., None]
        foreground_sum = (errors * foreground).sum()
        weighted = reconstruction + self.cfg.foreground_weight * foreground_sum / errors.numel()
        foreground_error = foreground_sum / (3 * foreground.sum())
        return weighted, {"reconstruction": reconstruction, "foreground_error": foreground_error}

    def _check_loss_settings(self, background: Tensor | None, perceptual: Lpips | None) -> None:
        if self.cfg.perceptual_weight > 0 and perceptual is None:
            raise ValueError(
                f"{type(self).__name__}.loss(): perceptual is None but tokenizer.perceptual_weight is "
                f"{self.cfg.perceptual_weight}; give the network of the perceptual loss (LPIPS)."
            )
        if self.cfg.foreground_weight > 0 and background is None:
            raise ValueError(
                f"{type(self).__name__}.loss(): background is None but tokenizer.foreground_weight is "
                f"{self.cfg.foreground_weight}; give the median frame."
            )


def count_uses(tokens: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs among the tokens, (codebook_size,) int64, without waiting for the device."""
    flat = tokens.flatten()
    return flat.new_zeros(codebook_size).index_add_(0, flat, torch.ones_like(flat))


def _encoder(channels: tuple[int, ...], groups: int) -> nn.Sequential:
    """From an image of 3 channels to features of channels[-1]; each entry after the first halves the side."""
    layers: list[nn.Module] = [_conv(3, channels[0])]
    for before, after in pairwise(channels):
        halve = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(before, after, kernel_size=3, stride=2)]
        layers += [*_norm(before, groups), *halve, _conv(after, after)]
    return nn.Sequential(*layers, *_norm(channels[-1], groups), _conv(channels[-1], channels[-1]))


def _decoder(channels: tuple[int, ...], groups: int) -> nn.Sequential:
    """The encoder's mirror image: from features with channels[-1] to an image with 3 channels."""
    layers: list[nn.Module] = [_conv(channels[-1], channels[-1])]
    for before, after in pairwise(reversed(channels)):
        double = [nn.Upsample(scale_factor=2, mode="nearest-exact"), _conv(before, after)]
        layers += [*_norm(before, groups), *double, _conv(after, after)]
    return nn.Sequential(*layers, *_norm(channels[0], groups), _conv(channels[0], 3))


def _conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel_size=3, padding=1)


def _norm(channels: int, groups: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(groups, channels, eps=1e-6), nn.SiLU()


def _to_images(frames: Tensor) -> Tensor:
    """(B, S, S, 3) to (B, 3, S, S)."""
    # A view: channels stay last in memory, which trains a fifth faster on a CPU than a copy would.
    return rearrange(frames, "b h w c -> b c h w")

"""The tokenizer: a VQ-VAE that turns a frame into a square of tokens and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from einops import pack, rearrange, unpack
from torch import Tensor, nn
from torch.nn import functional

from rem_atari.config import TokenizerConfig
from rem_atari.models.lpips import Lpips

FOREGROUND_THRESHOLD = 10
"""A pixel is foreground where a channel is more than so many levels (of 255) from the background."""

FRAMES_AT_ONCE = 256
"""Frames encoded or decoded in one pass; bounds the memory of the first, widest layers."""

FRAMES_AT_ONCE_ON_A_CPU = 16
"""There a few frames, whose layers stay in the cache, are faster than many."""


class Tokenizer(nn.Module):
    """A convolutional encoder, a codebook and a convolutional decoder.

    A frame of S x S pixels becomes grid x grid tokens, row by row; the side is halved between one of the
    configured channels and the next. A token is the index of the code nearest to what the encoder says of its
    patch, whose surroundings it sees too, unless it is patchwise. Weights start as torch initialises them,
    the codes uniformly in ±1/codebook_size.

    Args:
        cfg: sizes and weights of the losses.
        frame_size: S, the side of a frame in pixels.

    Raises:
        ValueError: the frame cannot be halved so often, the groups do not divide every layer's channels, or
            a patchwise encoder's last norm has a group for each number and would make it constant.

    Source: arXiv 2402.05643 (the VQ-VAE of IRIS, arXiv 2209.00588, without attention and residual blocks);
    3,189,667 parameters at the published size.
    """

    uses: Tensor
    """How often training used each code since dead codes were last restarted, (V,) int64."""

    def __init__(self, cfg: TokenizerConfig, frame_size: int) -> None:
        super().__init__()
        stride = 2 ** (len(cfg.channels) - 1)
        if frame_size % stride != 0:
            raise ValueError(
                f"env.frame_size is {frame_size}; tokenizer.channels {cfg.channels} halve a frame "
                f"{len(cfg.channels) - 1} times, so it must be a multiple of {stride}."
            )
        if any(channels % cfg.groups != 0 for channels in cfg.channels):
            raise ValueError(
                f"tokenizer.groups is {cfg.groups}; it must divide each of tokenizer.channels {cfg.channels}."
            )
        if cfg.patchwise and cfg.groups == cfg.channels[-1]:
            raise ValueError(
                f"tokenizer.groups is {cfg.groups}, the last of tokenizer.channels {cfg.channels}: "
                "with tokenizer.patchwise norms over one number each make all patches equal; give fewer."
            )
        self.cfg = cfg
        self.frame_size = frame_size
        self.grid = frame_size // stride
        self.num_tokens = self.grid**2
        self.code_dim = cfg.code_dim
        self.codebook_size = cfg.codebook_size
        widest = cfg.channels[-1]
        self.encoder = _encoder(cfg.channels, cfg.groups)
        self.to_code = nn.Conv2d(widest, cfg.code_dim, kernel_size=1)
        self.codebook = nn.Embedding(cfg.codebook_size, cfg.code_dim)
        self.from_code = nn.Conv2d(cfg.code_dim, widest, kernel_size=1)
        self.decoder = _decoder(cfg.channels, cfg.groups)
        nn.init.uniform_(self.codebook.weight, -1 / cfg.codebook_size, 1 / cfg.codebook_size)
        self.register_buffer("uses", torch.zeros(cfg.codebook_size, dtype=torch.int64))

    @property
    def codes(self) -> Tensor:
        """The codebook as a table without gradient, (V, E)."""
        return self.codebook.weight.detach()

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Tokens of frames: uint8 (..., S, S, 3) to int64 (..., K), without gradient."""
        self._check_frames("encode", frames, leading="...")
        rows, leading = pack([frames], "* height width channel")
        tokens = _in_parts(lambda part: self._nearest(self._encoder_output(part)), rows)
        return unpack(tokens, leading, "* token")[0]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Frames of tokens: int64 (..., K) to uint8 (..., S, S, 3), without gradient."""
        rows, leading = pack([tokens], "* token")
        frames = _in_parts(lambda part: _to_bytes(self._reconstruct(self.embed(part))), rows)
        return unpack(frames, leading, "* height width channel")[0]

    @torch.no_grad()
    def images(self, tokens: Tensor) -> Tensor:
        """What tokens decode to: int64 (..., K) to float32 (..., 3, S, S) about [-1, 1], without gradient."""
        rows, leading = pack([tokens], "* token")
        images = _in_parts(
            lambda part: rearrange(self._reconstruct(self.embed(part)), "b h w c -> b c h w"), rows
        )
        return unpack(images, leading, "* channel height width")[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes of tokens: int64 (..., K) to (..., K, E), without gradient into the codebook."""
        return functional.embedding(tokens, self.codes)

    def loss(
        self, frames: Tensor, *, background: Tensor | None, perceptual: Lpips | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss on a batch of frames.

        The decoder sees the nearest codes; its gradient passes them straight through to the encoder. The
        codes move towards the encoder's output, and the encoder's output towards its codes.

        Args:
            frames: uint8 (B, S, S, 3).
            background: uint8 (S, S, 3), what of a frame never changes (the median frame). Pixels that differ
                from it count 1 + foreground_weight times in the reconstruction. None: all count once.
            perceptual: the network of the perceptual loss; None without it, where perceptual_weight is 0.

        Returns:
            The loss, and the metrics as scalars without gradient: loss, reconstruction (mean squared error of
            all pixels, unweighted, frames in [-1, 1]), codebook, commitment, codes_used (distinct codes in
            the batch); with a background, foreground_error (mean squared error of the foreground's pixels;
            NaN if there are none); with a perceptual network, perceptual (mean distance of LPIPS).

        Raises:
            ValueError: the frames have another shape, or a perceptual or foreground weight comes without the
                network or the background that it needs.
        """
        self._check_frames("loss", frames, leading="B")
        self._check_loss_settings(background, perceptual)
        output = self._encoder_output(frames)
        with torch.no_grad():
            tokens = self._nearest(output)
            used = torch.zeros_like(self.uses)
            used.index_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten()))
            if self.training:
                self.uses += used
        nearest = self.codebook(tokens)
        codebook = functional.mse_loss(nearest, output.detach())
        commitment = functional.mse_loss(output, nearest.detach())
        passed_through = output + (nearest - output).detach()
        image_loss, image_metrics = self._image_loss(
            self._reconstruct(passed_through), frames, background, perceptual
        )
        loss = image_loss + self.cfg.codebook_weight * codebook + self.cfg.commitment_weight * commitment
        metrics = {"loss": loss, "codebook": codebook, "commitment": commitment, **image_metrics}
        metrics["codes_used"] = (used > 0).sum().float()
        return loss, {name: metric.detach() for name, metric in metrics.items()}

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
            How many codes were moved.
        """
        dead = self.uses == 0
        count = int(dead.sum())
        if count > 0:
            outputs = self._encoder_output(frames).flatten(0, 1)
            self.codebook.weight[dead] = _spread(outputs, count, self.codebook.weight[~dead], generator)
        self.uses.zero_()
        return count

    def _encoder_output(self, frames: Tensor) -> Tensor:
        """What the encoder says of each patch: uint8 (B, S, S, 3) to (B, K, E)."""
        images = _to_images(_to_floats(frames))
        if self.cfg.patchwise:
            images = rearrange(images, "b c (h p) (w q) -> (b h w) c p q", h=self.grid, w=self.grid)
        outputs = rearrange(self.to_code(self.encoder(images)).float(), "b e h w -> (b h w) e")
        return outputs.unflatten(0, (frames.shape[0], self.num_tokens))

    def _reconstruct(self, codes: Tensor) -> Tensor:
        """Frames of codes: (B, K, E) to (B, S, S, 3) about [-1, 1]."""
        squares = rearrange(codes, "b (h w) e -> b e h w", h=self.grid)
        return rearrange(self.decoder(self.from_code(squares)).float(), "b c h w -> b h w c")

    def _nearest(self, outputs: Tensor) -> Tensor:
        """Index of the code nearest to each encoder output: (B, K, E) to int64 (B, K)."""
        # In bfloat16 the distances to neighbouring codes would often be equal.
        with torch.autocast(outputs.device.type, enabled=False):
            distances = _distances(outputs.flatten(0, 1), self.codes)
        return distances.argmin(dim=-1).unflatten(0, outputs.shape[:2])

    def _image_loss(
        self, reconstructed: Tensor, frames: Tensor, background: Tensor | None, perceptual: Lpips | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is lost of the frames in their reconstruction (B, S, S, 3), weighted; the metrics of it."""
        wanted = _to_floats(frames)
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

    def _check_frames(self, caller: str, frames: Tensor, *, leading: str) -> None:
        """Check type and shape of frames with any leading dimensions ("...") or a single one ("B")."""
        wanted = (self.frame_size, self.frame_size, 3)
        fits = frames.shape[-3:] == wanted and (leading == "..." or frames.dim() == 4)
        if not fits or frames.dtype != torch.uint8:
            raise ValueError(
                f"Tokenizer.{caller}(): frames is {frames.dtype} {tuple(frames.shape)}; "
                f"wanted torch.uint8 ({leading}, {', '.join(map(str, wanted))})."
            )

    def _check_loss_settings(self, background: Tensor | None, perceptual: Lpips | None) -> None:
        if self.cfg.perceptual_weight > 0 and perceptual is None:
            raise ValueError(
                f"Tokenizer.loss(): perceptual is None but tokenizer.perceptual_weight is "
                f"{self.cfg.perceptual_weight}; give the network of the perceptual loss (LPIPS)."
            )
        if self.cfg.foreground_weight > 0 and background is None:
            raise ValueError(
                f"Tokenizer.loss(): background is None but tokenizer.foreground_weight is "
                f"{self.cfg.foreground_weight}; give the median frame."
            )


def foreground_of(frames: Tensor, background: Tensor) -> Tensor:
    """Pixels that differ from the background, bool (..., S, S).

    Args:
        frames: uint8 (..., S, S, 3).
        background: uint8 (S, S, 3).
    """
    differences = (frames.to(torch.int16) - background.to(torch.int16)).abs()
    return (differences > FOREGROUND_THRESHOLD).any(dim=-1)


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


def _to_floats(frames: Tensor) -> Tensor:
    """Bytes 0..255 to [-1, 1]."""
    return frames.float() / 127.5 - 1


def _to_images(frames: Tensor) -> Tensor:
    """(B, S, S, 3) to (B, 3, S, S)."""
    # A view: channels stay last in memory, which trains a fifth faster on a CPU than a copy would.
    return rearrange(frames, "b h w c -> b c h w")


def _to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to bytes, what lies outside clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _in_parts(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The function of all rows, some rows at a time."""
    at_once = FRAMES_AT_ONCE_ON_A_CPU if rows.device.type == "cpu" else FRAMES_AT_ONCE
    return torch.cat([function(part) for part in rows.split(at_once)])


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

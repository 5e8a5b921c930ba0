"""LPIPS: a perceptual distance between images, from the features of a network trained on photographs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Images in [-1, 1], less SHIFT and divided by SCALE, are the inputs that VGG16 was trained on."""

POOL = None
VGG16_LAYERS = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512)
"""VGG16 up to relu5_3, the last layer that is used: output channels of its convolutions, each with a ReLU."""

STAGE_ENDS = (4, 9, 16, 23, 30)
"""Indices in VGG16's `features` at which relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 are complete."""

STAGE_CHANNELS = (64, 128, 256, 512, 512)

SMALLEST_SIDE = 16
"""A smaller image has no pixels left after the four poolings."""

EPSILON = 1e-10


class Lpips(nn.Module):
    """The learned perceptual distance, with the features of VGG16; fixed, never trained.

    At five depths the features of both images, a vector for each place, are scaled to length 1; the squares
    of their differences are summed over the channels with learned weights and averaged over the places. The
    distance is the sum over the five depths. The dropout with which LPIPS was trained is left out.

    None of its parameters requires a gradient, and no other module contains it, so checkpoints, optimisers
    and counts of an agent's parameters do not include it.

    Args:
        weights: the tensors of `expected_shapes`, of any floating-point dtype, cast to float32. Tensors of
            other names (VGG16's classifier, for example) are ignored.

    Raises:
        ValueError: a tensor is missing, has another shape, is not of floating point or not finite.

    Source: arXiv 1801.03924, version 0.1 of its weights; VGG16 is torchvision's, trained on ImageNet.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        shapes = expected_shapes()
        _check_weights(weights, shapes)
        for name, layer in _layers().items():
            self.add_module(name, layer)
        self.load_state_dict({name: weights[name].float() for name in shapes}, assign=True)
        self.requires_grad_(False)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distance of each image from its target, at least 0; the gradient reaches `images` alone.

        Args:
            images: (B, 3, H, W) in [-1, 1], RGB, at least 16 pixels high and wide.
            targets: the images to compare with, of the same shape.

        Returns:
            (B,) float32.

        Raises:
            ValueError: the shapes differ or do not fit.
        """
        _check_images(images, targets)
        seen = (images - self.shift) / self.scale
        with torch.no_grad():
            wanted = (targets - self.shift) / self.scale
        total = images.new_zeros(len(images), dtype=torch.float32)
        for index, (start, end) in enumerate(zip((0, *STAGE_ENDS), STAGE_ENDS, strict=False)):
            stage, weighted_sum = self.features[start:end], self.get_submodule(f"lin{index}")
            seen = stage(seen)
            with torch.no_grad():
                wanted = stage(wanted)
                unit_wanted = _unit_length(wanted)
            total = total + weighted_sum((_unit_length(seen) - unit_wanted).square()).mean(dim=(1, 2))
        return total


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights: torchvision's ``features.N.*`` and LPIPS's ``linI.model.1.weight``."""
    return {
        f"{name}.{inner}": tuple(tensor.shape)
        for name, layer in _layers().items()
        for inner, tensor in layer.state_dict().items()
    }


class _WeightedSum(nn.Module):
    """A weighted sum over the channels. Its weight is named ``model.1``: LPIPS has a dropout before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, kernel_size=1, bias=False))

    def forward(self, squares: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H, W)."""
        # Not by the convolution itself, which autocast would compute in bfloat16.
        return (squares * self.model[1].weight).sum(dim=1)


def _layers() -> dict[str, nn.Module]:
    """The layers by name, without storage: the weights come later, and no random numbers are drawn."""
    with torch.device("meta"):
        features, before = nn.Sequential(), 3
        for channels in VGG16_LAYERS:
            if channels is None:
                features.append(nn.MaxPool2d(2))
            else:
                features.append(nn.Conv2d(before, channels, kernel_size=3, padding=1))
                features.append(nn.ReLU(inplace=True))
                before = channels
        sums = {f"lin{index}": _WeightedSum(channels) for index, channels in enumerate(STAGE_CHANNELS)}
    return {"features": features, **sums}


def _unit_length(features: Tensor) -> Tensor:
    """Each place's vector over the channels of (B, C, H, W), divided by its length; in float32."""
    features = features.float()
    # Not the root of a sum of squares: where no channel responds its gradient would be NaN.
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def _check_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in weights]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"LPIPS lacks the weights {', '.join(missing[:3])}{more}; it wants torchvision's VGG16"
            " (features.0.weight to features.28.bias) and LPIPS's linear layers (lin0.model.1.weight to"
            " lin4.model.1.weight)"
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"LPIPS's weight {name} has the shape {tuple(tensor.shape)}, wanted {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"LPIPS's weight {name} is {tensor.dtype}, wanted floating point numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"LPIPS's weight {name} holds numbers that are not finite")


def _check_images(images: Tensor, targets: Tensor) -> None:
    if images.shape != targets.shape:
        raise ValueError(
            f"Lpips(): images is {tuple(images.shape)} but targets {tuple(targets.shape)}; wanted one shape."
        )
    if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"Lpips(): images is {tuple(images.shape)}; wanted (B, 3, H, W) with H and W at least"
            f" {SMALLEST_SIDE}."
        )

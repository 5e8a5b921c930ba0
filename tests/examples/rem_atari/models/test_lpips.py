"""LPIPS against the formula written out in float64, and what a distance has to be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from rem_atari.models.lpips import Lpips, expected_shapes

PUBLISHED = Path(__file__).resolve().parents[5] / "shared" / "data" / "lpips_vgg16_fp16.safetensors"
"""The published weights, where the workplace has them beside the checkout."""

CONVOLUTIONS = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
"""torchvision's indices of VGG16's convolutions on the way to each of the five depths, a pooling between."""


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights of the right shapes at a scale that neither dies out nor explodes on the way down."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes().items():
        drawn = torch.randn(shape, generator=generator)
        if name.startswith("lin"):
            weights[name] = drawn.abs()
        else:
            weights[name] = drawn * (2 / math.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.1 * drawn
    return weights


@pytest.fixture(scope="module", params=["random", "published"])
def weights(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    if request.param == "random":
        return random_weights()
    if not PUBLISHED.is_file():
        pytest.skip(f"the published weights are not beside the checkout ({PUBLISHED.name})")
    return safetensors.torch.load_file(PUBLISHED)


@pytest.fixture(scope="module")
def lpips(weights: dict[str, Tensor]) -> Lpips:
    return Lpips(weights)


def some_images(*shape: int, seed: int = 0) -> Tensor:
    """Coloured squares under a little noise, so that no two places tie in a pooling; (*shape, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    squares = (
        torch.rand(*shape, 3, 4, 4, generator=generator).repeat_interleave(8, -1).repeat_interleave(8, -2)
    )
    noise = torch.randn(*shape, 3, 32, 32, generator=generator)
    return 1.6 * squares - 0.8 + 0.05 * noise


# --- the formula ------------------------------------------------------------------------------------------


def plain_lpips(weights: Mapping[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
    """The distance of two images (3, H, W) in float64, each step of the formula by itself."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    pair = [(picture.double() - shift) / scale for picture in (image, target)]
    distance = torch.zeros((), dtype=torch.float64)
    for depth, indices in enumerate(CONVOLUTIONS):
        for index in indices:
            kernel = weights[f"features.{index}.weight"].double()
            bias = weights[f"features.{index}.bias"].double()[:, None, None]
            pair = [(convolve(x, kernel) + bias).clamp(min=0) for x in pair]
        unit = [x / ((x**2).sum(dim=0).sqrt() + 1e-10) for x in pair]
        weight = weights[f"lin{depth}.model.1.weight"][0].double()
        distance = distance + (weight * (unit[0] - unit[1]) ** 2).sum(dim=0).mean()
        channels, height, width = pair[0].shape
        pair = [x.reshape(channels, height // 2, 2, width // 2, 2).amax(dim=(2, 4)) for x in pair]
    return distance


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """A 3 x 3 convolution of (I, H, W) with (O, I, 3, 3), zeros around."""
    channels, height, width = x.shape
    padded = torch.zeros(channels, height + 2, width + 2, dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x
    return sum(
        torch.tensordot(kernel[:, :, row, column], padded[:, row : row + height, column : column + width], 1)
        for row in range(3)
        for column in range(3)
    )


def test_it_is_the_formula_and_so_is_its_gradient(lpips: Lpips, weights: dict[str, Tensor]) -> None:
    images, targets = some_images(2).requires_grad_(), some_images(2, seed=1)
    distances = lpips(images, targets)
    distances.sum().backward()
    gradient, images.grad = images.grad, None
    wanted = torch.stack([plain_lpips(weights, *pair) for pair in zip(images, targets, strict=True)])
    wanted.sum().backward()
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances.double(), wanted, rtol=2e-5, atol=0)
    # Near a tie of ReLU or pooling rounding takes the other side: few places, but all of their gradient.
    assert (gradient - images.grad).norm() < 1e-2 * images.grad.norm()


# --- what a distance has to be ----------------------------------------------------------------------------


def test_equal_images_have_no_distance_and_order_does_not_matter(lpips: Lpips) -> None:
    images, targets = some_images(3), some_images(3, seed=1)
    assert (lpips(images, images) == 0).all()
    assert (lpips(images, targets) > 0).all()
    torch.testing.assert_close(lpips(images, targets), lpips(targets, images))


def test_it_grows_with_noise(lpips: Lpips) -> None:
    images = some_images(1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    distances = [float(lpips(images + strength * noise, images)) for strength in (0.01, 0.03, 0.1, 0.3)]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_images_in_a_batch_do_not_touch(lpips: Lpips) -> None:
    images, targets = some_images(3), some_images(3, seed=1)
    torch.testing.assert_close(lpips(images, targets)[1:2], lpips(images[1:2], targets[1:2]))


def test_the_gradient_reaches_the_images_and_nothing_else(lpips: Lpips) -> None:
    images, targets = some_images(1).requires_grad_(), some_images(1, seed=1).requires_grad_()
    lpips(images, targets).sum().backward()
    assert targets.grad is None
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in lpips.parameters())
    assert images.grad.abs().sum() > 0


def test_an_image_that_moves_nothing_has_a_finite_gradient() -> None:
    """Where no channel responds, the length is 0, and a root's slope there infinite."""
    dead = Lpips({name: torch.zeros(shape) for name, shape in expected_shapes().items()})
    images = some_images(1).requires_grad_()
    distance = dead(images, some_images(1, seed=1))
    distance.sum().backward()
    assert distance == 0
    assert images.grad.isfinite().all()


def test_training_mode_changes_nothing(lpips: Lpips) -> None:
    images, targets = some_images(1), some_images(1, seed=1)
    assert torch.equal(lpips.train()(images, targets), lpips.eval()(images, targets))


def test_under_autocast_the_distance_itself_is_float32(lpips: Lpips) -> None:
    images = some_images(1)
    targets = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(images, targets)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, lpips(images, targets), rtol=0.05, atol=0)


# --- weights ----------------------------------------------------------------------------------------------


def test_names_are_torchvisions_and_those_of_lpips() -> None:
    convolutions = [index for indices in CONVOLUTIONS for index in indices]
    names = [f"features.{index}.{kind}" for index in convolutions for kind in ("weight", "bias")]
    assert list(expected_shapes()) == names + [f"lin{depth}.model.1.weight" for depth in range(5)]
    assert sum(math.prod(shape) for shape in expected_shapes().values()) == 14_714_688 + 1_472


def test_other_tensors_are_left_alone_and_no_random_numbers_are_drawn() -> None:
    before = torch.get_rng_state()
    lpips = Lpips({**random_weights(), "classifier.0.weight": torch.zeros(2, 2)})
    assert list(lpips.state_dict()) == list(expected_shapes())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("features.2.bias", None, "lacks the weights features.2.bias; it wants"),
        ("lin4.model.1.weight", torch.zeros(1, 512), r"lin4.model.1.weight has the shape \(1, 512\), wanted"),
        ("features.5.bias", torch.zeros(128, dtype=torch.int32), "features.5.bias is torch.int32"),
        (
            "features.0.bias",
            torch.full((64,), torch.nan),
            "features.0.bias holds numbers that are not finite",
        ),
    ],
)
def test_wrong_weights_are_named(name: str, tensor: Tensor | None, message: str) -> None:
    weights = {key: torch.zeros(shape) for key, shape in expected_shapes().items()}
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    with pytest.raises(ValueError, match=message):
        Lpips(weights)


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ((1, 3, 32, 32), (2, 3, 32, 32), r"images is \(1, 3, 32, 32\) but targets \(2, 3, 32, 32\)"),
        ((1, 32, 32, 3), (1, 32, 32, 3), r"wanted \(B, 3, H, W\)"),
        ((3, 32, 32), (3, 32, 32), r"wanted \(B, 3, H, W\)"),
        ((1, 3, 32, 15), (1, 3, 32, 15), "at least 16"),
    ],
)
def test_wrong_images_are_named(
    lpips: Lpips, images: tuple[int, ...], targets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lpips(torch.zeros(images), torch.zeros(targets))

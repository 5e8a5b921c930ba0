"""The tokenizer: shapes, quantisation, gradients, losses and the care of its codebook."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rem_atari.config import TokenizerConfig
from rem_atari.models import base_tokenizer
from rem_atari.models.parameter_groups import parameter_groups
from rem_atari.models.tokenizer import Tokenizer

SMALL = TokenizerConfig(
    channels=(4, 8), groups=2, code_dim=6, codebook_size=16, perceptual_weight=0.0, reconstruction_weight=1.0
)


def small_tokenizer(frame_size: int = 8, **changes) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(**{**vars(SMALL), **changes}), frame_size)


def some_frames(*shape: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, size, size, 3), generator=generator, dtype=torch.uint8)


def test_the_published_size_has_the_published_number_of_parameters():
    tokenizer = Tokenizer(TokenizerConfig(), 64)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 3_189_667
    assert (tokenizer.grid, tokenizer.num_tokens, tokenizer.code_dim) == (8, 64, 256)


def test_the_frame_is_halved_and_doubled_as_published():
    tokenizer = small_tokenizer(frame_size=16, channels=(4, 4, 8, 8))
    paddings = [layer.padding for layer in tokenizer.encoder if isinstance(layer, nn.ZeroPad2d)]
    strides = [layer.stride for layer in tokenizer.encoder if isinstance(layer, nn.Conv2d)]
    doublings = [layer for layer in tokenizer.decoder if isinstance(layer, nn.Upsample)]
    assert paddings == [(0, 1, 0, 1)] * 3
    assert strides == [(1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (1, 1)]
    assert [(layer.scale_factor, layer.mode) for layer in doublings] == [(2.0, "nearest-exact")] * 3
    widths = [layer.out_channels for layer in tokenizer.decoder if isinstance(layer, nn.Conv2d)]
    assert widths == [8, 8, 8, 4, 4, 4, 4, 3]


def test_bytes_become_numbers_between_minus_one_and_one_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = base_tokenizer.to_floats(levels)
    assert (scaled[0], scaled[-1]) == (-1.0, 1.0)
    assert torch.equal(base_tokenizer.to_bytes(scaled), levels)


@pytest.mark.parametrize(("frame_size", "grid"), [(64, 8), (24, 3)])
def test_shapes(frame_size, grid):
    tokenizer = small_tokenizer(frame_size, channels=(4, 4, 8, 8))
    frames = some_frames(2, 3, size=frame_size)
    tokens = tokenizer.encode(frames)
    assert tokens.shape == (2, 3, grid**2)
    assert tokens.dtype == torch.int64
    codes = tokenizer.embed(tokens)
    assert codes.shape == (2, 3, grid**2, 6)
    assert not codes.requires_grad
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == frames.shape
    assert decoded.dtype == torch.uint8


@pytest.mark.parametrize("patchwise", [False, True])
def test_patchwise_a_code_depends_on_the_pixels_of_its_patch_alone(patchwise):
    tokenizer = small_tokenizer(frame_size=16, channels=(4, 4, 8), patchwise=patchwise)
    before = some_frames(2, size=16)
    after = before.clone()
    row, column = 1, 2  # of a grid of 4 x 4 patches of 4 x 4 pixels
    after[:, 4:8, 8:12] = 255 - after[:, 4:8, 8:12]
    changed = tokenizer._encoder_output(after) - tokenizer._encoder_output(before)
    where = changed.abs().amax(dim=-1) > 1e-5
    alone = torch.zeros(16, dtype=torch.bool)
    alone[row * 4 + column] = True
    assert where[:, alone].all()
    assert bool(where[:, ~alone].any()) is not patchwise


def test_patchwise_with_a_group_for_each_channel_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.groups is 8.*tokenizer\.patchwise"):
        small_tokenizer(channels=(8, 8), groups=8, patchwise=True)


@pytest.mark.parametrize("patchwise", [False, True])
def test_no_frames_are_no_tokens(patchwise):
    tokenizer = small_tokenizer(patchwise=patchwise)
    assert tokenizer.encode(some_frames(0)).shape == (0, tokenizer.num_tokens)


def test_a_single_frame_needs_no_batch():
    tokenizer = small_tokenizer()
    frames = some_frames(2)
    tokens = tokenizer.encode(frames)
    assert torch.equal(tokenizer.encode(frames[1]), tokens[1])
    assert torch.equal(tokenizer.decode(tokens[1]), tokenizer.decode(tokens)[1])
    with pytest.raises(ValueError, match=r"wanted torch\.uint8 \(B, 8, 8, 3\)"):
        tokenizer.loss(frames[0], background=None)


def test_foreground_is_what_differs_from_the_background():
    frames = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    frames[0, 0, 0, 2] = 11  # one channel is enough, and 10 levels are not
    frames[0, 1, 1] = 10
    background = torch.zeros(2, 2, 3, dtype=torch.uint8)
    assert base_tokenizer.foreground_of(frames, background)[0].tolist() == [[True, False], [False, False]]
    assert base_tokenizer.foreground_of(background, frames[0])[0, 0]  # darker counts as much as brighter


def test_a_token_is_the_nearest_code():
    tokenizer = small_tokenizer()
    nn.init.normal_(tokenizer.codebook.weight)
    frames = some_frames(5)
    outputs = tokenizer._encoder_output(frames)
    distances = (outputs[:, :, None] - tokenizer.codes).square().sum(dim=-1)
    assert torch.equal(tokenizer.encode(frames), distances.argmin(dim=-1))
    assert len(tokenizer.encode(frames).unique()) > 1


def test_tokens_are_placed_row_by_row():
    """A change in a frame's top right corner reaches the decoder's and the encoder's first row only."""
    tokenizer = small_tokenizer(32)
    tokens = torch.zeros(1, tokenizer.num_tokens, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, tokenizer.grid - 1] = 1
    nn.init.normal_(tokenizer.codebook.weight)
    with torch.no_grad():  # without group norm, which mixes all places, a layer sees its neighbourhood only
        for module in tokenizer.decoder:
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x: x
        difference = tokenizer._reconstruct(tokenizer.embed(tokens)) - tokenizer._reconstruct(
            tokenizer.embed(changed)
        )
    touched = difference.abs().sum(dim=(0, 3)) > 0
    assert touched[0, -1]
    assert not touched[16:].any()
    assert not touched[:, :16].any()


def test_frames_beyond_one_part_are_encoded_and_decoded_alike(monkeypatch):
    tokenizer = small_tokenizer()
    frames = some_frames(5)
    tokens, decoded = tokenizer.encode(frames), tokenizer.decode(tokenizer.encode(frames))
    monkeypatch.setattr(base_tokenizer, "FRAMES_AT_ONCE", 2)
    assert torch.equal(tokenizer.encode(frames), tokens)
    assert torch.equal(tokenizer.decode(tokens), decoded)


def test_decoding_clamps_to_bytes():
    tokenizer = small_tokenizer()
    for value, wanted in ((5.0, 255), (-5.0, 0), (0.0, 128)):
        nn.init.zeros_(tokenizer.decoder[-1].weight)
        nn.init.constant_(tokenizer.decoder[-1].bias, value)
        assert (tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64)) == wanted).all()


def test_the_gradient_passes_straight_through_the_quantiser():
    """With the pixel loss alone, the encoder's output gets exactly the gradient of the codes in its place."""
    tokenizer = small_tokenizer(codebook_weight=0.0, commitment_weight=0.0)
    frames = some_frames(2)
    captured = {}

    def keep(module, inputs, output):
        output.retain_grad()
        captured["output"] = output

    handle = tokenizer.to_code.register_forward_hook(keep)
    loss, _ = tokenizer.loss(frames, background=None)
    loss.backward()
    handle.remove()
    codes = tokenizer.embed(tokenizer.encode(frames)).requires_grad_()
    pixels = base_tokenizer.to_floats(frames)
    (tokenizer._reconstruct(codes) - pixels).square().mean().backward()
    passed = captured["output"].grad.flatten(2).transpose(1, 2)
    torch.testing.assert_close(passed, codes.grad, rtol=1e-4, atol=1e-8)
    assert codes.grad.abs().sum() > 0
    assert tokenizer.codebook.weight.grad.abs().sum() == 0


def test_codes_and_encoder_move_towards_each_other():
    only_codes = small_tokenizer(reconstruction_weight=0.0, commitment_weight=0.0)
    only_codes.loss(some_frames(2), background=None)[0].backward()
    assert only_codes.codebook.weight.grad.abs().sum() > 0
    assert only_codes.to_code.weight.grad is None or only_codes.to_code.weight.grad.abs().sum() == 0
    only_encoder = small_tokenizer(reconstruction_weight=0.0, codebook_weight=0.0)
    only_encoder.loss(some_frames(2), background=None)[0].backward()
    assert only_encoder.codebook.weight.grad.abs().sum() == 0
    assert only_encoder.to_code.weight.grad.abs().sum() > 0


def test_the_foreground_counts_more():
    frames = some_frames(2)
    background = frames[0].clone()
    frames[0, 0, 0, 1] ^= 128  # one pixel of the first frame; all of the second
    plain, weighted = small_tokenizer(), small_tokenizer(foreground_weight=3.0)
    with torch.no_grad():
        errors = (
            plain._reconstruct(plain.embed(plain.encode(frames))) - base_tokenizer.to_floats(frames)
        ).square()
    differs = (frames.int() - background.int()).abs().amax(dim=-1) > base_tokenizer.FOREGROUND_THRESHOLD
    weights = 1 + 3.0 * differs[..., None]
    loss, metrics = plain.loss(frames, background=background)
    weighted_loss, weighted_metrics = weighted.loss(frames, background=background)
    torch.testing.assert_close(metrics["reconstruction"], errors.mean())
    torch.testing.assert_close(metrics["foreground_error"], errors[differs].mean())
    torch.testing.assert_close(weighted_metrics["reconstruction"], errors.mean())
    torch.testing.assert_close(weighted_loss - loss, (errors * weights).mean() - errors.mean())
    assert differs[0].sum() == 1


class StandIn(nn.Module):
    """In LPIPS's place: the mean absolute difference of two images."""

    def forward(self, images, targets):
        assert images.shape == targets.shape == (2, 3, 8, 8)
        return (images - targets).abs().mean(dim=(1, 2, 3))


def test_the_perceptual_loss_compares_reconstructions_with_frames():
    frames = some_frames(2)
    without, with_it = small_tokenizer(), small_tokenizer(perceptual_weight=3.0)
    with torch.no_grad():
        decoded = without._reconstruct(without.embed(without.encode(frames)))
    distance = (decoded - base_tokenizer.to_floats(frames)).abs().mean()
    loss, metrics = without.loss(frames, background=None)
    perceptual_loss, perceptual_metrics = with_it.loss(frames, background=None, perceptual=StandIn())
    torch.testing.assert_close(perceptual_metrics["perceptual"], distance)
    torch.testing.assert_close(perceptual_loss - loss, 3 * distance)
    torch.testing.assert_close(perceptual_metrics["loss"], perceptual_loss.detach())
    assert perceptual_metrics["reconstruction"] == metrics["reconstruction"]
    assert "perceptual" not in metrics
    (perceptual_loss - loss).backward()
    assert with_it.decoder[0].weight.grad.abs().sum() > 0
    assert with_it.encoder[0].weight.grad.abs().sum() > 0


def test_no_foreground_gives_no_foreground_error():
    frames = some_frames(1).expand(2, -1, -1, -1)
    tokenizer = small_tokenizer(foreground_weight=3.0)
    loss, metrics = tokenizer.loss(frames, background=frames[0])
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in tokenizer.parameters())
    assert metrics["foreground_error"].isnan(), "0 would be a perfect score"
    assert "foreground_error" not in small_tokenizer().loss(frames, background=None)[1]


def test_metrics_carry_no_gradient_and_add_up():
    tokenizer = small_tokenizer(reconstruction_weight=2.0, commitment_weight=0.5)
    loss, metrics = tokenizer.loss(some_frames(3), background=None)
    assert not any(metric.requires_grad for metric in metrics.values())
    total = 2 * metrics["reconstruction"] + metrics["codebook"] + 0.5 * metrics["commitment"]
    torch.testing.assert_close(loss.detach(), total)
    assert metrics["codes_used"] == len(tokenizer.encode(some_frames(3)).unique())


def test_the_codebook_starts_from_encoder_outputs():
    tokenizer = small_tokenizer()
    frames = some_frames(8)
    tokenizer.initialize_codebook(frames, torch.Generator().manual_seed(0))
    outputs = tokenizer._encoder_output(frames).flatten(0, 1)
    assert (torch.cdist(tokenizer.codes, outputs).amin(dim=-1) < 1e-3).all()
    assert len(tokenizer.codes.unique(dim=0)) == 16
    assert len(tokenizer.encode(frames).unique()) == 16


def test_a_codebook_can_start_from_a_single_kind_of_patch():
    tokenizer = small_tokenizer()
    tokenizer._encoder_output = lambda frames: torch.ones(1, 4, 6)
    tokenizer.initialize_codebook(some_frames(1), torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.codes, torch.ones(16, 6))


def test_dead_codes_restart_and_living_ones_stay():
    tokenizer = small_tokenizer()
    with torch.no_grad():
        tokenizer.codebook.weight[0] = 0.0
        tokenizer.codebook.weight[1:] = 1e3  # far from everything: dead
    before = tokenizer.codes.clone()
    tokenizer.eval()
    tokenizer.loss(some_frames(4), background=None)
    assert tokenizer.uses.sum() == 0, "only training counts as use"
    tokenizer.train()
    tokenizer.loss(some_frames(4), background=None)
    assert tokenizer.uses[0] == 4 * 16
    assert tokenizer.restart_dead_codes(some_frames(4, seed=1), torch.Generator().manual_seed(0)) == 15
    assert torch.equal(tokenizer.codes[0], before[0])
    assert tokenizer.codes.abs().max() < 100
    assert tokenizer.uses.sum() == 0
    assert len(tokenizer.encode(some_frames(4, seed=1)).unique()) > 8


def test_restarting_leaves_a_codebook_in_full_use_alone():
    tokenizer = small_tokenizer()
    before = tokenizer.codes.clone()
    tokenizer.uses += 1
    assert tokenizer.restart_dead_codes(some_frames(1), torch.Generator()) == 0
    assert torch.equal(tokenizer.codes, before)


def test_training_reconstructs():
    tokenizer = small_tokenizer(reconstruction_weight=5.0)
    frames = some_frames(1).expand(4, -1, -1, -1)
    tokenizer.initialize_codebook(frames, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(parameter_groups(tokenizer, 0.01), lr=1e-2)
    first = tokenizer.loss(frames, background=None)[1]["reconstruction"]
    for _ in range(60):
        loss, metrics = tokenizer.loss(frames, background=None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["reconstruction"] < 0.5 * first


def test_wrong_settings_and_frames_are_named():
    with pytest.raises(ValueError, match="frame_size is 9"):
        small_tokenizer(9)
    with pytest.raises(ValueError, match=r"tokenizer\.groups is 3"):
        small_tokenizer(groups=3)
    with pytest.raises(ValueError, match=r"torch\.float32 \(2, 8, 8, 3\)"):
        small_tokenizer().encode(some_frames(2).float())
    with pytest.raises(ValueError, match=r"\(2, 6, 6, 3\)"):
        small_tokenizer().loss(some_frames(2, size=6), background=None)
    with pytest.raises(ValueError, match=r"perceptual is None but tokenizer\.perceptual_weight is 1\.0"):
        small_tokenizer(perceptual_weight=1.0).loss(some_frames(1), background=None)
    with pytest.raises(ValueError, match="median frame"):
        small_tokenizer(foreground_weight=1.0).loss(some_frames(1), background=None)


def test_weight_decay_spares_biases_norms_and_embeddings():
    tokenizer = small_tokenizer()
    decayed, undecayed = parameter_groups(tokenizer, 0.05)
    assert decayed["weight_decay"] == 0.05
    assert undecayed["weight_decay"] == 0.0
    convolutions = [module.weight for module in tokenizer.modules() if isinstance(module, nn.Conv2d)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in convolutions}
    assert any(p is tokenizer.codebook.weight for p in undecayed["params"])
    grouped = len(decayed["params"]) + len(undecayed["params"])
    assert grouped == len(list(tokenizer.parameters()))

"""Finite scalar quantisation: every combination of levels is a code, and gradients pass the rounding."""

from __future__ import annotations

import pytest
import torch

from rem_atari.config import TokenizerConfig
from rem_atari.models.fsq import FsqTokenizer

CFG = TokenizerConfig(kind="fsq", channels=(4, 8), groups=2, fsq_levels=(5, 4, 3), perceptual_weight=0.0)


def fsq_tokenizer(**changes) -> FsqTokenizer:
    torch.manual_seed(0)
    return FsqTokenizer(TokenizerConfig(**{**vars(CFG), **changes}), 8)


def test_the_codes_are_all_combinations_of_levels():
    tokenizer = fsq_tokenizer()
    assert tokenizer.codes.shape == (60, 3)
    assert len(tokenizer.codes.unique(dim=0)) == 60
    assert [len(tokenizer.codes[:, at].unique()) for at in range(3)] == [5, 4, 3]
    assert tokenizer.codes.abs().max() == 1


def test_outputs_of_every_size_reach_every_code_and_are_rounded_to_it():
    tokenizer = fsq_tokenizer()
    outputs = torch.randn(128, 16, 3, generator=torch.Generator().manual_seed(1)) * 1.5
    tokens = tokenizer._nearest(outputs)
    assert tokens.unique().tolist() == list(range(60))
    torch.testing.assert_close(tokenizer._quantize(outputs).codes, tokenizer.embed(tokens))


def test_outputs_of_zero_lie_in_the_middle_of_a_level():
    """Where a number has an odd count of levels it is the middle one, and small changes leave it there."""
    tokenizer = fsq_tokenizer(fsq_levels=(5, 3))
    near = torch.tensor([[[0.1, -0.1]], [[-0.1, 0.1]]])
    assert (tokenizer.embed(tokenizer._nearest(near)) == 0).all()


def test_the_gradient_passes_the_rounding_as_if_it_were_not_there():
    tokenizer = fsq_tokenizer()
    outputs = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weights = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(3))
    (through,) = torch.autograd.grad((tokenizer._quantize(outputs).codes * weights).sum(), outputs)
    (without,) = torch.autograd.grad(
        (tokenizer._scaled(tokenizer._bounded(outputs)) * weights).sum(), outputs
    )
    torch.testing.assert_close(through, without)


def test_it_learns_to_redraw_frames():
    tokenizer = fsq_tokenizer(foreground_weight=0.0)
    frames = torch.randint(2, (8, 1, 1, 1), generator=torch.Generator().manual_seed(4)).mul(255)
    frames = frames.expand(8, 8, 8, 3).to(torch.uint8)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=1e-2)
    errors = []
    for _ in range(30):
        loss, metrics = tokenizer.loss(frames, background=None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(metrics["reconstruction"]))
    assert errors[-1] < 0.1 * errors[0]
    assert set(metrics) == {"loss", "reconstruction", "codes_used"}


def test_no_levels_are_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.fsq_levels is empty"):
        fsq_tokenizer(fsq_levels=())

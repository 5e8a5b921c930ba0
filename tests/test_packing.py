"""Ragged batches: packing takes padding out and puts it back, and a decoder reads packed rows as if alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from retpop import Packed, RetNetConfig, RetNetDecoder, pack_padded, pad_packed

LENGTHS = [5, 0, 9, 2]


def padded(width: int = 3, length: int = 9) -> Tensor:
    return torch.randn(len(LENGTHS), length, width, generator=torch.Generator().manual_seed(0))


def right_padding(length: int = 9) -> Tensor:
    return torch.arange(length) < torch.tensor(LENGTHS)[:, None]


def test_lengths_cut_every_row_at_its_end() -> None:
    x = padded()
    packed = pack_padded(x, LENGTHS)
    assert packed.cu_seqlens.tolist() == [0, 5, 5, 14, 16]
    assert torch.equal(packed.data[0], torch.cat([x[row, :length] for row, length in enumerate(LENGTHS)]))


@pytest.mark.parametrize("make", [list, np.array, torch.IntTensor, torch.LongTensor])
def test_lengths_are_a_mask_of_right_padding(make: Callable[[list[int]], Any]) -> None:
    lengths = make(LENGTHS)
    packed, expected = pack_padded(padded(), lengths), pack_padded(padded(), mask=right_padding())
    for one, other in zip(pytree.tree_leaves(packed), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(one, other)


MASKS = [
    pytest.param(right_padding(), id="right"),
    pytest.param(right_padding().flip(1), id="left"),
    pytest.param(torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.5, id="anywhere"),
    pytest.param(torch.zeros(4, 9, dtype=torch.bool), id="no tokens"),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(4, 9), (4, 9, 3), (4, 9, 2, 3)])
def test_there_and_back(mask: Tensor, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    back = pad_packed(pack_padded(x, mask=mask), padding_value=-7.0)
    assert torch.equal(back[mask], x[mask])
    assert (back[~mask] == -7).all()
    assert back.shape == x.shape


def test_back_as_torch_pads() -> None:
    packed = pack_padded(padded(), LENGTHS)
    rows = packed.data[0].split(LENGTHS)
    assert torch.equal(pad_packed(packed), pad_sequence(list(rows), batch_first=True))


def test_gradients_reach_the_tokens_and_only_them() -> None:
    x = padded().requires_grad_()
    packed = pack_padded(x, LENGTHS)
    (pad_packed(packed.replace(packed.data * 2)) ** 2).sum().backward()
    expected = torch.where(right_padding()[..., None], 8 * x.detach(), 0)
    torch.testing.assert_close(x.grad, expected)


def decoder() -> RetNetDecoder:
    torch.manual_seed(0)
    return RetNetDecoder(RetNetConfig(embed_dim=8, num_heads=2, num_layers=2, ffn_dim=8), dtype=torch.float64)


@pytest.mark.parametrize("mask", MASKS[:3])
def test_a_decoder_reads_each_row_as_if_alone(mask: Tensor) -> None:
    """NaN in the padding reaches nothing, and there is a state a row."""
    model, x = decoder(), padded(8).double()
    x = torch.where(mask[..., None], x, torch.nan)
    packed = pack_padded(x, mask=mask)
    out, state = model(packed.data, cu_seqlens=packed.cu_seqlens)
    out = pad_packed(packed.replace(out))
    for row in range(len(x)):
        alone, last = model(x[row, mask[row]][None])
        torch.testing.assert_close(out[row, mask[row]], alone[0])
        torch.testing.assert_close(state.kv[:, row], last.kv[:, 0])
        assert state.position[row] == mask[row].sum()


def double(x: Tensor, mask: Tensor) -> Tensor:
    packed = pack_padded(x, mask=mask)
    return pad_packed(packed.replace(packed.data * 2))


def test_under_compile() -> None:
    """Packing breaks the graph unless data may decide shapes; what comes after it never does."""
    x, mask = padded(), right_padding()
    expected = double(x, mask)
    assert torch.equal(torch.compile(double, backend="eager")(x, mask), expected)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        whole = torch.compile(double, backend="eager", fullgraph=True)
        assert torch.equal(whole(x, mask), expected)

    @torch.compile(backend="eager", fullgraph=True)
    def rest(packed: Packed) -> Tensor:
        return pad_packed(packed.replace(packed.data * 2))

    assert torch.equal(rest(pack_padded(x, mask=mask)), expected)


WRONG = [
    ({}, ValueError, "neither of lengths and mask"),
    ({"lengths": LENGTHS, "mask": right_padding()}, ValueError, "both of lengths and mask"),
    ({"lengths": [1, 2]}, ValueError, r"lengths has shape \(2,\); it must be \(4,\)"),
    ({"lengths": [1, 2, 3, 10]}, ValueError, r"lengths is \[1, 2, 3, 10\]; each must be from 0 to 9"),
    ({"lengths": [1.0, 2, 3, 4]}, TypeError, r"a value in lengths is 1\.0 \(float\); it must be an int"),
    ({"lengths": 4}, TypeError, "lengths is 4; it must hold ints"),
    ({"lengths": torch.ones(4)}, TypeError, "lengths is torch.float32"),
    ({"mask": right_padding().int()}, TypeError, "mask is torch.int32"),
    ({"mask": right_padding(8)}, ValueError, r"mask has shape \(4, 8\); it must be \(4, 9\)"),
    ({"mask": [[True]]}, TypeError, "mask is list"),
]


@pytest.mark.parametrize(("given", "error", "words"), WRONG)
def test_wrong_arguments_are_named(given: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pack_padded(padded(), **given)  # type: ignore[arg-type]


def test_wrong_data_is_named() -> None:
    packed = pack_padded(padded(), LENGTHS)
    with pytest.raises(ValueError, match=r"data has shape \(1, 15, 3\); it must begin with \(1, 16\)"):
        packed.replace(packed.data[:, 1:])
    with pytest.raises(TypeError, match="packed is Tensor"):
        pad_packed(packed.data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="padding_value is 'x'; it must be a number"):
        pad_packed(packed, "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has shape \(4,\)"):
        pack_padded(torch.zeros(4), LENGTHS)

"""What launchers are made of: a launch names its kernel's arguments, and strides are told once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from retpop.kernels.launch import Launch, token_strides

KERNEL = SimpleNamespace(__name__="some_kernel", arg_names=["p_x", "SCALE_V"])


def test_a_launch_names_every_argument_of_its_kernel_and_no_other() -> None:
    options = {"kernel": KERNEL, "grid": (1,), "num_warps": 4, "num_stages": 2}
    Launch(arguments={"p_x": None, "SCALE_V": True}, **options)
    for arguments, named in (
        ({"p_x": None, "SCALE_V": True, "SCALE_K": True}, "SCALE_K"),
        ({"p_x": None}, "SCALE_V"),
        ({"p_x": None, "SCAEL_V": True}, "SCAEL_V, SCALE_V"),
    ):
        with pytest.raises(TypeError, match=f"some_kernel: missing or unknown arguments: {named}$"):
            Launch(arguments=arguments, **options)


def test_equal_token_strides_are_told_once() -> None:
    row = torch.empty(2, 5, 3, 4, 24)
    tokens = {"q": row[:, :, 0], "k": row[:, :, 1], "g": torch.empty(2, 5, 4, 24), "dk": None}
    strides = token_strides(tokens)
    assert strides["UNIT"] == 8
    assert (strides["stride_q_t"], strides["stride_q_h"]) == (36, 3)
    assert (strides["stride_k_t"], strides["stride_k_b"]) == (None, 180)
    assert (strides["stride_g_t"], strides["stride_dk_t"]) == (12, None)
    assert token_strides(tokens, shared=False)["stride_k_t"] == 36


def test_predictions_share_the_strides_of_their_counterparts() -> None:
    main, pred = torch.empty(2, 6, 4, 16), torch.empty(2, 3, 2, 4, 16)
    strides = token_strides({"q": main, "q_pred": pred})
    assert (strides["stride_q_t"], strides["stride_q_pred_t"], strides["stride_q_pred_p"]) == (64, None, 128)

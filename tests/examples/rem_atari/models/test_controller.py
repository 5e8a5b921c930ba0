"""The controller: sizes, memory, burn-in."""

from __future__ import annotations

import math

import pytest
import torch

from rem_atari.config import ControllerConfig
from rem_atari.models.controller import Controller, OverSquares, entropy, reset_carry

SMALL = ControllerConfig(channels=(4, 4), hidden_dim=8, lstm_dim=6)


def small_controller(**changes) -> Controller:
    torch.manual_seed(0)
    cfg = ControllerConfig(**{**vars(SMALL), **changes})
    return Controller(cfg, grid=2, code_dim=3, frame_size=16, num_actions=4)


def some_codes(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 4, 3, generator=torch.Generator().manual_seed(1))


def test_the_published_size_has_the_published_number_of_parameters():
    controller = Controller(ControllerConfig(), grid=8, code_dim=256, frame_size=64, num_actions=18)
    assert sum(parameter.numel() for parameter in controller.parameters()) == 4_586_707


def test_shapes():
    controller = small_controller()
    decision = controller(some_codes(5), controller.initial_carry(5))
    assert decision.logits.shape == (5, 4)
    assert decision.value.shape == (5,)
    assert [part.shape for part in decision.carry] == [(5, 6), (5, 6)]
    assert controller.features(some_codes(5, 7)).shape == (5, 7, 8)


def test_features_see_the_codes_as_a_square_row_by_row():
    controller = small_controller()
    codes = some_codes(1)
    square = codes.reshape(1, 2, 2, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(controller.features(codes), controller.cnn(square))


def test_a_layer_over_squares_is_a_linear_layer_over_flattened_images():
    """Its weights keep the order that checkpoints have them in: channels first."""
    images = some_codes(5).unflatten(1, (2, 2)).permute(0, 3, 1, 2).requires_grad_()
    layer = OverSquares(3, 2, 7)
    linear = torch.nn.Linear(12, 7)
    linear.load_state_dict(layer.state_dict())
    outputs = layer(images.permute(0, 2, 3, 1).flatten(1)), linear(images.flatten(1))
    torch.testing.assert_close(*outputs)
    of_layer, of_linear = (
        torch.autograd.grad(output.square().sum(), [images, *module.parameters()])
        for output, module in zip(outputs, (layer, linear), strict=True)
    )
    torch.testing.assert_close(of_layer, of_linear)


def test_features_of_many_steps_are_those_of_each():
    controller = small_controller()
    codes = some_codes(2, 3)
    each = torch.stack([controller.features(codes[:, step]) for step in range(3)], dim=1)
    torch.testing.assert_close(controller.features(codes), each)


def test_the_carry_holds_what_was_seen_and_done():
    controller = small_controller()
    codes = some_codes(2)
    carry = controller(codes, controller.initial_carry(2)).carry
    left = controller.observe_action(torch.tensor([0, 0]), carry)
    right = controller.observe_action(torch.tensor([0, 3]), carry)
    assert torch.equal(left[0][0], right[0][0])
    assert not torch.allclose(left[0][1], right[0][1])
    assert not torch.allclose(controller(codes, left).logits[1], controller(codes, right).logits[1])


def test_normalised_codes_do_not_depend_on_their_scale():
    normalised, plain = small_controller(normalize_codes=True), small_controller()
    codes = some_codes(2)
    torch.testing.assert_close(
        normalised.features(codes), normalised.features(100 * codes), rtol=1e-4, atol=1e-6
    )
    assert not torch.allclose(plain.features(codes), plain.features(100 * codes))
    assert torch.isfinite(normalised.features(torch.zeros(1, 4, 3))).all()


def test_heads_that_see_features_start_nearly_uniform_and_need_no_memory():
    controller = small_controller(heads_see_features=True)
    assert controller(some_codes(50), controller.initial_carry(50)).logits.abs().max() < 0.1
    for parameter in controller.lstm.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(controller.actor.weight)
    decision = controller(some_codes(2), controller.initial_carry(2))
    assert not decision.carry[0].any()
    assert not torch.allclose(decision.logits[0], decision.logits[1])
    assert decision.value[0] != decision.value[1]


def test_reset_carry_touches_only_the_rows_named():
    carry = (torch.ones(3, 2), torch.full((3, 2), 2.0))
    hidden, cell = reset_carry(carry, torch.tensor([False, True, False]))
    assert hidden.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert cell.tolist() == [[2, 2], [0, 0], [2, 2]]


@pytest.mark.parametrize("with_actions", [True, False])
def test_burn_in_is_acting_without_deciding(with_actions):
    controller = small_controller(burn_in_actions=with_actions)
    codes, actions = some_codes(2, 3), torch.tensor([[0, 1, 2], [3, 0, 1]])
    carry = controller.initial_carry(2)
    for step in range(3):
        carry = controller(codes[:, step], carry).carry
        if with_actions:
            carry = controller.observe_action(actions[:, step], carry)
    burnt_in = controller.burn_in(codes, actions, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(burnt_in, carry)
    assert not any(part.requires_grad for part in burnt_in)


def test_padding_leaves_the_memory_as_it_is():
    controller = small_controller()
    codes, actions = some_codes(2, 3), torch.tensor([[0, 1, 2], [3, 0, 1]])
    mask = torch.tensor([[False, True, True], [False, False, False]])
    carry = controller.burn_in(codes, actions, mask)
    short = controller.burn_in(codes[:1, 1:], actions[:1, 1:], mask[:1, 1:])
    torch.testing.assert_close([part[:1] for part in carry], list(short))
    assert all((part[1] == 0).all() for part in carry)
    padded = controller.burn_in(codes.masked_fill(~mask[..., None, None], 9.0), actions, mask)
    assert all(torch.equal(one, other) for one, other in zip(carry, padded, strict=True))


def test_burn_in_on_nothing_is_the_start():
    controller = small_controller()
    carry = controller.burn_in(some_codes(2, 0), torch.zeros(2, 0).long(), torch.zeros(2, 0).bool())
    assert all((part == 0).all() for part in carry)


def test_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0], [0.0, math.log(3), -1e9, -1e9]])
    wanted = [math.log(4), 0.0, -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    assert entropy(logits).tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_horizon_without_a_step_to_learn_from_is_named():
    with pytest.raises(ValueError, match=r"controller\.horizon is 1"):
        small_controller(horizon=1)

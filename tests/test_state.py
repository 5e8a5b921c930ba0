"""RetNetState: a value; each method returns a new state and leaves the old one alone."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from retention_cases import normal
from torch.utils import _pytree as pytree

import retpop
from retpop import RetNetState


def make_state(batch: int = 4, seed: int = 0) -> RetNetState:
    return RetNetState(kv=normal(2, batch, 3, 4, 5, seed=seed), position=torch.arange(batch) * 10 + 1)


def assert_equal(state: RetNetState, other: RetNetState) -> None:
    assert torch.equal(state.kv, other.kv)
    assert torch.equal(state.position, other.position)


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([2, 0, 2]),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([-1]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([True, False, False, True]),
        torch.zeros(4, dtype=torch.bool),
        slice(1, 3),
        slice(None, None, 2),
        slice(0, 1),
        slice(2, 2),
    ],
    ids=str,
)
def test_select_keeps_the_batch_dim(index: torch.Tensor | slice) -> None:
    state = make_state()
    rows = torch.arange(4)[
        index.long() if isinstance(index, torch.Tensor) and index.dtype is torch.int32 else index
    ]
    selected = state.select(index)
    assert_equal(selected, RetNetState(state.kv[:, rows.tolist()], state.position[rows.tolist()]))
    assert selected.kv.ndim == 5


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        (0, "int"),
        ([0, 1], "list"),
        (None, "NoneType"),
        (torch.tensor(1), r"\(\)"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\(2, 2\)"),
        (torch.tensor([0.0]), "float32"),
        (torch.tensor([0j]), "complex64"),
        (torch.ones(3, dtype=torch.bool), "3 rows"),
    ],
)
def test_select_refuses(index: object, wanted: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"RetNetState.select\(\): .*{wanted}"):
        make_state().select(index)


def test_reset_zeroes_rows_even_broken_ones() -> None:
    state = make_state()
    state.kv[:, 1] = torch.nan
    fresh = state.reset(torch.tensor([False, True, False, True]))
    assert fresh.position.tolist() == [1, 0, 21, 0]
    assert torch.equal(fresh.kv[:, [1, 3]], torch.zeros(2, 2, 3, 4, 5, dtype=torch.float64))
    assert torch.equal(fresh.kv[:, [0, 2]], state.kv[:, [0, 2]])


def test_reset_lets_gradients_through_kept_rows_only() -> None:
    kv = normal(2, 2, 3, 4, 5, seed=0).requires_grad_()
    RetNetState(kv, torch.zeros(2, dtype=torch.int64)).reset(torch.tensor([True, False])).kv.sum().backward()
    assert torch.equal(kv.grad[:, 0], torch.zeros_like(kv.grad[:, 0]))
    assert torch.equal(kv.grad[:, 1], torch.ones_like(kv.grad[:, 1]))


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (torch.zeros(4, dtype=torch.int64), "int64"),
        (torch.zeros(3, dtype=torch.bool), r"\(3,\)"),
        (torch.zeros(4, 1, dtype=torch.bool), r"\(4, 1\)"),
        (torch.tensor(True), r"\(\)"),
        ([True] * 4, "list"),
    ],
)
def test_reset_refuses(mask: object, wanted: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"RetNetState.reset\(\): mask .*{wanted}"):
        make_state().reset(mask)


def test_detach_cuts_the_graph() -> None:
    state = RetNetState(normal(2, 4, 3, 4, 5, seed=0).requires_grad_() * 2, torch.arange(4))
    assert state.kv.requires_grad
    assert not state.detach().kv.requires_grad
    assert_equal(state.detach(), state)


def test_to_moves_both_and_keeps_dtypes() -> None:
    for device in ("meta", torch.device("meta")):
        moved = make_state().to(device)
        assert (moved.kv.device.type, moved.kv.dtype) == ("meta", torch.float64)
        assert (moved.position.device.type, moved.position.dtype) == ("meta", torch.int64)
    assert_equal(make_state().to("cpu"), make_state())


def test_cat_joins_the_rows() -> None:
    first, second = make_state(4), make_state(1, seed=1)
    joined = RetNetState.cat([first, second])
    assert_equal(joined.select(slice(0, 4)), first)
    assert_equal(joined.select(slice(4, 5)), second)
    assert_equal(RetNetState.cat(iter((first,))), first)


def test_cat_undoes_select() -> None:
    state = make_state()
    assert_equal(RetNetState.cat([state.select(slice(n, n + 1)) for n in range(4)]), state)


def test_cat_refuses() -> None:
    with pytest.raises(ValueError, match=r"RetNetState.cat\(\): .*empty"):
        RetNetState.cat([])
    other = RetNetState(normal(3, 4, 3, 4, 5, seed=0), torch.arange(4))
    with pytest.raises(ValueError, match=r"RetNetState.cat\(\): .*\(2, 3, 4, 5\).*\(3, 3, 4, 5\)"):
        RetNetState.cat([make_state(), other])


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.select(slice(0, 2)),
        lambda state: state.select(torch.tensor([0, 1])),
        lambda state: state.reset(torch.tensor([True] * 4)),
        lambda state: state.detach(),
        lambda state: state.to("cpu"),
        lambda state: RetNetState.cat([state, state]),
    ],
)
def test_each_method_returns_a_new_state_and_changes_nothing(
    change: Callable[[RetNetState], RetNetState],
) -> None:
    state = make_state()
    before = copy.deepcopy(state)
    changed = change(state)
    assert isinstance(changed, RetNetState)
    assert changed is not state
    assert_equal(state, before)


def test_a_state_cannot_be_assigned_to() -> None:
    with pytest.raises(AttributeError):
        make_state().kv = torch.zeros(1)


def test_batch_size() -> None:
    assert make_state(4).batch_size == 4
    assert make_state(0).batch_size == 0


def test_copies() -> None:
    state = make_state()
    assert_equal(copy.deepcopy(state), state)
    assert_equal(pickle.loads(pickle.dumps(state)), state)


def test_it_is_a_pytree() -> None:
    state = make_state()
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == 2
    assert_equal(pytree.tree_unflatten(leaves, spec), state)
    doubled = pytree.tree_map(lambda leaf: leaf * 2, {"state": state})["state"]
    assert isinstance(doubled, RetNetState)
    assert torch.equal(doubled.kv, state.kv * 2)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_transforms_see_through_it() -> None:
    """vmap over an ensemble of states, and grad with respect to a state."""
    ensemble = pytree.tree_map(lambda leaf: torch.stack([leaf, leaf + 1]), make_state())
    sums = torch.vmap(lambda state: state.kv.sum() + state.position.sum())(ensemble)
    assert sums.shape == (2,)

    def energy(kv: torch.Tensor) -> torch.Tensor:
        return RetNetState(kv, make_state().position).reset(torch.tensor([True] * 4)).kv.sum()

    assert torch.equal(torch.func.grad(energy)(make_state().kv), torch.zeros(2, 4, 3, 4, 5).double())


@pytest.mark.usefixtures("fresh_compiler")
def test_it_passes_through_a_compiled_function() -> None:
    compiled = torch.compile(lambda s: s.reset(s.position > 10), fullgraph=True, backend="eager")
    state = make_state()
    assert_equal(compiled(state), state.reset(state.position > 10))


def test_it_is_public() -> None:
    assert "RetNetState" in retpop.__all__


def test_saved_and_loaded_without_pickle_of_everything(tmp_path: Path) -> None:
    state = make_state(3)
    torch.save(state, tmp_path / "state.pt")
    assert_equal(torch.load(tmp_path / "state.pt"), state)


@pytest.mark.parametrize("index", [slice(None), slice(0, 3, 2)])
def test_saved_as_plain_tensors(index: slice, tmp_path: Path) -> None:
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed (extra `hub`)"
    )
    state = make_state(3).select(index)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    safetensors.save_file(state.state_dict(), tmp_path / "state.safetensors")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for loaded in (saved, safetensors.load_file(tmp_path / "state.safetensors")):
        assert_equal(RetNetState.from_state_dict(loaded), state)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([], "saved is list"),
        ({"kv": torch.zeros(1, 1, 1, 1, 1)}, r"names \['kv'\]"),
        ({"kv": torch.zeros(1, 2), "position": torch.zeros(2, dtype=torch.int64)}, r"kv is \(1, 2\)"),
        ({"kv": torch.zeros(1, 2, 1, 1, 1), "position": torch.zeros(2)}, "position is .*float32"),
        ({"kv": torch.zeros(1, 2, 1, 1, 1), "position": torch.tensor([1])}, r"position is \(1,\)"),
    ],
)
def test_tensors_that_are_no_state_are_refused(saved: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        RetNetState.from_state_dict(saved)


def test_keys_of_the_pytree() -> None:
    leaves, _ = pytree.tree_flatten_with_path(make_state(2))
    assert [pytree.keystr(path) for path, _ in leaves] == [".kv", ".position"]


@pytest.mark.parametrize("device", [torch.bfloat16, 3.5, None, torch.zeros(1)])
def test_to_takes_a_device_alone(device: object) -> None:
    with pytest.raises(TypeError, match=r"RetNetState.to\(\): device is .*it must be a device"):
        make_state(2).to(device)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_select_refuses_integers_that_torch_takes_for_masks_or_refuses_itself(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"select\(\): index has shape .*int32 or int64"):
        make_state(3).select(torch.tensor([0, 1, 1], dtype=dtype))


@pytest.mark.parametrize("row", [3, -4])
def test_select_names_a_row_that_is_not_there(row: int) -> None:
    with pytest.raises(ValueError, match=f"index holds {row} but the state has 3 rows"):
        make_state(3).select(torch.tensor([0, row]))


def test_cat_refuses_what_is_no_state_and_states_of_other_dtypes() -> None:
    state = make_state(1)
    single = RetNetState(state.kv.float(), state.position)
    with pytest.raises(ValueError, match=r"differ in more than B: .*float32.*float64"):
        RetNetState.cat([state, single])
    with pytest.raises(TypeError, match="states holds int"):
        RetNetState.cat([state, 3])
    with pytest.raises(TypeError, match="states is NoneType"):
        RetNetState.cat(None)


def test_to_as_accelerate_calls_it() -> None:
    """Its hooks move whatever has a `to`, to None where it shall stay."""
    state = make_state(2)
    assert_equal(state.to("cpu", non_blocking=True), state)
    assert_equal(state.to(None, non_blocking=False), state)


def test_what_a_policy_casts_to_16_bits_comes_back() -> None:
    """FSDP makes a dataclass anew of its fields, each tensor cast."""
    kv = normal(2, 4, 3, 4, 5, seed=0).requires_grad_()
    state = RetNetState(kv, torch.arange(4))
    assert dataclasses.replace(state, kv=state.kv.bfloat16(), position=state.position).kv is kv
    assert dataclasses.replace(state, kv=2 * kv).kv is not kv
    assert dataclasses.replace(dataclasses.replace(state, kv=2 * kv), kv=kv.half()).kv.equal(2 * kv)

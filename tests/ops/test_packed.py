"""Packed sequences: cu_seqlens is nothing but one call for each sequence."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from retention_cases import (
    MODES,
    RetentionCase,
    assert_same_gradients,
    assert_same_results,
    gradients,
    mode_options,
)

import retpop
from retpop.ops.torch_backend import packed

BACKENDS_AND_MODES = [("reference", "chunkwise"), *(("torch", mode) for mode in MODES)]


def options_of(backend: str, mode: str) -> dict[str, object]:
    return {"backend": backend} if backend == "reference" else {"backend": backend, **mode_options(mode)}


def packed_case(
    lengths: list[int], seed: int = 0, with_state: bool = True
) -> tuple[RetentionCase, torch.Tensor]:
    case = RetentionCase.make(
        1, sum(lengths), 2, 3, 4, seed=seed, with_state=with_state, sequences=len(lengths)
    )
    return case, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def one_by_one(case: RetentionCase, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence in a call of its own."""
    edges = cu_seqlens.tolist()
    results = [
        case.part(start, stop, None if case.state is None else case.state[s : s + 1]).run(backend="reference")
        for s, (start, stop) in enumerate(pairwise(edges))
    ]
    outs, states = zip(*results, strict=True)
    return torch.cat(outs, dim=1), torch.cat(states)


@pytest.mark.parametrize(("backend", "mode"), BACKENDS_AND_MODES)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 15, 16, 17, 20]), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    with_state=st.booleans(),
)
@example(lengths=[0], seed=0, with_state=True)
@example(lengths=[0, 0, 3, 0], seed=0, with_state=True)
@example(lengths=[1, 1, 1], seed=0, with_state=False)
def test_packed_sequences_are_separate_calls(
    backend: str, mode: str, lengths: list[int], seed: int, with_state: bool
) -> None:
    case, cu_seqlens = packed_case(lengths, seed, with_state)
    actual = case.run(cu_seqlens=cu_seqlens, **options_of(backend, mode))
    assert_same_results(actual, one_by_one(case, cu_seqlens), 1e-12)


@pytest.mark.parametrize(("backend", "mode"), BACKENDS_AND_MODES)
def test_every_gradient(backend: str, mode: str) -> None:
    case, cu_seqlens = packed_case([3, 0, 17, 1])
    case = case.for_gradients()
    expected = gradients(one_by_one(case, cu_seqlens), case.leaves())
    results = case.run(cu_seqlens=cu_seqlens, **options_of(backend, mode))
    assert_same_gradients(gradients(results, case.leaves()), expected, 1e-11)


@pytest.mark.parametrize(("backend", "mode"), BACKENDS_AND_MODES)
def test_results_can_be_changed_in_place_in_training(backend: str, mode: str) -> None:
    case, cu_seqlens = packed_case([3, 0, 17, 1])
    case = case.for_gradients()
    options = options_of(backend, mode)
    expected = gradients([2 * x for x in case.run(cu_seqlens=cu_seqlens, **options)], case.leaves())
    changed = [x.mul_(2) for x in case.run(cu_seqlens=cu_seqlens, **options)]
    assert_same_gradients(gradients(changed, case.leaves()), expected, 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    case, cu_seqlens = packed_case([2, 0, 3], seed=5)
    case = case.for_gradients()

    def run(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, state = leaves
        changed = replace(case, q=q, k=k, v=v, state=state)
        return changed.run(cu_seqlens=cu_seqlens, backend="torch", **mode_options(mode))

    assert torch.autograd.gradcheck(run, case.leaves())


@pytest.mark.parametrize(("backend", "mode"), BACKENDS_AND_MODES)
def test_the_state_of_an_empty_sequence_passes_through(backend: str, mode: str) -> None:
    case, cu_seqlens = packed_case([0, 4, 0])
    _, state = case.run(cu_seqlens=cu_seqlens, **options_of(backend, mode))
    assert torch.equal(state[[0, 2]], case.state[[0, 2]])
    assert not torch.equal(state[1], case.state[1])


@pytest.mark.parametrize(("backend", "mode"), BACKENDS_AND_MODES)
@pytest.mark.parametrize("broken", ["q", "k", "v"])
def test_sequences_do_not_touch_each_other_even_when_one_is_broken(
    backend: str, mode: str, broken: str
) -> None:
    case, cu_seqlens = packed_case([5, 17, 6])
    data = getattr(case, broken).clone()
    data[:, 5:22] = torch.nan
    out, state = replace(case, **{broken: data}).run(cu_seqlens=cu_seqlens, **options_of(backend, mode))
    assert out[:, 5:22].isnan().all()
    assert torch.isfinite(out[:, :5]).all()
    assert torch.isfinite(out[:, 22:]).all()
    assert torch.isfinite(state[[0, 2]]).all()


@pytest.mark.parametrize(("backend", "mode"), BACKENDS_AND_MODES)
def test_no_sequences(backend: str, mode: str) -> None:
    case, cu_seqlens = packed_case([])
    out, state = case.run(cu_seqlens=cu_seqlens, **options_of(backend, mode))
    assert (out.shape, state.shape) == ((1, 0, 2, 4), (0, 2, 3, 4))


@pytest.mark.parametrize("mode", MODES)
def test_int64_and_int32_offsets(mode: str) -> None:
    case, cu_seqlens = packed_case([5, 17, 6])
    for a, b in zip(
        case.run(cu_seqlens=cu_seqlens, mode=mode),
        case.run(cu_seqlens=cu_seqlens.long(), mode=mode),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_one_sequence_is_no_packing(mode: str) -> None:
    case, cu_seqlens = packed_case([21])
    assert_same_results(case.run(cu_seqlens=cu_seqlens, mode=mode), case.run(mode=mode), 1e-12)


@pytest.mark.parametrize(
    ("bounds", "message"), [([0, 10, 30], "ends at 30 but there are T=40"), ([0, 30, 20, 40], "falls")]
)
def test_compiled_boundaries_are_checked_too(bounds: list[int], message: str) -> None:
    """A compiled call reads no values to check them, but the boundaries it reads to cut the row."""
    log_decay = retpop.retnet_decay(2)

    @torch.compile(backend="eager")
    def compiled(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return retpop.retention(x, x, x, log_decay, cu_seqlens=cu_seqlens)[0]

    with pytest.raises(ValueError, match=message):
        compiled(torch.randn(1, 40, 2, 4), torch.tensor(bounds))


def test_a_decoder_reads_the_boundaries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = retpop.RetNetConfig(embed_dim=16, num_heads=2, num_layers=3, ffn_dim=16)
    plans = []
    monkeypatch.setattr(packed, "_plan", lambda *a, _plan=packed._plan: plans.append(a) or _plan(*a))
    retpop.RetNetDecoder(cfg)(torch.randn(1, 40, 16), cu_seqlens=torch.tensor([0, 10, 40]))
    assert len(plans) == 1

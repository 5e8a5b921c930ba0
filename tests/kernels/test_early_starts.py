"""Split retention: heads that forget within half a stretch start each stretch early, and need no scan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from retention_cases import RetentionCase, assert_same_results, largest_error, normal
from torch import Tensor

from benchmarks.kernel_audit.traffic import audit
from retpop.kernels.configs import retention_tiles
from retpop.kernels.configs_bwd import RetentionBwdConfig, SweepConfig
from retpop.kernels.launch import run
from retpop.kernels.retention_bwd import plan_retention_bwd
from retpop.kernels.retention_fwd import plan_retention_fwd

STRETCH, ROWS = 32, 16

# How often each head halves its state in a token. Of the second, half a stretch leaves 2^-24.
HALVINGS = (float("inf"), 1.5, 1.49, 0.0)
EARLY = 2

LENGTHS = {"plain": None, "a short end": [0, 69], "packed": [0, 0, 32, 33, 83]}


def case_of(lengths: list[int] | None, *, with_state: bool = True) -> tuple[RetentionCase, Tensor | None]:
    """Heads that halve a state so many times a token, and the bounds of packed sequences."""
    T, sequences = (96, None) if lengths is None else (lengths[-1], len(lengths) - 1)
    heads = len(HALVINGS)
    case = RetentionCase.make(
        1, T, heads, 8, 16, dtype=torch.float32, seed=T, with_state=with_state, sequences=sequences
    )
    case = replace(case, log_decay=torch.tensor(HALVINGS) * -torch.tensor(2.0).log())
    return case, None if lengths is None else torch.tensor(lengths)


def poisoned(launches: list) -> tuple[Tensor, Tensor]:
    """What stretches add and the states before them, filled with NaN."""
    scan = next(launch for launch in launches if launch.kernel.__name__ == "scan_states_kernel")
    added, states = scan.arguments["p_added"], scan.arguments["p_states"]
    return added.fill_(torch.nan), states.fill_(torch.nan)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_outputs_and_states(lengths: str) -> None:
    case, bounds = case_of(LENGTHS[lengths], with_state=lengths != "plain")
    tiles = retention_tiles((8, 16), torch.float32, "ieee", "sm_90")
    launches, results = plan_retention_fwd(
        *(case.q, case.k, case.v, case.log_decay, case.state, 8**-0.5, bounds),
        config=replace(tiles, rows=ROWS, cols_v=16, stretch=STRETCH),
    )
    added, states = poisoned(launches)
    with audit():
        run(launches, case.q.device)
    assert added[:, :EARLY].isnan().all()
    expected = case.double().run(backend="reference", cu_seqlens=bounds)
    assert_same_results(results, expected, 5e-6, 5e-6)
    if lengths == "plain":
        assert states[1:, :EARLY].isnan().all()
        assert not states[:, EARLY:].isnan().any()


@pytest.mark.parametrize(
    ("lengths", "sweeps"),
    [("plain", 1), ("a short end", 2), pytest.param("packed", 1, marks=pytest.mark.slow)],
)
def test_gradients(lengths: str, sweeps: int) -> None:
    case, bounds = case_of(LENGTHS[lengths], with_state=lengths != "plain")
    sweep = SweepConfig(tile=ROWS, cols_v=16, num_warps=4, num_stages=1)
    config = RetentionBwdConfig(
        both=sweep if sweeps == 1 else None, keys=replace(sweep, cols_v=8), values=sweep, stretch=STRETCH
    )
    leaves = case.double().for_gradients()
    results = leaves.run(backend="reference", cu_seqlens=bounds)
    grads = [normal(*x.shape, seed=i, dtype=torch.float32) for i, x in enumerate(results)]
    total = sum((x * grad.double()).sum() for x, grad in zip(results, grads, strict=True))
    inputs = {name: getattr(leaves, name) for name in ("q", "k", "v", "state")}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    expected = dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))

    launches, found = plan_retention_bwd(
        *(case.q, case.k, case.v, case.log_decay, case.state, 8**-0.5, bounds, *grads), config=config
    )
    added, _ = poisoned(launches)
    with audit():
        run(launches, case.q.device)
    for name, actual in zip(("q", "k", "v", "state"), found, strict=True):
        if actual is not None:
            assert largest_error(actual, expected[name], tokens_dim=None if name == "state" else 1) <= 2e-5
    if lengths == "plain":
        assert added[:, :EARLY].isnan().all()  # no gradient of a first state
        assert added[0].isnan().all()
        assert not added[1:, EARLY:].isnan().any()

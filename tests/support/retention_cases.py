"""Inputs and comparisons for the tests of retention and POP: the laws are stated with these."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import retpop

# γ = 0 and γ = 1 are legal and the likeliest to break: 0 · -inf, and no decay at all.
GAMMAS = (1 - 2**-5, 0.0, 0.5, 1.0, 0.1, 1 - 2**-9)

TOKENS_OF_A_BLOCK = 64
"""Errors are measured in blocks of so many tokens, so that one bad token cannot hide among many good ones."""

MODES = ("parallel", "chunkwise", "recurrent")

CHUNK = 16
"""The smallest chunk allowed: short sequences then have several chunks, the last one partial."""


def mode_options(mode: str) -> dict[str, object]:
    """Keyword arguments for a mode; chunkwise with small chunks."""
    return {"mode": mode, "chunk_size": CHUNK} if mode == "chunkwise" else {"mode": mode}


def log_decays(num_heads: int, dtype: torch.dtype = torch.float64, start: int = 0) -> Tensor:
    """(H,) log-decays that walk through `GAMMAS` from `start`."""
    gammas = [GAMMAS[(start + head) % len(GAMMAS)] for head in range(num_heads)]
    return torch.tensor([math.log(gamma) if gamma > 0 else -math.inf for gamma in gammas], dtype=dtype)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed and the shape alone; rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States and decays are float64 for float64 inputs, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@contextmanager
def float32_products(setting: str) -> Iterator[None]:
    """Let torch multiply float32 on a GPU in "ieee" or "tf32"."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True, kw_only=True)
class RetentionCase:
    """Arguments of `retpop.retention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    state: Tensor | None

    @classmethod
    def make(
        cls,
        B: int,
        T: int,
        H: int,
        Dk: int,
        Dv: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        with_state: bool = True,
        sequences: int | None = None,
    ) -> RetentionCase:
        """A random case; `sequences` is the number of states where it is not B (packed sequences)."""
        states = B if sequences is None else sequences
        return cls(
            q=normal(B, T, H, Dk, seed=seed, dtype=dtype),
            k=normal(B, T, H, Dk, seed=seed + 1000, dtype=dtype),
            v=normal(B, T, H, Dv, seed=seed + 2000, dtype=dtype),
            log_decay=log_decays(H, state_dtype(dtype), start=seed),
            state=normal(states, H, Dk, Dv, seed=seed + 3000, dtype=state_dtype(dtype))
            if with_state
            else None,
        )

    def run(self, **options: object) -> tuple[Tensor, Tensor]:
        """(out, state) of retpop.retention."""
        return retpop.retention(self.q, self.k, self.v, self.log_decay, state=self.state, **options)

    def part(self, start: int, stop: int, state: Tensor | None) -> RetentionCase:
        """Tokens start..stop, with the state before them."""
        cut = slice(start, stop)
        return replace(self, q=self.q[:, cut], k=self.k[:, cut], v=self.v[:, cut], state=state)

    def double(self) -> RetentionCase:
        """The same numbers in float64: what a lower precision is measured against."""
        return _map(self, lambda tensor: tensor.double())

    def leaves(self) -> list[Tensor]:
        """The tensors that receive gradients."""
        return _leaves(self.log_decay, self.q, self.k, self.v, self.state)

    def for_gradients(self, *, decay: bool = False) -> RetentionCase:
        """A copy whose data are fresh leaves that require gradients; with `decay`, the log-decays too."""
        return _with_fresh_leaves(self, decay)


@dataclass(frozen=True, kw_only=True)
class PopCase:
    """Arguments of `retpop.pop_retention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_pred: Tensor
    k_pred: Tensor
    v_pred: Tensor
    log_decay: Tensor
    state: Tensor | None
    reset: Tensor | None
    block_size: int
    offset: int

    @classmethod
    def make(
        cls,
        B: int,
        N: int,
        L: int,
        P: int,
        M: int,
        H: int,
        Dk: int,
        Dv: int,
        *,
        offset: int = 0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        with_state: bool = True,
        with_reset: bool = False,
    ) -> PopCase:
        """A random case of N blocks of L tokens and P predictions of M tokens."""
        main = RetentionCase.make(B, N * L, H, Dk, Dv, seed=seed, dtype=dtype, with_state=with_state)
        reset = None
        if with_reset:
            reset = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < 0.4
        return cls(
            **vars(main),
            q_pred=normal(B, P, M, H, Dk, seed=seed + 4000, dtype=dtype),
            k_pred=normal(B, P, M, H, Dk, seed=seed + 5000, dtype=dtype),
            v_pred=normal(B, P, M, H, Dv, seed=seed + 6000, dtype=dtype),
            reset=reset,
            block_size=L,
            offset=offset,
        )

    def run(self, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        """(out, pred, state) of retpop.pop_retention."""
        return retpop.pop_retention(
            self.q,
            self.k,
            self.v,
            self.q_pred,
            self.k_pred,
            self.v_pred,
            self.log_decay,
            block_size=self.block_size,
            offset=self.offset,
            state=self.state,
            reset=self.reset,
            **options,
        )

    def run_block_by_block(self, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        """The meaning of POP: one pass a block, one pass a prediction from the state before it."""
        B, T, H, Dk = self.q.shape
        num_blocks, num_predictions = T // self.block_size, self.q_pred.shape[1]
        state = self.state
        if state is None:
            state = self.q.new_zeros(B, H, Dk, self.v.shape[-1], dtype=state_dtype(self.q.dtype))
        outs, preds = [], []
        for n in range(num_blocks + 1):
            if self.reset is not None and n < num_blocks:
                state = torch.where(self.reset[:, n, None, None, None], 0.0, state)
            if 0 <= n - self.offset < num_predictions:
                tokens = [t[:, n - self.offset] for t in (self.q_pred, self.k_pred, self.v_pred)]
                preds.append(retpop.retention(*tokens, self.log_decay, state=state, **options)[0])
            if n < num_blocks:
                cut = slice(n * self.block_size, (n + 1) * self.block_size)
                tokens = [t[:, cut] for t in (self.q, self.k, self.v)]
                out, state = retpop.retention(*tokens, self.log_decay, state=state, **options)
                outs.append(out)
        out = torch.cat(outs, dim=1) if outs else torch.zeros_like(self.v)
        pred = torch.stack(preds, dim=1) if preds else torch.zeros_like(self.v_pred)
        return out, pred, state

    def double(self) -> PopCase:
        """The same numbers in float64: what a lower precision is measured against."""
        return _map(self, lambda tensor: tensor.double())

    def leaves(self) -> list[Tensor]:
        """The tensors that receive gradients."""
        predictions = (self.q_pred, self.k_pred, self.v_pred)
        return _leaves(self.log_decay, self.q, self.k, self.v, *predictions, self.state)

    def for_gradients(self, *, decay: bool = False) -> PopCase:
        """A copy whose data are fresh leaves that require gradients; with `decay`, the log-decays too."""
        return _with_fresh_leaves(self, decay)


def _map(case, change):
    changed = {
        name: change(value)
        for name, value in vars(case).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return replace(case, **changed)


def _leaves(log_decay: Tensor, *data: Tensor | None) -> list[Tensor]:
    given = [tensor for tensor in data if tensor is not None]
    return [*given, log_decay] if log_decay.requires_grad else given


def _with_fresh_leaves(case, decay):
    fresh = _map(case, lambda tensor: tensor.detach().clone().requires_grad_())
    return fresh if decay else replace(fresh, log_decay=case.log_decay)


def gradients(
    results: tuple[Tensor, ...], leaves: list[Tensor], *, seed: int = 7, create_graph: bool = False
) -> list[Tensor]:
    """Gradients of random weights of all results in all leaves; zeros where a leaf has no influence."""
    total = sum((normal(*r.shape, seed=seed + i, dtype=r.dtype) * r).sum() for i, r in enumerate(results))
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True, create_graph=create_graph)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def _rms(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return tensor.square().mean(dims).sqrt()


def largest_error(actual: Tensor, expected: Tensor, *, tokens_dim: int | None = 1) -> float:
    """Largest RMS(error) / RMS(expected) over (row, head, 64-token block), or over each head's state.

    `tokens_dim` is the dim of time in (..., T, H, D); None for a state (B, H, Dk, Dv). Where the
    expected values nearly cancel, they count as one hundredth of the whole tensor's: rounding allows no more.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    assert torch.isfinite(expected).all()
    floor = 1e-2 * expected.square().mean().sqrt() + torch.finfo(torch.float64).tiny
    if tokens_dim is None:
        pieces = [(actual, expected, (-2, -1))]
    else:
        split = [t.split(TOKENS_OF_A_BLOCK, dim=tokens_dim) for t in (actual, expected)]
        pieces = [(*pair, (tokens_dim, -1)) for pair in zip(*split, strict=True)]
    errors = [(_rms(a - e, dims) / _rms(e, dims).clamp(min=floor)).max().item() for a, e, dims in pieces]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def assert_same_results(
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    tolerance: float,
    state_tolerance: float | None = None,
) -> None:
    """Outputs (the first), predictions (if three) and the state (the last) agree within the tolerances."""
    assert len(actual) == len(expected)
    named = ["out", "state"] if len(actual) == 2 else ["out", "pred", "state"]
    for name, a, e in zip(named, actual, expected, strict=True):
        tokens_dim = {"out": 1, "pred": 2, "state": None}[name]
        limit = tolerance if name != "state" or state_tolerance is None else state_tolerance
        error = largest_error(a, e, tokens_dim=tokens_dim)
        assert error <= limit, f"{name}: error {error:.3g} is above {limit:.3g}"


def assert_same_gradients(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each gradient agrees, relative to its own RMS."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        if e.numel() == 0:
            continue
        error = (a - e).double().square().mean().sqrt()
        limit = tolerance * e.double().square().mean().sqrt().clamp(min=1e-2)
        assert error <= limit, f"gradient {index}: error {error:.3g} is above {limit:.3g}"

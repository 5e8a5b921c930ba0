"""Arguments of the Triton backend's `torch.library` ops, in six kinds, for what every op must hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from retention_cases import normal
from torch import Tensor

from retpop.position import rotary_frequencies, rotation_at

KINDS = ("plain", "non-contiguous", "without a state", "requires grad", "empty", "packed or odd")

LOG_DECAY = torch.tensor([-0.03, -torch.inf, 0.0])

Arguments = tuple[object, ...]


class Maker:
    """Makes tensors of one kind; each has numbers of its own."""

    def __init__(self, kind: str) -> None:
        self.kind, self._seed = kind, 0

    def __call__(self, *shape: int) -> Tensor:
        self._seed += 1
        made = normal(*shape, seed=self._seed, dtype=torch.float32)
        if self.kind == "non-contiguous":
            # Neither the order of the dimensions nor the distance of neighbours is the usual one.
            doubled = made.repeat_interleave(2, dim=-1).transpose(0, 1).contiguous()
            made = doubled.transpose(0, 1)[..., ::2]
        return made.requires_grad_(self.kind == "requires grad")

    def state(self, rows: int, Dk: int, Dv: int) -> Tensor | None:
        return None if self.kind == "without a state" else self(rows, 3, Dk, Dv)


def tokens(make: Maker, *shape: int, Dk: int = 4, Dv: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return make(*shape, 3, Dk), make(*shape, 3, Dk), make(*shape, 3, Dv)


def retention_fwd(kind: str) -> Arguments:
    make = Maker(kind)
    if kind == "packed or odd":
        bounds = torch.tensor([0, 5, 5, 23], dtype=torch.int32)
        return *tokens(make, 1, 23), LOG_DECAY, make.state(3, 4, 6), bounds, 0.7
    length = 0 if kind == "empty" else 18
    return *tokens(make, 2, length), LOG_DECAY, make.state(2, 4, 6), None, 0.5


def retention_step(kind: str) -> Arguments:
    make = Maker(kind)
    rows = 0 if kind == "empty" else 2
    Dk, Dv = (5, 1) if kind == "packed or odd" else (4, 6)
    return *tokens(make, rows, Dk=Dk, Dv=Dv), LOG_DECAY, make.state(rows, Dk, Dv), 0.5


def _pop_sizes(kind: str) -> tuple[int, int, int, int, int]:
    """N, L, P, M, offset."""
    return {"empty": (0, 3, 0, 2, 0), "packed or odd": (2, 1, 3, 5, 0)}.get(kind, (3, 3, 2, 2, 1))


def pop_fwd(kind: str) -> Arguments:
    make = Maker(kind)
    N, L, P, M, offset = _pop_sizes(kind)
    reset = None if kind == "without a state" else torch.arange(2 * N).view(2, N) % 3 == 1
    main, pred = tokens(make, 2, N * L), tokens(make, 2, P, M)
    return *main, *pred, LOG_DECAY, make.state(2, 4, 6), reset, L, offset, 0.5


def pop_rows_fwd(kind: str) -> Arguments:
    make = Maker(kind)
    N, L, P, M, offset = _pop_sizes(kind)
    reset = None if kind == "without a state" else torch.arange(2 * N).view(2, N) % 3 == 1
    row = tokens(make, 2, N * L + P * M)
    return *row, LOG_DECAY, make.state(2, 4, 6), reset, [P, M], L, offset, 0.5


def norm_gate_fwd(kind: str) -> Arguments:
    make = Maker(kind)
    shape = {"empty": (2, 0, 3, 10), "packed or odd": (7, 3, 1)}.get(kind, (2, 5, 3, 10))
    weight = bias = None
    if kind != "without a state":
        weight, bias = make(*shape[-2:]), make(*shape[-2:])
    norm = "groupnorm" if kind != "non-contiguous" else "rmsnorm"
    return make(*shape), make(*shape), weight, bias, norm, 1e-2


def rotary_fwd(kind: str) -> Arguments:
    make = Maker(kind)
    length, dim = (0, 8) if kind == "empty" else (5, 2) if kind == "packed or odd" else (5, 8)
    pairs = "rope" if kind in ("plain", "packed or odd") else "retnet"
    positions = torch.arange(2 * length).view(2, length)[: 1 if kind == "plain" else 2]
    turn = rotation_at(positions, rotary_frequencies(pairs, dim), pairs)
    return make(2, length, 3, dim), make(2, length, 3, dim), *turn, pairs, kind == "packed or odd"


FORWARD: dict[str, Callable[[str], Arguments]] = {
    make.__name__: make
    for make in (retention_fwd, retention_step, pop_fwd, pop_rows_fwd, norm_gate_fwd, rotary_fwd)
}


def _gradients_of(name: str, kind: str) -> tuple[Tensor, ...]:
    """Random gradients of an op's results, whose shapes the fake gives."""
    results = getattr(torch.ops.retpop, name)(
        *(x.detach().to("meta") if isinstance(x, Tensor) else x for x in FORWARD[name](kind))
    )
    results = results if isinstance(results, tuple) else (results,)
    return tuple(normal(*x.shape, seed=50 + i, dtype=x.dtype) for i, x in enumerate(results))


def retention_bwd(kind: str) -> Arguments:
    *tensors, scale = retention_fwd(kind)
    grads = _gradients_of("retention_fwd", kind)
    needs = [True, kind != "plain", True, tensors[4] is not None]
    return *tensors, *grads, scale, needs


def pop_bwd(kind: str) -> Arguments:
    *tensors, block_size, offset, scale = pop_fwd(kind)
    grads = _gradients_of("pop_fwd", kind)
    if kind == "packed or odd":
        grads = (grads[0], None, None)
    needs = [True] * 5 + [kind != "plain", tensors[7] is not None]
    return *tensors, *grads, block_size, offset, scale, needs


def pop_rows_bwd(kind: str) -> Arguments:
    *tensors, predictions, block_size, offset, scale = pop_rows_fwd(kind)
    grads = _gradients_of("pop_rows_fwd", kind)
    if kind == "packed or odd":
        grads = (None, grads[1])
    needs = [True, True, kind != "plain", tensors[4] is not None]
    return *tensors, *grads, predictions, block_size, offset, scale, needs


def norm_gate_bwd(kind: str) -> Arguments:
    *tensors, norm, eps = norm_gate_fwd(kind)
    needs = [kind != "plain", True, tensors[2] is not None, tensors[3] is not None]
    return *tensors, *_gradients_of("norm_gate_fwd", kind), norm, eps, needs


BACKWARD: dict[str, Callable[[str], Arguments]] = {
    make.__name__: make for make in (retention_bwd, pop_bwd, pop_rows_bwd, norm_gate_bwd)
}

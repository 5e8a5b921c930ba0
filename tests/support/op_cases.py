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


def resets(rows: int, length: int) -> Tensor:
    return torch.arange(rows * length).view(rows, length) % 7 == 3


def retention_fwd(kind: str) -> Arguments:
    make = Maker(kind)
    if kind == "packed or odd":
        bounds = torch.tensor([0, 5, 5, 23], dtype=torch.int32)
        return *tokens(make, 1, 23), LOG_DECAY, make.state(3, 4, 6), bounds, resets(1, 23), 0.7, None
    length = 0 if kind == "empty" else 18
    reset = None if kind in ("plain", "without a state") else resets(2, length)
    return *tokens(make, 2, length), LOG_DECAY, make.state(2, 4, 6), None, reset, 0.5, None


def token(kind: str) -> Arguments:
    """Of `retention_fwd`: a kernel of its own."""
    make = Maker(kind)
    rows = 0 if kind == "empty" else 2
    Dk, Dv = (5, 1) if kind == "packed or odd" else (4, 6)
    return *tokens(make, rows, 1, Dk=Dk, Dv=Dv), LOG_DECAY, make.state(rows, Dk, Dv), None, None, 0.5, None


def _pop_sizes(kind: str) -> tuple[int, int, int, int, int]:
    """N, L, P, M, offset."""
    return {"empty": (0, 3, 0, 2, 0), "packed or odd": (2, 1, 3, 5, 0)}.get(kind, (3, 3, 2, 2, 1))


def pop_fwd(kind: str, *, of_rows: bool = False) -> Arguments:
    make = Maker(kind)
    N, L, P, M, offset = _pop_sizes(kind)
    reset = None if kind == "without a state" else torch.arange(2 * N).view(2, N) % 3 == 1
    shapes = [(2, N * L + P * M)] if of_rows else [(2, N * L), (2, P, M)]
    given = [x for shape in shapes for x in tokens(make, *shape)]
    return given, LOG_DECAY, make.state(2, 4, 6), reset, [P, M], L, offset, 0.5, None


def pop_rows(kind: str) -> Arguments:
    return pop_fwd(kind, of_rows=True)


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


Case = tuple[str, Callable[[str], Arguments]]
"""An op's name, and what makes its arguments of a kind."""

FORWARD: dict[str, Case] = {
    "retention": ("retention_fwd", retention_fwd),
    "token": ("retention_fwd", token),
    "pop": ("pop_fwd", pop_fwd),
    "pop of rows": ("pop_fwd", pop_rows),
    "norm and gate": ("norm_gate_fwd", norm_gate_fwd),
    "rotary": ("rotary_fwd", rotary_fwd),
}


def flat(arguments: Arguments) -> list[object]:
    """Arguments with their lists taken apart."""
    return [x for one in arguments for x in (one if isinstance(one, list | tuple) else [one])]


def run(name: str, arguments: Arguments) -> list[Tensor]:
    """The results of an op."""
    return flat((getattr(torch.ops.retpop, name)(*arguments),))


def backward_of(case: str, num_tensors: int, *, kept: int = 0) -> Callable[[str], Arguments]:
    """Arguments of the gradient op of a case: random gradients of its results, and which are wanted.

    ``kept``: the number of tensors that the forward may keep for it; here it kept none.
    """
    name, make = FORWARD[case]

    def arguments(kind: str) -> Arguments:
        given = make(kind)
        results = [x.detach() for x in run(name, given)]
        grads = [normal(*x.shape, seed=50 + i, dtype=x.dtype) for i, x in enumerate(results)]
        if kind == "packed or odd" and len(grads) > 1:
            grads[-1] = None
        inputs = flat(given[:num_tensors])
        needs = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
        needs[1] = needs[1] and kind != "plain"
        return *given[:num_tensors], grads, *[None] * kept, *given[num_tensors:], needs

    return arguments


BACKWARD: dict[str, Case] = {
    "retention, backward": ("retention_bwd", backward_of("retention", 7, kept=1)),
    "token, backward": ("retention_bwd", backward_of("token", 7, kept=1)),
    "pop, backward": ("pop_bwd", backward_of("pop", 4, kept=1)),
    "pop of rows, backward": ("pop_bwd", backward_of("pop of rows", 4, kept=1)),
    "norm and gate, backward": ("norm_gate_bwd", backward_of("norm and gate", 4)),
}

"""REM's decoder in training: a POP pass over a batch of sequences, and plain passes over a sequence.

Weights and inputs are float32, and autocast computes in bfloat16, as when a model is trained so. Floors count
the products of the weights: two operations a weight and token, twice as many again in backward. Those of
retention itself, about 8% more, are left out, as in the decoder's targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import retpop
from benchmarks.peers import yet_another_retnet
from benchmarks.peers.transformer import Transformer
from benchmarks.work import (
    BOTH,
    DTYPES,
    FORWARD,
    Contender,
    Group,
    Problem,
    Work,
    product_flops,
    randoms,
    weights_of,
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A decoder, and B rows of N blocks of L tokens, as many predictions of M tokens each.

    ``offset`` is 1 in imagination: then there is a state, ``past`` tokens old.
    """

    B: int
    N: int
    L: int
    M: int
    embed_dim: int = 256
    num_heads: int = 4
    num_layers: int = 5
    ffn_dim: int = 1024
    offset: int = 0
    past: int = 0

    @property
    def text(self) -> str:
        """For tables."""
        return f"B{self.B} N{self.N} L{self.L} M{self.M} E{self.embed_dim} layers {self.num_layers}"

    @property
    def model(self) -> dict[str, int]:
        """The decoder's own sizes."""
        names = ("embed_dim", "num_heads", "num_layers", "ffn_dim")
        return {name: getattr(self, name) for name in names}


TINY = {"embed_dim": 32, "num_heads": 2, "num_layers": 2, "ffn_dim": 64}

SHAPES = {
    "tiny": Sizes(B=2, N=3, L=5, M=4, **TINY),
    "rem_train": Sizes(B=4, N=10, L=65, M=64),
}

MODES = ("pop", "chunkwise")


def groups() -> Iterator[Group]:
    """The training pass and the plain passes in each dtype."""
    for shape, sizes in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            for mode in MODES:
                yield group(shape, sizes, mode, dtype)


def group(shape: str, sizes: Sizes, mode: str, dtype: str) -> Group:
    """Everybody who makes this pass."""
    same = partial(Contender, reference=partial(ours, mode=mode, backend="reference"), model=True)
    contenders = {"torch": same(make=partial(ours, mode=mode, backend="torch"), states=1)}
    if mode == "pop":
        contenders[LAST] = last_outputs(states=1)
        contenders["compile"] = same(
            make=partial(ours, mode=mode, backend="torch", compiler="inductor"), states=1
        )
    contenders["triton"] = same(make=partial(ours, mode=mode, backend="triton"), states=1)
    if yet_another_retnet.is_there():
        contenders[yet_another_retnet.NAME] = same(make=partial(theirs, mode=mode))
    if mode != "parallel":
        contenders["transformer"] = Contender(
            make=transformer,
            reference=transformer,
            computes="causal attention, one pass over the sequence",
            model=True,
        )
    return Group(
        op="decoder",
        shape=shape,
        mode=mode,
        dtype=dtype,
        passes=(FORWARD, BOTH),
        problem=partial(problem, sizes, DTYPES[dtype]),
        contenders=contenders,
    )


LAST = 'torch, main_out="last"'
"""Ours where of the main stream only the last token of each block is wanted, as in training REM."""


def last_outputs(states: int) -> Contender:
    """Whoever wants of the sequence only the outputs at each block's last token: the agent's world model."""
    make = partial(ours, mode="pop", main_out="last")
    return Contender(
        make=partial(make, backend="torch"),
        reference=partial(make, backend="reference"),
        computes="of the sequence, the last token's output of each block",
        model=True,
        states=states,
    )


def problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """A decoder, a sequence and prediction tokens; where there is a past, the state after it."""
    s = sizes
    tensors = randoms("x", s.B, s.N * s.L, s.embed_dim, dtype=torch.float32, device=device)
    tensors |= randoms("x_pred", s.B, s.N, s.M, s.embed_dim, dtype=torch.float32, device=device)
    models = make_models(s, device)
    if s.offset:
        tensors = {name: x.detach() for name, x in tensors.items()}
        with torch.no_grad():
            seen = torch.randn(s.B, s.past, s.embed_dim, device=device)
            _, state = models["ours"](seen, backend="torch")
        tensors |= {"kv": state.kv.transpose(0, 1), "position": state.position}
    return Problem(sizes=s, dtype=dtype, tensors=tensors, shared=models)


def make_models(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Our decoder, yet-another-retnet's with the same weights where it is there, and a transformer."""
    models: dict[str, Any] = {"transformer": Transformer(**sizes.model).to(device).eval()}
    if yet_another_retnet.is_there():
        models["theirs"] = yet_another_retnet.make_decoder(**sizes.model).to(device)
        weights = models["theirs"].state_dict()
        ours = retpop.checkpoints.load_yet_another_retnet(weights, num_heads=sizes.num_heads)
    else:
        ours = retpop.RetNetDecoder(retpop.RetNetConfig(**sizes.model, decay="log_spaced"), device=device)
    return models | {"ours": ours.eval()}


def ours(problem: Problem, *, mode: str, backend: str, compiler: str = "", main_out: str = "all") -> Work:
    """`RetNetDecoder`, under torch.compile if there is a ``compiler``; ``main_out`` as in its `pop`."""
    s, decoder = problem.sizes, problem.shared["ours"]
    x, x_pred = problem.tensors["x"], problem.tensors["x_pred"]
    state = state_of(problem)
    if mode == "pop":
        call = partial(
            decoder.pop,
            x,
            x_pred,
            state,
            block_size=s.L,
            offset=s.offset,
            main_out=main_out,
            backend=backend,
        )
    else:
        call = partial(decoder, x, state, mode=mode, backend=backend)
    if compiler:
        call = torch.compile(call, dynamic=False, fullgraph=True, backend=compiler)

    def run() -> tuple[Tensor, ...]:
        with problem.autocast():
            *outs, after = call()
        return *outs, after.kv.transpose(0, 1)

    tokens = s.N * (s.L + (s.M if mode == "pop" else 0))
    return Work(
        inputs=[x, x_pred] if mode == "pop" else [x],
        weights=weights_of(decoder),
        run=run,
        flops=s.B * tokens * product_flops(decoder),
        graded=0 if s.offset else 2 if mode == "pop" else 1,
    )


def state_of(problem: Problem) -> retpop.RetNetState | None:
    """The state that the sequence goes on from."""
    if "kv" not in problem.tensors:
        return None
    return retpop.RetNetState(problem.tensors["kv"].transpose(0, 1), problem.tensors["position"])


def theirs(problem: Problem, *, mode: str) -> Work:
    """yet-another-retnet's layers: POP in two passes in each, or its own pass."""
    s, decoder, work = problem.sizes, problem.shared["theirs"], ours(problem, mode=mode, backend="torch")
    x, state = problem.tensors["x"], state_of(problem)
    # It divides keys where we scale outputs.
    states = None if state is None else state.kv * (s.embed_dim // s.num_heads) ** -0.5
    position = 0 if state is None else state.position[0]

    def run() -> tuple[Tensor, ...]:
        with problem.autocast():
            if mode == "pop":
                return yet_another_retnet.decoder_pop(
                    decoder, x, problem.tensors["x_pred"], states, position, s.L, s.offset
                )
            if mode == "parallel":
                return (decoder.forward_parallel(x),)
            outs, carried = [], []
            for start, chunk in enumerate(x.split(CHUNK, dim=1)):
                out, carried = decoder.forward_chunkwise(chunk, CHUNK * start, carried)
                outs.append(out)
            return (torch.cat(outs, dim=1),)

    return replace(work, run=run, weights=weights_of(decoder))


CHUNK = 128
"""Chunks that yet-another-retnet's decoder is called with; of its sizes, the fastest at these shapes."""


def transformer(problem: Problem) -> Work:
    """Causal attention over the sequence: every token is learned from those before it, none ahead of time."""
    s, x = problem.sizes, problem.tensors["x"]
    model = problem.shared["transformer"]

    def run() -> tuple[Tensor]:
        with problem.autocast():
            return (model(x),)

    flops = s.B * s.N * s.L * product_flops(model)
    return Work(inputs=[x], weights=weights_of(model), run=run, flops=flops)

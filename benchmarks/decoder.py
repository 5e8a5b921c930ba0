"""REM's decoder in training: a POP pass over a batch of sequences, and plain passes over a sequence.

"paper_train" is the training pass at the paper's batch, for a GPU. Weights and inputs are float32, and
autocast computes in bfloat16, as in mixed-precision training. Floors count the products of the weights: two
operations a weight and token, twice as many again in backward. The products of retention itself, about 8%
more, are left out, as in the decoder's targets.
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
    UPDATE,
    Contender,
    Group,
    Problem,
    Work,
    compile_call,
    ours,
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


TINY = {"embed_dim": 32, "num_heads": 2, "num_layers": 1, "ffn_dim": 64}

SHAPES = {
    "tiny": Sizes(B=1, N=2, L=5, M=4, **TINY),
    "rem_train": Sizes(B=4, N=10, L=65, M=64),
}

GPU_SHAPES = {"paper_train": replace(SHAPES["rem_train"], B=64)}


def groups() -> Iterator[Group]:
    """The training pass and the plain pass in each dtype."""
    for shape, sizes in (SHAPES | GPU_SHAPES).items():
        for dtype in ("float32", "bfloat16"):
            for mode in ("pop", "chunkwise"):
                yield group(shape, sizes, mode, dtype)


def group(shape: str, sizes: Sizes, mode: str, dtype: str) -> Group:
    """Every contender for this pass."""
    contenders = by_all(mode)
    contenders["transformer"] = Contender(
        make=transformer,
        reference=transformer,
        computes="causal attention, one pass over the sequence",
        model=True,
    )
    passes = (FORWARD, BOTH, UPDATE) if shape in GPU_SHAPES else (FORWARD, BOTH)
    return Group(
        op="decoder",
        shape=shape,
        mode=mode,
        dtype=dtype,
        passes=passes,
        problem=partial(problem, sizes, DTYPES[dtype]),
        contenders=contenders,
        for_gpu=shape in GPU_SHAPES,
    )


LAST = 'torch, main_out="last"'
"""Our decoder with outputs of only the last token of each block, as in training REM."""


def by_all(mode: str, *, is_compiled: bool = True) -> dict[str, Contender]:
    """Our decoder by every backend, and yet-another-retnet's layers, in a mode: "pop" or "chunkwise"."""
    make = partial(by_us, mode=mode)
    names = ["torch", "triton"]
    if mode == "pop" and is_compiled:
        names = ["torch", "compile", "triton", "triton-compile"]
    contenders = ours(make, names, model=True, states=1)
    if mode == "pop":
        computes = "of the sequence, the last token's output of each block"
        last = ours(partial(make, main_out="last"), ["torch"], computes=computes, model=True, states=1)
        contenders[LAST] = last["torch"]
    if yet_another_retnet.is_there():
        reference = contenders["torch"].reference
        make_theirs = partial(theirs, mode=mode)
        contenders[yet_another_retnet.NAME] = Contender(make=make_theirs, reference=reference, model=True)
    return contenders


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
    """Our decoder, yet-another-retnet's with the same weights if it is installed, and a transformer."""
    models: dict[str, Any] = {"transformer": Transformer(**sizes.model).to(device).eval()}
    if yet_another_retnet.is_there():
        models["theirs"] = yet_another_retnet.make_decoder(**sizes.model).to(device)
        weights = models["theirs"].state_dict()
        ours = retpop.checkpoints.load_yet_another_retnet(weights, num_heads=sizes.num_heads)
    else:
        ours = retpop.RetNetDecoder(retpop.RetNetConfig(**sizes.model, decay="log_spaced"), device=device)
    return models | {"ours": ours.eval()}


def by_us(
    problem: Problem, *, mode: str, backend: str, compiled: bool = False, main_out: str = "all"
) -> Work:
    """`RetNetDecoder`; ``main_out`` as in its `pop`."""
    s, decoder = problem.sizes, problem.shared["ours"]
    x, x_pred = problem.tensors["x"], problem.tensors["x_pred"]
    state = state_of(problem)
    call = partial(decoder, x, state, mode=mode, backend=backend)
    if mode == "pop":
        wanted = {"block_size": s.L, "offset": s.offset, "main_out": main_out, "backend": backend}
        call = partial(decoder.pop, x, x_pred, state, **wanted)
    if compiled:
        call = compile_call(call, backend, problem.device)

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
        moves=False,
    )


def state_of(problem: Problem) -> retpop.RetNetState | None:
    """The state from which the sequence continues."""
    if "kv" not in problem.tensors:
        return None
    return retpop.RetNetState(problem.tensors["kv"].transpose(0, 1), problem.tensors["position"])


def theirs(problem: Problem, *, mode: str) -> Work:
    """yet-another-retnet's layers: POP in two passes in each, or its own pass."""
    s, decoder, work = problem.sizes, problem.shared["theirs"], by_us(problem, mode=mode, backend="torch")
    x, state = problem.tensors["x"], state_of(problem)
    # It divides the keys where we scale the outputs.
    states = None if state is None else state.kv * (s.embed_dim // s.num_heads) ** -0.5
    position = 0 if state is None else state.position[0]

    def run() -> tuple[Tensor, ...]:
        with problem.autocast():
            if mode == "pop":
                return yet_another_retnet.decoder_pop(
                    decoder, x, problem.tensors["x_pred"], states, position, s.L, s.offset
                )
            outs, carried = [], []
            for start, chunk in enumerate(x.split(CHUNK, dim=1)):
                out, carried = decoder.forward_chunkwise(chunk, CHUNK * start, carried)
                outs.append(out)
            return (torch.cat(outs, dim=1),)

    return replace(work, run=run, weights=weights_of(decoder))


CHUNK = 128
"""Chunk size for yet-another-retnet's decoder: the fastest at these shapes."""


def transformer(problem: Problem) -> Work:
    """Causal attention over the sequence: each token is predicted from the tokens before it, without POP."""
    s, x = problem.sizes, problem.tensors["x"]
    model = problem.shared["transformer"]

    def run() -> tuple[Tensor]:
        with problem.autocast():
            return (model(x),)

    flops = s.B * s.N * s.L * product_flops(model)
    return Work(inputs=[x], weights=weights_of(model), run=run, flops=flops, moves=False)

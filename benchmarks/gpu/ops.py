"""Every operation at the shapes that count, forward and with backward, against its floors.

A floor's bytes: forward, each input read and each output written once; backward, each input and each
gradient of an output read and each gradient of an input written once. Its operations: the products of the
tokens as they are, in chunks of 64; backward, two and a half times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import retpop
from benchmarks.audit.case import BACKWARD_FLOPS, chunk_flops, floor_bytes
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.rows import Row
from retpop.position import rotary_frequencies, rotation_at

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something to time.

    Attributes:
        part, what, shape: as in a `Row`.
        dtype: of the tokens.
        inputs: tensors that are read; gradients are taken in those that require one.
        run: computes the outputs.
        flops: products of the forward pass.
        graded: how many outputs, the first ones, have gradients in training; 0: it is not trained.
        linear: whether backward needs no input.
    """

    part: str
    what: str
    shape: str
    dtype: torch.dtype
    inputs: Sequence[Tensor | None]
    run: Callable[[], Sequence[Tensor]]
    flops: int = 0
    graded: int = 1
    linear: bool = False


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """B rows of N blocks of L tokens, M prediction tokens a block, H heads of D features."""

    B: int
    N: int
    L: int
    M: int
    H: int
    D: int

    @property
    def text(self) -> str:
        """For the table."""
        return f"B{self.B} N{self.N} L{self.L} M{self.M} H{self.H} D{self.D}"

    @property
    def tokens(self) -> int:
        """Of a row, the predictions' included."""
        return self.N * (self.L + self.M)

    @property
    def flops(self) -> int:
        """Of POP, forward."""
        block = chunk_flops(self.L, self.D, self.D)
        pred = chunk_flops(self.M, self.D, self.D, takes_in=False)
        return self.B * self.H * self.N * (block + pred)


def training_sizes(clock: Clock) -> Sizes:
    """REM's world model in training."""
    if clock.on_gpu:
        return Sizes(B=64, N=10, L=65, M=64, H=4, D=64)
    return Sizes(B=1, N=2, L=5, M=4, H=1, D=16)


def imagination_sizes(clock: Clock) -> Sizes:
    """A step of imagination: a block taken in, the next one predicted."""
    if clock.on_gpu:
        return Sizes(B=64, N=1, L=65, M=64, H=4, D=64)
    return Sizes(B=1, N=1, L=5, M=4, H=1, D=16)


def long_sizes(clock: Clock) -> list[tuple[int, int, int, int]]:
    """B, T, H, D of long sequences."""
    return [(8, 4096, 16, 64), (8, 4096, 16, 128)] if clock.on_gpu else [(1, 40, 1, 16)]


def pop(clock: Clock) -> Iterator[Work]:
    """POP in training, separate and packed, and in imagination."""
    device = clock.device
    for dtype in (BF16, FP32) if clock.on_gpu else (FP32,):
        sizes = training_sizes(clock)
        yield separate_pop(sizes, dtype, device)
        yield packed_pop(sizes, dtype, device, "rem training", offset=0, with_state=False)
        yield packed_pop(
            imagination_sizes(clock), dtype, device, "rem imagination", offset=1, with_state=True
        )


def separate_pop(sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str = "triton") -> Work:
    """The public function on six tensors."""
    s = sizes
    main = [_leaf(s.B, s.N * s.L, s.H, s.D, dtype=dtype, device=device) for _ in range(3)]
    pred = [_leaf(s.B, s.N, s.M, s.H, s.D, dtype=dtype, device=device) for _ in range(3)]
    log_decay = retpop.log_spaced_decay(s.H).to(device)
    return Work(
        part="pop",
        what="pop_retention" if backend == "triton" else f"pop_retention, {backend}",
        shape=f"rem training, {s.text}",
        dtype=dtype,
        inputs=[*main, *pred],
        run=lambda: retpop.pop_retention(*main, *pred, log_decay, block_size=s.L, backend=backend),
        flops=s.flops,
        graded=2,
    )


def packed_pop(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, name: str, *, offset: int, with_state: bool
) -> Work:
    """As a layer calls it: queries and keys turned before, values out of the projection's row."""
    s = sizes
    turned = _leaf(s.B, s.tokens, 2 * s.H, s.D, dtype=dtype, device=device)
    projected = _leaf(s.B, s.tokens, 2 * s.H, s.D, dtype=dtype, device=device)
    row = (*turned.chunk(2, dim=2), projected.chunk(2, dim=2)[0])
    state = _leaf(s.B, s.H, s.D, s.D, dtype=FP32, device=device) if with_state else None
    log_decay = retpop.log_spaced_decay(s.H).to(device)
    return Work(
        part="pop",
        what="pop_rows",
        shape=f"{name}, {s.text}",
        dtype=dtype,
        inputs=[*row, state],
        run=lambda: torch.ops.retpop.pop_rows_fwd(
            *row, log_decay, state, None, [s.N, s.M], s.L, offset, s.D**-0.5
        ),
        flops=s.flops,
        graded=0 if with_state else 1,
    )


def retention(clock: Clock) -> Iterator[Work]:
    """Long sequences, and one token."""
    for B, T, H, D in long_sizes(clock):
        yield long_retention(B, T, H, D, BF16 if clock.on_gpu else FP32, clock.device)
    for B, H, D in [(64, 4, 64), (256, 16, 128)] if clock.on_gpu else [(2, 1, 16)]:
        yield decoding(B, H, D, BF16 if clock.on_gpu else FP32, clock.device)


def long_retention(
    B: int, T: int, H: int, D: int, dtype: torch.dtype, device: torch.device, backend: str = "triton"
) -> Work:
    """Chunkwise retention of whole sequences."""
    tokens = [_leaf(B, T, H, D, dtype=dtype, device=device) for _ in range(3)]
    log_decay = retpop.retnet_decay(H).to(device)
    return Work(
        part="retention",
        what="retention" if backend == "triton" else f"retention, {backend}",
        shape=f"B{B} T{T} H{H} D{D}",
        dtype=dtype,
        inputs=tokens,
        run=lambda: retpop.retention(*tokens, log_decay, backend=backend),
        flops=B * H * chunk_flops(T, D, D),
    )


def decoding(B: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Work:
    """One token from a state: reading and writing the state is the work."""
    tokens = [_leaf(B, 1, H, D, dtype=dtype, device=device) for _ in range(3)]
    state = torch.randn(B, H, D, D, device=device)
    log_decay = retpop.retnet_decay(H).to(device)
    return Work(
        part="retention",
        what="retention, one token",
        shape=f"B{B} H{H} D{D}",
        dtype=dtype,
        inputs=[*tokens, state],
        run=lambda: retpop.retention(*tokens, log_decay, state=state, backend="triton"),
        graded=0,
    )


def token_wise(clock: Clock) -> Iterator[Work]:
    """Norm, gate and rotation."""
    s = training_sizes(clock)
    dtype = BF16 if clock.on_gpu else FP32
    shapes = {f"rem training, {s.text}": (s.B, s.tokens, s.H, s.D)}
    for B, T, H, D in long_sizes(clock)[1:]:
        shapes[f"B{B} T{T} H{H} D{D}"] = (B, T, H, D)
    for name, shape in shapes.items():
        yield gated_norm(name, shape, dtype, clock.device)
        yield rotation(name, shape, dtype, clock.device)


def gated_norm(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """silu(gate) times the norm, as the layers call it."""
    x, gate = (_leaf(*shape, dtype=dtype, device=device) for _ in range(2))
    return Work(
        part="token-wise",
        what="norm_gate",
        shape=name,
        dtype=dtype,
        inputs=[x, gate],
        run=lambda: (torch.ops.retpop.norm_gate_fwd(x, gate, None, None, "groupnorm", 1e-6),),
    )


def rotation(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """Queries and keys out of the projection's row, turned."""
    B, T, H, D = shape
    qk = _leaf(B, T, 2 * H, D, dtype=dtype, device=device)
    turn = rotation_at(torch.arange(T)[None], rotary_frequencies("retnet", D), "retnet")
    cos, sin = (x.to(device) for x in turn)
    q, k = qk.chunk(2, dim=2)
    return Work(
        part="token-wise",
        what="rotary",
        shape=name,
        dtype=dtype,
        inputs=[q, k],
        run=lambda: torch.ops.retpop.rotary_fwd(q, k, cos, sin, "retnet", False),
        graded=2,
        linear=True,
    )


def _leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def timed(work: Work, clock: Clock) -> Iterator[Row]:
    """Forward, and with backward if it is trained, eagerly and in a graph."""
    leaves = [x for x in work.inputs if x is not None and x.requires_grad]
    outputs = [x.detach() for x in work.run()]
    bytes_forward = floor_bytes([*work.inputs, *outputs])
    weights = [torch.randn_like(x) for x in outputs[: work.graded]]

    @torch.no_grad()
    def forward() -> object:
        return work.run()

    def both() -> object:
        return torch.autograd.grad(work.run()[: work.graded], leaves, weights)

    passes: dict[str, tuple[Callable[[], object], int, int]] = {
        "forward": (forward, bytes_forward, work.flops)
    }
    if work.graded:
        bytes_backward = floor_bytes([*([] if work.linear else work.inputs), *weights, *leaves])
        flops = int((1 + BACKWARD_FLOPS) * work.flops)
        passes["forward+backward"] = (both, bytes_forward + bytes_backward, flops)
    for direction, (run, count, flops) in passes.items():
        for mode, time in clock.modes().items():
            yield Row(
                part=work.part,
                what=work.what,
                shape=work.shape,
                dtype=str(work.dtype).removeprefix("torch."),
                way=direction,
                mode=mode,
                seconds=time(run),
                floor_bytes=count,
                floor_flops=flops,
            )

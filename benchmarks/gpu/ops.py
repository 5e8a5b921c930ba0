"""Every operation at the shapes that count, forward and with backward, against its floors.

A floor's bytes: forward, each input read and each output written once; backward, each input and each
gradient of an output read and each gradient of an input written once. Its operations: the products of the
tokens as they are, in chunks of 64; backward, two and a half times as many. Public functions are set up as
`python -m benchmarks run` does; what lies under them only here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import retpop
from benchmarks import pop as pops
from benchmarks import retention as retentions
from benchmarks.audit.case import BACKWARD_FLOPS
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.rows import Row
from benchmarks.pop import Sizes
from benchmarks.work import Work, leaf
from retpop.position import rotary_frequencies, rotation_at

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A work and its place in the report: part, what, shape and dtype as in a `Row`.

    ``graphable``: whether a CUDA graph can hold it.
    """

    part: str
    what: str
    shape: str
    dtype: torch.dtype
    work: Work
    graphable: bool = True


def training_sizes(clock: Clock) -> Sizes:
    """REM's world model in training."""
    if clock.on_gpu:
        return Sizes(B=64, N=10, L=65, M=64, H=4, D=64)
    return Sizes(B=1, N=2, L=5, M=4, H=1, D=16)


def imagination_sizes(clock: Clock) -> Sizes:
    """A step of imagination: a block taken in, the next one predicted."""
    if clock.on_gpu:
        return Sizes(B=64, N=1, L=65, M=64, H=4, D=64, offset=1)
    return Sizes(B=1, N=1, L=5, M=4, H=1, D=16, offset=1)


def long_sizes(clock: Clock) -> list[retentions.Sizes]:
    """Long sequences."""
    if clock.on_gpu:
        return [retentions.Sizes(B=8, T=4096, H=16, D=dim) for dim in (64, 128)]
    return [retentions.Sizes(B=1, T=40, H=1, D=16)]


def decoding_sizes(clock: Clock) -> list[retentions.Sizes]:
    """One token a row."""
    if clock.on_gpu:
        return [retentions.Sizes(B=64, T=1, H=4, D=64), retentions.Sizes(B=256, T=1, H=16, D=128)]
    return [retentions.Sizes(B=2, T=1, H=1, D=16)]


def pop(clock: Clock) -> Iterator[Entry]:
    """POP in training, separate and packed, and in imagination."""
    device = clock.device
    for dtype in (BF16, FP32) if clock.on_gpu else (FP32,):
        sizes = training_sizes(clock)
        yield separate_pop(sizes, dtype, device)
        yield packed_pop(sizes, dtype, device, "rem training")
        yield packed_pop(imagination_sizes(clock), dtype, device, "rem imagination")


def separate_pop(sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str = "triton") -> Entry:
    """The public function on six tensors."""
    return Entry(
        part="pop",
        what="pop_retention" if backend == "triton" else f"pop_retention, {backend}",
        shape=f"rem training, {sizes.text}",
        dtype=dtype,
        work=pops.ours(pops.problem(sizes, dtype, device), backend=backend),
    )


def packed_pop(sizes: Sizes, dtype: torch.dtype, device: torch.device, name: str) -> Entry:
    """As a layer calls it: queries and keys turned before, values out of the projection's row."""
    s = sizes
    turned = leaf(s.B, s.tokens, 2 * s.H, s.D, dtype=dtype, device=device)
    projected = leaf(s.B, s.tokens, 2 * s.H, s.D, dtype=dtype, device=device)
    row = (*turned.chunk(2, dim=2), projected.chunk(2, dim=2)[0])
    state = leaf(s.B, s.H, s.D, s.D, dtype=FP32, device=device) if s.offset else None
    log_decay = retpop.log_spaced_decay(s.H).to(device)
    return Entry(
        part="pop",
        what="pop_rows",
        shape=f"{name}, {s.text}",
        dtype=dtype,
        work=Work(
            inputs=[*row, state],
            run=lambda: torch.ops.retpop.pop_rows_fwd(
                *row, log_decay, state, None, [s.N, s.M], s.L, s.offset, s.D**-0.5
            ),
            flops=s.flops,
            backward_flops=BACKWARD_FLOPS,
            graded=0 if s.offset else 1,
        ),
    )


def retention(clock: Clock) -> Iterator[Entry]:
    """Long sequences, and one token."""
    dtype = BF16 if clock.on_gpu else FP32
    for sizes in long_sizes(clock):
        yield long_retention(sizes, dtype, clock.device)
    for sizes in decoding_sizes(clock):
        yield decoding(sizes, dtype, clock.device)


def long_retention(
    sizes: retentions.Sizes, dtype: torch.dtype, device: torch.device, backend: str = "triton"
) -> Entry:
    """Chunkwise retention of whole sequences."""
    return Entry(
        part="retention",
        what="retention" if backend == "triton" else f"retention, {backend}",
        shape=sizes.text,
        dtype=dtype,
        work=retentions.ours(retentions.problem(sizes, dtype, device), backend=backend),
    )


def decoding(sizes: retentions.Sizes, dtype: torch.dtype, device: torch.device) -> Entry:
    """One token from a state: reading and writing the state is the work."""
    s = sizes
    tokens = [leaf(s.B, 1, s.H, s.D, dtype=dtype, device=device) for _ in range(3)]
    state = torch.randn(s.B, s.H, s.D, s.D, device=device)
    log_decay = retpop.retnet_decay(s.H).to(device)
    return Entry(
        part="retention",
        what="retention, one token",
        shape=f"B{s.B} H{s.H} D{s.D}",
        dtype=dtype,
        work=Work(
            inputs=[*tokens, state],
            run=lambda: retpop.retention(*tokens, log_decay, state=state, backend="triton"),
            graded=0,
        ),
    )


def token_wise(clock: Clock) -> Iterator[Entry]:
    """Norm, gate and rotation."""
    s = training_sizes(clock)
    dtype = BF16 if clock.on_gpu else FP32
    shapes = {f"rem training, {s.text}": (s.B, s.tokens, s.H, s.D)}
    for long in long_sizes(clock)[1:]:
        shapes[long.text] = (long.B, long.T, long.H, long.D)
    for name, shape in shapes.items():
        yield gated_norm(name, shape, dtype, clock.device)
        yield rotation(name, shape, dtype, clock.device)


def gated_norm(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Entry:
    """silu(gate) times the norm, as the layers call it."""
    x, gate = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
    return Entry(
        part="token-wise",
        what="norm_gate",
        shape=name,
        dtype=dtype,
        work=Work(
            inputs=[x, gate],
            run=lambda: (torch.ops.retpop.norm_gate_fwd(x, gate, None, None, "groupnorm", 1e-6),),
        ),
    )


def rotation(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Entry:
    """Queries and keys out of the projection's row, turned."""
    B, T, H, D = shape
    qk = leaf(B, T, 2 * H, D, dtype=dtype, device=device)
    turn = rotation_at(torch.arange(T)[None], rotary_frequencies("retnet", D), "retnet")
    cos, sin = (x.to(device) for x in turn)
    q, k = qk.chunk(2, dim=2)
    return Entry(
        part="token-wise",
        what="rotary",
        shape=name,
        dtype=dtype,
        work=Work(
            inputs=[q, k],
            run=lambda: torch.ops.retpop.rotary_fwd(q, k, cos, sin, "retnet", False),
            graded=2,
            linear=True,
        ),
    )


def timed(entry: Entry, clock: Clock) -> Iterator[Row]:
    """Forward, and with backward if it is trained, eagerly and in a graph."""
    passes = entry.work.passes()
    # Eager ones first: a failed capture ends the work.
    for mode, time in clock.modes().items():
        for direction, found in passes.items():
            if mode == "graph" and not entry.graphable:
                continue
            yield Row(
                part=entry.part,
                what=entry.what,
                shape=entry.shape,
                dtype=str(entry.dtype).removeprefix("torch."),
                way=direction,
                mode=mode,
                seconds=time(found.run),
                floor_bytes=found.floor_bytes,
                floor_flops=found.flops,
            )

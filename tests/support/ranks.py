"""Processes that form one gloo group: started once, then given one function after another."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 300
"""Until a rank that waits for another one, or a test that waits for its ranks, gives up."""

Function = Callable[..., None]


class Ranks:
    """The processes of ranks 0 to ``world`` - 1."""

    def __init__(self, world: int, meeting: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "retpop"])  # once for all
        pairs = [context.Pipe() for _ in range(world)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, world, str(meeting), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def run(self, function: Function, *args: object) -> None:
        """Run ``function(*args)`` on every rank; an error of any rank fails the test with its traceback."""
        errors = self.errors(function, *args)
        assert not any(errors), "\n".join(
            f"rank {rank}: {error}" for rank, error in enumerate(errors) if error
        )

    def errors(self, function: Function, *args: object) -> list[str | None]:
        """Run a function on every rank; the traceback of each rank's error, or None.

        Ranks that fail may still wait for each other, so that the first error ends all of them.
        """
        assert self._processes[0].is_alive(), "the ranks ended with an earlier error"
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [_answer(pipe) for pipe in self._pipes]
        if any(answers):
            self.close()
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def ranks_of(world: int, folder: Path) -> Iterator[Ranks]:
    """Ranks that end with the block."""
    ranks = Ranks(world, folder / "meeting")
    try:
        yield ranks
    finally:
        ranks.close()


def _answer(pipe: Connection) -> str | None:
    if not pipe.poll(SECONDS):
        return f"no answer in {SECONDS} s"
    try:
        return pipe.recv()
    except EOFError:
        return "the process died"


def _serve(rank: int, world: int, meeting: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            function(*args)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())

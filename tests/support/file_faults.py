"""Faults at every call by which a program changes files: each is a *site*, and any one of them can be hit."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WRITES = ("open", "write", "flush", "close", "fsync", "mkdir", "link", "rename", "replace")
"""What a full disk can refuse. Text and short data are only written when they are flushed."""

REMOVALS = ("unlink", "rmdir")
"""What changes files too, and works on a full disk."""


class Faults:
    """Counts sites, and calls `hit` at some of them, before what happens there happens.

    Args:
        at: the site to hit, from 0, or whether one is, by its name; None: none, they are only counted.
        hit: what happens there; it is told the site's name. A write is hit when half of its data is written.
        once: only that site is hit; otherwise all sites from there on are.
        kinds: the operations that are sites.
    """

    def __init__(
        self,
        at: int | Callable[[str], bool] | None,
        hit: Callable[[str], None],
        *,
        once: bool = True,
        kinds: tuple[str, ...] = WRITES,
    ) -> None:
        self.sites: list[str] = []
        self.hits: list[str] = []
        self._at, self._hit, self._once, self._kinds = at, hit, once, kinds

    def pass_by(self, kind: str, path: object) -> None:
        """A call that changes files is about to be made."""
        if kind not in self._kinds:
            return
        site = f"{kind} {os.fspath(path) if isinstance(path, str | os.PathLike) else path}"
        self.sites.append(site)
        if self.hits:
            is_hit = not self._once
        elif callable(self._at):
            is_hit = self._at(site)
        else:
            is_hit = len(self.sites) - 1 == self._at
        if is_hit:
            self.hits.append(site)
            self._hit(site)


class WatchedFile:
    """A file opened for writing whose writes are sites."""

    def __init__(self, file: Any, path: object, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, data: Any) -> int:
        try:
            self._faults.pass_by("write", self._path)
        except BaseException:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)

    def flush(self) -> None:
        self._faults.pass_by("flush", self._path)
        self._file.flush()

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._faults.pass_by("close", self._path)
        finally:
            self._file.close()


def no_space(site: str) -> None:
    """What a full disk says; like the system's own, it names no file where one that is open is meant."""
    kind, _, path = site.partition(" ")
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind in ("open", "mkdir", "link", "rename", "replace"):
        error.filename = path
    raise error


def kill(site: str) -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def file_faults(
    at: int | Callable[[str], bool] | None = None,
    hit: Callable[[str], None] = no_space,
    *,
    once: bool = True,
    kinds: tuple[str, ...] = WRITES,
) -> Iterator[Faults]:
    """Inside it, all calls of this process that change files are sites of the `Faults` it gives."""
    faults = Faults(at, hit, once=once, kinds=kinds)
    real_open, real_os_open = io.open, os.open

    def watched_open(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real_open(path, mode, *more, **options)
        if not isinstance(path, int):  # one that is open already was a site when it was opened
            faults.pass_by("open", path)
        return WatchedFile(real_open(path, mode, *more, **options), path, faults)

    def watched_os_open(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            faults.pass_by("open", path)
        return real_os_open(path, flags, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", watched_open)
        patch.setattr(builtins, "open", watched_open)
        patch.setattr(os, "open", watched_os_open)
        for kind in ("fsync", "mkdir", "link", "rename", "replace", *REMOVALS):
            patch.setattr(os, kind, _watched(kind, getattr(os, kind), faults))
        yield faults


def _watched(kind: str, real: Callable[..., Any], faults: Faults) -> Callable[..., Any]:
    def call(path: Any, *more: Any, **options: Any) -> Any:
        if kind != "mkdir" or not os.path.lexists(path):  # a folder that is there takes no room
            faults.pass_by(kind, path)
        return real(path, *more, **options)

    return call

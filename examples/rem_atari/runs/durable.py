"""Writing files so that a crash leaves either the old content or the new, never half of one.

Every error names its file. The operating system names a file only if it cannot be opened, not if a full disk
cuts it short.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until its content is on the disk.

    Raises:
        FileExistsError: something exists at `path`, even a link; links are never followed.
        OSError: it cannot be written; the partial file is deleted.
    """
    with _naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries (created, renamed, deleted) are on the disk."""
    with _naming(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then rename it to `path`.

    Processes that do so in one folder take turns, for they use the same temporary names.

    Raises:
        OSError: it cannot be written; what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.writing")
    with _taking_turns(path.parent):
        temporary.unlink(missing_ok=True)  # left by a crash
        write_durably(temporary, data)
        try:
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def publish_file(temporary: Path, path: Path) -> None:
    """Give a written file its final name, once its content is on the disk.

    Raises:
        OSError: it cannot be done; what was at `path` is still there.
    """
    with _naming(path):
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    sync_folder(path.parent)


def make_writable(folder: Path) -> None:
    """Make a folder if it is not there, and test that files can be written into it.

    For use before minutes of work whose results go there.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


@contextmanager
def _taking_turns(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the folder, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # NFS cannot lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may hold the descriptor open
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an OSError inside the block the path, if it names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise

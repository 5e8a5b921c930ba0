"""Writing files so that a crash leaves either the old content or the new, never half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until its content is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder (created, renamed, deleted) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.writing")
    write_durably(temporary, data)
    temporary.replace(path)
    sync_folder(path.parent)

"""The folder of a run: where each of its files lies, how it is created and opened again."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rem_atari.config import Config
from rem_atari.errors import RunError, RunWarning, UsageError, describe_os_error
from rem_atari.runs.checkpoint import MANIFEST_FILE, read_config_copy
from rem_atari.runs.config_file import SavedConfig, read_config, write_config

LOCK_FILE = ".lock"
"""Locked (flock) by the process that writes into the folder; its content names that process."""

MOST_LOCK_BYTES = 1_000


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: the metrics of each phase of each epoch."""
        return self.path / "metrics.jsonl"

    @property
    def sessions(self) -> Path:
        """One JSON object per start or resumption: time, code and machine."""
        return self.path / "sessions.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, ``step-00000042`` each."""
        return self.path / "checkpoints"

    @property
    def replay(self) -> Path:
        """Folder of the replay's shards: the experience trained on."""
        return self.path / "replay"

    @property
    def heldout(self) -> Path:
        """Folder of shards of the last evaluation, never trained on."""
        return self.path / "heldout"

    @property
    def evaluation(self) -> Path:
        """Folder of the results of `rem-atari evaluate`, ``step-00000042`` for each checkpoint."""
        return self.path / "evaluation"

    @property
    def blind(self) -> Path:
        """What `rem-atari blind` found out about policies that see nothing, JSON."""
        return self.path / "blind.json"

    @property
    def media(self) -> Path:
        """Folder of pictures and films."""
        return self.path / "media"

    def read_config(self) -> SavedConfig:
        """The run's configuration, and whether it is as the run wrote it.

        Raises:
            UsageError: it cannot be read, or it isn't one.
        """
        return read_config(self.config, self.checkpoints)

    def load_config(self) -> Config:
        """The run's configuration, with a warning if it is not as the run wrote it.

        Raises:
            UsageError: it cannot be read, or it isn't one.
        """
        saved = self.read_config()
        if saved.note is not None:
            warnings.warn(f"{self.path}: {saved.note}", RunWarning, stacklevel=2)
        return saved.config


def default_run_path(config: Config, environment: str, now: datetime) -> Path:
    """``runs/<env>-<preset>-<seed>-<time>``, the folder of a run that names none."""
    safe_name = re.sub(r"[^A-Za-z0-9._]+", "_", environment)
    return Path("runs") / f"{safe_name}-{config.preset}-{config.seed}-{now:%Y%m%d-%H%M%S}"


def make_new_folder(path: Path) -> Path:
    """Make a new folder: `path`, with a number appended if it exists already.

    Raises:
        UsageError: it cannot be made.
        RunError: there is no room on the disk.
    """
    for number in itertools.count(1):
        numbered = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            numbered.parent.mkdir(parents=True, exist_ok=True)
            numbered.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise _explain(error, f"cannot create the run folder {numbered}") from error
        return numbered
    raise AssertionError("there are always more numbers")


@contextmanager
def hold_run_folder(path: Path) -> Iterator[None]:
    """Keep every other process from writing into a run's folder, which is made if it is not there.

    The operating system releases the lock when this process ends, for any reason.

    Raises:
        UsageError: another process holds it, the message says which and since when; or it cannot be made.
        RunError: there is no room on the disk.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    except OSError as error:
        raise _explain(error, f"cannot create or lock the run folder {path}") from error
    try:
        yield
    finally:
        # A folder that did not become a run's is left unchanged.
        if not os.path.lexists(RunFolder(path).config):
            (path / LOCK_FILE).unlink(missing_ok=True)
        os.close(descriptor)


def create_run_folder(path: Path, config: Config) -> RunFolder:
    """Make the folder of a new run and save the resolved configuration in it.

    Raises:
        UsageError: the path is taken by a file or a folder that is not empty, or cannot be written.
        RunError: there is no room on the disk.
    """
    run = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(entry.name != LOCK_FILE for entry in path.iterdir()):
            raise UsageError(f"the run folder {path} exists and is not empty; name another with --run")
        write_config(run.config, config)
    except OSError as error:
        raise _explain(error, f"cannot create the run folder {path}") from error
    return run


def _explain(error: OSError, failed: str) -> RunError:
    """The error to raise: the user can change a folder that cannot be made; a full disk is not wrong use."""
    if error.errno == errno.ENOSPC:
        return RunError(describe_os_error(error))
    return UsageError(f"{failed}: {error.strerror or error}")


def is_run_folder(path: Path) -> bool:
    """Whether a run was begun in the folder."""
    run = RunFolder(path)
    return run.config.is_file() or read_config_copy(run.checkpoints) is not None


def open_run_folder(path: Path) -> RunFolder:
    """The folder of a run that was started before.

    The folder itself may be a link, but nothing in it that a run writes to, so that an untrusted folder
    cannot redirect writes.

    Raises:
        UsageError: there is no run in it, it is a checkpoint, or it holds links.
    """
    run = RunFolder(path)
    if (path / MANIFEST_FILE).is_file():
        # It has a copy of the run's configuration, but nothing else of the run.
        raise UsageError(f"{os.fspath(path)} is a checkpoint; name the folder of its run")
    if not is_run_folder(path):
        raise UsageError(f"{os.fspath(path)} is not a run folder: it has no {run.config.name}")
    return without_links(run)


def without_links(run: RunFolder) -> RunFolder:
    """The folder, in which nothing that commands write to is a link.

    Raises:
        UsageError: there is one.
    """
    for part in (
        run.config,
        run.metrics,
        run.sessions,
        run.tensorboard,
        run.checkpoints,
        run.replay,
        run.heldout,
        run.evaluation,
        run.blind,
        run.media,
    ):
        if part.is_symlink():
            raise UsageError(f"{part} is a link; a run folder holds its files itself")
    return run


def _lock(path: Path) -> int:
    """Lock a folder's lock file and record the holder; the lock lasts until the descriptor is closed.

    Raises:
        UsageError: another process holds it.
        OSError: it cannot be opened or locked.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path / LOCK_FILE, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path / LOCK_FILE):
                os.close(descriptor)  # its last holder has just deleted it: lock the new one
                continue
            os.ftruncate(descriptor, 0)
            holder = {"pid": os.getpid(), "since": datetime.now().isoformat(" ", "seconds")}
            os.write(descriptor, json.dumps(holder).encode())
        except BlockingIOError as error:
            in_use_by = _describe_holder(os.read(descriptor, MOST_LOCK_BYTES))
            os.close(descriptor)
            raise UsageError(
                f"the run folder {path} is in use by {in_use_by}; stop it or wait until it is done"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _describe_holder(written: bytes) -> str:
    """The holder of a folder's lock, according to its file."""
    try:
        holder = json.loads(written)
        return f"process {int(holder['pid'])} since {datetime.fromisoformat(holder['since'])}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"

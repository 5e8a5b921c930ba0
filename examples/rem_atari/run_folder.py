"""The folder of a run: where each of its files lies, how it is created and opened again."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rem_atari.config import Config
from rem_atari.durable import replace_file
from rem_atari.errors import UsageError


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
        """One JSON object a line: what each phase of each epoch measured."""
        return self.path / "metrics.jsonl"

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

    def load_config(self) -> Config:
        """The run's configuration.

        Raises:
            UsageError: it cannot be read, or it isn't one.
        """
        try:
            return Config.from_dict(json.loads(self.config.read_bytes()))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.config} is not the configuration of a run: {error}") from error


def default_run_path(config: Config, environment: str, now: datetime) -> Path:
    """``runs/<env>-<preset>-<seed>-<time>``, the folder of a run that names none."""
    safe_name = re.sub(r"[^A-Za-z0-9._]+", "_", environment)
    return Path("runs") / f"{safe_name}-{config.preset}-{config.seed}-{now:%Y%m%d-%H%M%S}"


def create_run_folder(path: Path, config: Config) -> RunFolder:
    """Make the folder of a new run and save the resolved configuration in it.

    Raises:
        UsageError: the path is taken by a file or a folder that is not empty, or cannot be written.
    """
    run = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise UsageError(f"the run folder {path} exists and is not empty; name another with --run")
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        replace_file(run.config, text.encode())
    except OSError as error:
        raise UsageError(f"cannot create the run folder {path}: {error.strerror or error}") from error
    return run


def open_run_folder(path: Path) -> RunFolder:
    """The folder of a run that was started before.

    Raises:
        UsageError: there is no run in it.
    """
    run = RunFolder(path)
    if not run.config.is_file():
        raise UsageError(f"{os.fspath(path)} is not a run folder: it has no {run.config.name}")
    return run

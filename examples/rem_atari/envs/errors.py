"""Errors in making an environment; each message says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package of an extra, ``atari`` or ``minatar``, is not installed."""


class UnknownGameError(ValueError):
    """No game or gymnasium environment has the given name."""


PACKAGES = {"atari": ("ale_py", "gymnasium", "numpy", "PIL"), "minatar": ("minatar",)}
"""The packages of each extra that the environments import."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a failed import inside the block into a MissingExtraError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES[extra]:
            raise  # a fault of this package, which no installation would repair
        raise MissingExtraError(
            f"The environments need the package {error.name}, which is not installed: "
            f"pip install 'retpop[{extra}]'"
        ) from error

"""What can go wrong on the way to an environment, said so that the reader knows what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package of the extra ``atari`` is not installed."""


class UnknownGameError(ValueError):
    """No game, or no gymnasium environment, goes by the name that was given."""


@contextmanager
def needs_atari_extra() -> Iterator[None]:
    """Turn a failed import inside the block into a MissingExtraError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"The environments need the package {error.name or 'gymnasium'}, which is not installed: "
            "pip install 'retpop[atari]'"
        ) from error

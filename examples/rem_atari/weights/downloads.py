"""Downloads: each file is checked by its known sha256, and an interrupted download continues."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from rem_atari.errors import RunError

CHUNK = 1 << 18
"""Bytes read at once."""

TIMEOUT = 30.0
"""Seconds to wait for a server's answer."""


class DownloadError(RunError):
    """A file could not be fetched; the message says which and why."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the network.

    Attributes:
        url: where, http or https; a user and a password in it are sent to its host and not shown.
        sha256: its digest in hexadecimal digits, or the first of them.
        most_bytes: size limit in bytes.
    """

    url: str
    sha256: str
    most_bytes: int

    @property
    def name(self) -> str:
        """The file's name, the last part of its address."""
        return Path(urllib.parse.urlsplit(self.url).path).name


@dataclass(frozen=True)
class Network:
    """How to reach the network.

    Attributes:
        certificates: file with the certificates to trust; None: the system's.
        proxy: address of a proxy; None: as the environment says (http_proxy, https_proxy, no_proxy).
    """

    certificates: str | None = None
    proxy: str | None = None

    def open(self, url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        """Ask for a page or file, answered with a status in the 200s.

        Raises:
            DownloadError: it cannot be fetched.
        """
        request = _request(url, headers or {})
        with explained(url):
            context = ssl.create_default_context(cafile=self.certificates)
            handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
            if self.proxy is not None:
                handlers.append(urllib.request.ProxyHandler({"http": self.proxy, "https": self.proxy}))
            return urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT)


def fetch(remote: RemoteFile, folder: Path, network: Network, stream: TextIO) -> Path:
    """Fetch a file into a folder unless it is there already; it gets its name only after a check.

    An interrupted download continues where it stopped if the server allows, else it starts again.

    Args:
        remote: the file.
        folder: an existing folder for it.
        network: how to reach it.
        stream: where progress is shown.

    Raises:
        DownloadError: the file cannot be fetched, is too large, or has another digest.
        OSError: it cannot be written.
    """
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    if path.exists() and sha256_of(path).startswith(remote.sha256):
        return path
    if not (part.exists() and sha256_of(part).startswith(remote.sha256)):
        _transfer(remote, part, network, stream)
    digest = sha256_of(part)
    if not digest.startswith(remote.sha256):
        part.unlink()
        raise DownloadError(
            f"{shown(remote.url)} is not the file that was wanted: its sha256 is {digest}, wanted"
            f" {remote.sha256}; it was deleted"
        )
    part.replace(path)
    return path


def sha256_of(path: Path) -> str:
    """A file's sha256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(url: str) -> str:
    """An address without user and password, for messages."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn a network error inside into a DownloadError that names the address."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{shown(url)} cannot be fetched: HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise DownloadError(f"{shown(url)} cannot be reached: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise DownloadError(f"{shown(url)} cannot be fetched: {reason}") from error


def _request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise DownloadError(f"{shown(url)} cannot be fetched: only http and https are")
    request = urllib.request.Request(shown(url), headers=headers)
    if parts.username is not None:
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        token = base64.b64encode(user.encode()).decode("ascii")
        # Unredirected: the password does not go to another host after a redirection.
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _transfer(remote: RemoteFile, part: Path, network: Network, stream: TextIO) -> None:
    """Fetch the bytes that `part` lacks."""
    done = part.stat().st_size if part.exists() else 0
    response, done = _open_at(remote, done, network)
    with response:
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else None
        if max(total or 0, done) > remote.most_bytes:
            raise DownloadError(
                f"{shown(remote.url)} has {total:,} bytes, wanted {remote.most_bytes:,} at most"
            )
        with part.open("ab" if done else "wb") as file, _progress(remote.name, done, total, stream) as show:
            while chunk := _read(response, remote.url):
                done += len(chunk)
                if done > remote.most_bytes:
                    raise DownloadError(f"{shown(remote.url)} has more than {remote.most_bytes:,} bytes")
                file.write(chunk)
                show(done)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise DownloadError(
            f"{shown(remote.url)} broke off after {done:,} of {total:,} bytes; the same command goes on there"
        )


def _open_at(remote: RemoteFile, done: int, network: Network) -> tuple[http.client.HTTPResponse, int]:
    """The file from byte `done` on, or from its start if the server cannot resume."""
    if done > 0:
        try:
            response = network.open(remote.url, {"Range": f"bytes={done}-"})
        except DownloadError as error:
            # 416: there are no bytes after that, so our part is not the beginning of this file.
            if getattr(error.__cause__, "code", None) != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        else:
            goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
            return response, done if response.status == http.HTTPStatus.PARTIAL_CONTENT and goes_on else 0
    return network.open(remote.url), 0


def _read(response: http.client.HTTPResponse, url: str) -> bytes:
    with explained(url):
        return response.read(CHUNK)


@contextmanager
def _progress(name: str, done: int, total: int | None, stream: TextIO) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, elsewhere a line for each tenth; yields what to tell the bytes that are there."""
    if stream.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(file=stream)) as bar:
            task = bar.add_task(name, completed=done, total=total)
            yield lambda count: bar.update(task, completed=count)
        return
    tenths = 10 * done // total if total else 0
    size = "size unknown" if total is None else f"{total / 1e6:,.1f} MB"
    print(f"{name}: {size}", file=stream, flush=True)

    def show(count: int) -> None:
        nonlocal tenths
        if total and 10 * count // total > tenths:
            tenths = 10 * count // total
            print(f"{name}: {10 * tenths}%", file=stream, flush=True)

    yield show

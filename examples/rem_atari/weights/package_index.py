"""Where a Python package index keeps a file; pip's own configuration says which index.

pip itself is not asked to download: for a source package it would run the package's setup.py.
"""

from __future__ import annotations

import ast
import html.parser
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from urllib.parse import quote, urljoin, urlsplit

from rem_atari.weights.downloads import DownloadError, Network, explained, shown

DEFAULT_INDEX = "https://pypi.org/simple"

PAGE_TYPES = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"

MOST_PAGE_BYTES = 10_000_000

SECTIONS = ("global", "download", ":env:")
"""Of pip's configuration, a later one over an earlier."""


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
        file_names: names by which the file goes.
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
        """Note where a link leads."""
        if tag == "a":
            self.links += [target for name, target in attrs if name == "href" and target]


def _with_user_of(page: str, url: str) -> str:
    """`url` with the user and password of `page`, if it is on the same host and has none of its own."""
    there, here = urlsplit(url), urlsplit(page)
    same_host = (there.scheme, there.hostname, there.port) == (here.scheme, here.hostname, here.port)
    if there.username is None and here.username is not None and same_host:
        return there._replace(netloc=here.netloc).geturl()
    return url

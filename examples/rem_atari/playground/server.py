"""The server of the page: fixed files, and one WebSocket per tab. Pages of other origins get no answer."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import count
from typing import Any, TypeVar

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from rem_atari.errors import RunError, UsageError
from rem_atari.films.pictures import data_uri
from rem_atari.inference.agent import LoadedAgent
from rem_atari.playground.film import make_film
from rem_atari.playground.games import LiveGame, Recorded
from rem_atari.playground.protocol import (
    FilmRequest,
    FramesRequest,
    LookRequest,
    StartAtRequest,
    StartRequest,
    StepRequest,
    describe,
    parse_request,
)
from rem_atari.playground.session import MOST_MOMENTS, RequestError, Session

T = TypeVar("T")

MOST_TABS = 8
"""Tabs that play at the same time; each has a game of its own."""

MOST_REQUEST_BYTES = 4_096

USUAL_PORT = 8420

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Media types of the page's files."""

HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

INTERNAL_ERROR, TRY_LATER = 1011, 1013
"""Codes with which a WebSocket is closed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The data that all tabs share.

    Attributes:
        agent: the agent.
        recorded: recorded frames to start from, or None.
        open_game: makes the game of a tab from a seed.
        about: JSON data that the page gets once.
        fps: moments a second of a film.
    """

    agent: LoadedAgent
    recorded: Recorded | None
    open_game: Callable[[int], LiveGame]
    about: dict[str, Any]
    fps: float


class Tabs:
    """The WebSocket endpoint: a session for each tab, whose requests are answered one after another.

    Args:
        stage: the data that all tabs share.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._open = 0
        self._seeds = count()
        # One computation at a time: torch uses all cores, so the tabs take turns.
        self._turn = anyio.CapacityLimiter(1)

    async def play(self, tab: WebSocket) -> None:
        """Serve a tab until it is closed."""
        await tab.accept()
        if self._open >= MOST_TABS:
            await self._refuse(tab, f"{MOST_TABS} tabs are playing already; close one", TRY_LATER)
            return
        self._open += 1
        try:
            await self._serve(tab)
        except WebSocketDisconnect:
            pass
        finally:
            self._open -= 1

    async def _serve(self, tab: WebSocket) -> None:
        seed, stage = next(self._seeds), self._stage
        live: LiveGame | None = None
        try:
            live = await self._compute(partial(stage.open_game, seed))
            session = Session(stage.agent, live, stage.recorded, seed)
            await tab.send_json({"about": stage.about | {"most_moments": MOST_MOMENTS}})
            while True:
                await self._answer(tab, session, await _receive(tab))
        except RunError as error:
            await self._refuse(tab, str(error), INTERNAL_ERROR)
        finally:
            if live is not None:
                with anyio.CancelScope(shield=True):
                    await self._compute(live.close)

    async def _answer(self, tab: WebSocket, session: Session, text: str) -> None:
        try:
            request = parse_request(text)
            if isinstance(request, FilmRequest):
                # Outside the queue: it takes seconds and runs no network.
                path = session.path(request.at)
                draw = partial(
                    make_film, path, self._stage.agent.action_names, request.format, self._stage.fps
                )
                film = await anyio.to_thread.run_sync(draw)
                await tab.send_json({"film": f"{self._stage.about['game']}.{request.format}"})
                await tab.send_bytes(film)
            else:
                await tab.send_json(await self._compute(partial(self._respond, session, request)))
        except RequestError as error:
            await tab.send_json({"error": str(error)})

    def _respond(self, session: Session, request: Any) -> dict[str, Any]:
        match request:
            case StartRequest():
                moment = session.start()
            case StartAtRequest():
                moment = session.start_at(request.index)
            case LookRequest():
                moment = session.look(request.at)
            case StepRequest():
                moment = session.step(request.at, request.action, likely=request.likely, anew=request.anew)
            case FramesRequest():
                recorded = self._stage.recorded
                frames = [] if recorded is None else recorded.frames(request.first, request.count)
                return {"frames": [data_uri(frame) for frame in frames]}
        return describe(moment, session.oldest, self._stage.agent.config.evaluation.temperature)

    async def _compute(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._turn)

    async def _refuse(self, tab: WebSocket, why: str, code: int) -> None:
        await tab.send_json({"error": why})
        await tab.close(code)


async def _receive(tab: WebSocket) -> str:
    """The next message of a tab; a message that is not text is an empty request."""
    message = await tab.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    return message.get("text") or ""


class OwnPagesOnly:
    """Refuses requests of pages of other sites, even if a site's own name points to this machine.

    A browser sends the name in the address as `Host`, and the site that asks as `Origin`. Names that no other
    party can own are served: numeric addresses, localhost, and the name that the user gave.

    Args:
        app: the guarded application.
        name: a further name of this machine.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        allowed = self._is_ours(host)
        if scope["type"] == "websocket":
            allowed = allowed and headers.get("origin") == f"http://{host}"
        if allowed:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            refusal = PlainTextResponse("This page is served to its own address only.\n", status_code=403)
            await refusal(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        return name in ("localhost", self._name) or _is_address(name.strip("[]"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def make_app(stage: Stage, name: str = "localhost") -> Starlette:
    """The page and its WebSocket; `name` is a name of this machine that the user gave."""
    page = files("rem_atari.playground") / "site"
    contents = {file.name: file.read_bytes() for file in page.iterdir()}
    routes = [
        Route("/" if file == "index.html" else f"/{file}", _serve_file(file, contents[file]))
        for file in contents
    ]
    return Starlette(
        routes=[*routes, WebSocketRoute("/play", Tabs(stage).play)],
        middleware=[Middleware(OwnPagesOnly, name=name)],
    )


def _serve_file(name: str, content: bytes) -> Route:
    """One of the page's own files; no path of a request is ever looked up on the disk."""
    media_type = TYPES[name[name.rindex(".") :]]

    async def serve(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return Route("/" if name == "index.html" else f"/{name}", serve)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens for the page.

    Args:
        host: name or address to listen at.
        port: 0: any free one; None: the usual one, or any other where that is taken.

    Raises:
        UsageError: the port is taken, or the host is none of this machine's.
    """
    wanted = (USUAL_PORT, 0) if port is None else (port,)
    for number in wanted:
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, number), family=family, backlog=64)
        except OSError as error:
            if number == wanted[-1]:
                reason = error.strerror or str(error)
                raise UsageError(f"cannot listen at {host}, port {number}: {reason}; try --port 0") from error
    raise AssertionError("the last port listens or raises")


def address_of(listening: socket.socket, host: str) -> str:
    """The page's address for a browser on this machine."""
    port = listening.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/"


def make_server(stage: Stage, host: str) -> uvicorn.Server:
    """The server of the page; its `run(sockets=[...])`, with the socket of `listen`, lasts until a signal.

    Browsers that come before it runs wait.

    Args:
        stage: the agent and its games.
        host: name or address that it listens at.
    """
    config = uvicorn.Config(
        make_app(stage, host),
        log_level="warning",
        lifespan="off",
        ws_max_size=MOST_REQUEST_BYTES,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


@contextmanager
def served(stage: Stage) -> Iterator[str]:
    """Serve the page to this machine from a thread, at any free port; gives the page's address."""
    host = "127.0.0.1"
    with listen(host, 0) as listening:
        server = make_server(stage, host)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield address_of(listening, host)
        finally:
            server.should_exit = True
            thread.join()

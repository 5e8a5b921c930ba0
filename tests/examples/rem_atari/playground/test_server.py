"""The server answers its own page, says what is wrong with a request, and serves no other site."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from play_stages import make_test_stage
from run_folders import make_run
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from rem_atari.cli import main
from rem_atari.commands import play as play_command
from rem_atari.errors import EnvironmentDiedError, UsageError
from rem_atari.playground import server
from rem_atari.playground.games import LiveGame
from rem_atari.playground.server import Stage, address_of, listen, make_app, served

HERE = "http://127.0.0.1:8420"

BAD_REQUESTS = [
    ("", "a request is a JSON object"),
    ("{", "a request is a JSON object"),
    ("[" * 4_000, "a request is a JSON object"),
    ("[1]", "a request is a JSON object"),
    ('{"do": 3}', "a request is a JSON object"),
    ('{"do": "exec"}', "do is none of start, "),
    ('{"do": "start", "path": "/etc/passwd"}', "this request has the fields do, all of them"),
    ('{"do": "step", "at": 0}', "the fields do, action, anew, at, likely"),
    ('{"do": "step", "at": -1, "action": 0, "likely": true, "anew": false}', "at is no whole number"),
    ('{"do": "step", "at": 0, "action": 1.5, "likely": true, "anew": false}', "action is no whole number"),
    ('{"do": "step", "at": 0, "action": true, "likely": true, "anew": false}', "action is no whole number"),
    ('{"do": "step", "at": 0, "action": "me", "likely": true, "anew": false}', "wanted a number, 'game'"),
    ('{"do": "step", "at": 0, "action": 0, "likely": 1, "anew": false}', "likely and anew are true or false"),
    ('{"do": "step", "at": 0, "action": 9, "likely": true, "anew": false}', "action is 9; wanted 0 to 2"),
    ('{"do": "step", "at": 9, "action": 0, "likely": true, "anew": false}', "there is no moment 9"),
    ('{"do": "look", "at": NaN}', "at is no whole number"),
    ('{"do": "look", "at": 1e400}', "at is no whole number"),
    ('{"do": "look", "at": ' + "9" * 400 + "}", "at is no whole number"),
    ('{"do": "start_at", "index": 60}', "the recorded frames are 0 to 59"),
    ('{"do": "frames", "first": 0, "count": 10000}', "count is no whole number from 0 to 64"),
    ('{"do": "film", "at": 0, "format": "../x"}', "format is neither 'gif' nor 'mp4'"),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_test_stage(tmp_path_factory.mktemp("play") / "run")


@pytest.fixture
def client(stage: Stage) -> Iterator[TestClient]:
    with browser_of(stage) as client:
        yield client


def browser_of(stage: Stage, name: str = "localhost") -> TestClient:
    """A client to be entered: all of its tabs are then served by one event loop, as those of a server are."""
    return TestClient(make_app(stage, name), base_url=HERE)


@contextmanager
def open_tab(client: TestClient, origin: str = HERE) -> Iterator[WebSocketTestSession]:
    with client.websocket_connect("ws://127.0.0.1:8420/play", headers={"origin": origin}) as tab:
        yield tab


def ask(tab: WebSocketTestSession, **request: Any) -> dict[str, Any]:
    tab.send_json(request)
    return tab.receive_json()


def step(tab: WebSocketTestSession, at: int, action: int | str) -> dict[str, Any]:
    return ask(tab, do="step", at=at, action=action, likely=False, anew=False)


def test_a_tab_is_told_the_game_and_plays_it(client: TestClient) -> None:
    with open_tab(client) as tab:
        about = tab.receive_json()["about"]
        assert (about["game"], about["actions"]) == ("Catch", ["left", "stay", "right"])
        assert about["recorded"] == 60
        start = ask(tab, do="start")["moment"]
        assert (start["parent"], start["step"], start["action"]) == (None, 0, None)
        assert start["game"]["frame"] == start["dream"]["frame"]
        answer = step(tab, start["number"], 2)
        moment, dream = answer["moment"], answer["moment"]["dream"]
        assert (moment["parent"], moment["step"], moment["action"]) == (start["number"], 1, 2)
        assert dream["frame"].startswith("data:image/png;base64,")
        assert len(dream["tokens"]) == 9
        for chances in (moment["game"]["policy"], dream["policy"], dream["reward_chances"]):
            assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert dream["end_chance"] == 0
        assert answer["oldest"] == 0
        assert step(tab, moment["number"], "dream")["moment"]["step"] == 2
        assert len(ask(tab, do="frames", first=50, count=30)["frames"]) == 10
        assert ask(tab, do="start_at", index=3)["moment"]["dream"]["steps"] == 0


@pytest.mark.parametrize("format", ["gif", "mp4"])
def test_what_was_played_comes_as_a_film(client: TestClient, format: str) -> None:
    with open_tab(client) as tab:
        tab.receive_json()
        at = ask(tab, do="start")["moment"]["number"]
        for action in (0, 1, 2):
            at = step(tab, at, action)["moment"]["number"]
        assert ask(tab, do="film", at=at, format=format) == {"film": f"Catch.{format}"}
        film = tab.receive_bytes()
    if format == "gif":
        assert Image.open(io.BytesIO(film)).n_frames == 4
    else:
        assert film[4:8] == b"ftyp"


def test_what_is_no_request_is_told_and_the_tab_plays_on(client: TestClient) -> None:
    with open_tab(client) as tab:
        tab.receive_json()
        at = ask(tab, do="start")["moment"]["number"]
        for text, told in BAD_REQUESTS:
            tab.send_text(text)
            assert told in tab.receive_json()["error"], text[:60]
        tab.send_bytes(b"\x00\xff")
        assert "a request is a JSON object" in tab.receive_json()["error"]
        assert step(tab, at, 1)["moment"]["step"] == 1


def test_each_tab_has_a_game_of_its_own(client: TestClient) -> None:
    with open_tab(client) as one, open_tab(client) as other:
        starts = [(tab.receive_json(), ask(tab, do="start"))[1]["moment"] for tab in (one, other)]
        assert [start["number"] for start in starts] == [0, 0]
        assert step(one, 0, 0)["moment"]["number"] == 1
        assert "there is no moment 1" in step(other, 1, 0)["error"]
        assert starts[0]["game"]["frame"] != starts[1]["game"]["frame"]


def test_a_closed_tab_closes_its_game_and_makes_room(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[LiveGame] = []
    monkeypatch.setattr(server, "MOST_TABS", 1)
    monkeypatch.setattr(LiveGame, "close", lambda game: closed.append(game))
    with browser_of(stage) as client:
        for number in range(2):
            with open_tab(client) as tab:
                assert "about" in tab.receive_json()
                assert len(closed) == number
                with open_tab(client) as second:
                    assert second.receive_json()["error"] == "1 tabs are playing already; close one"
                    with pytest.raises(WebSocketDisconnect) as refused:
                        second.receive_json()
                    assert refused.value.code == 1013
    assert len(closed) == 2


def test_a_game_that_dies_is_told(stage: Stage) -> None:
    def die(seed: int) -> LiveGame:
        raise EnvironmentDiedError("environment 0 died: it raised ValueError")

    with browser_of(replace(stage, open_game=die)) as client, open_tab(client) as tab:
        assert tab.receive_json() == {"error": "environment 0 died: it raised ValueError"}
        with pytest.raises(WebSocketDisconnect):
            tab.receive_json()


def test_a_rude_tab_disturbs_nobody(stage: Stage) -> None:
    """One sends far too much at once, one sends on without reading and leaves; a third one plays."""
    with served(stage) as address:
        place = {"uri": address.replace("http", "ws") + "play", "origin": address.rstrip("/")}
        with connect(**place) as huge:
            assert "about" in json.loads(huge.recv())
            huge.send("x" * 5_000)
            with pytest.raises(ConnectionClosed) as closed:
                huge.recv()
        assert closed.value.rcvd.code == 1009
        with connect(**place) as hasty:
            for _ in range(500):
                hasty.send('{"do": "start"}')
        with connect(**place) as polite:
            assert "about" in json.loads(polite.recv())
            polite.send('{"do": "start"}')
            assert json.loads(polite.recv())["moment"]["step"] == 0


def test_the_page_is_whole_and_asks_nobody_else(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name, kind in (("app.js", "javascript"), ("style.css", "css"), ("icon.svg", "svg")):
        file = client.get(f"/{name}")
        assert file.status_code == 200
        assert kind in file.headers["content-type"]
        assert "http://" not in file.text.replace("http://www.w3.org", "")
        assert "https://" not in file.text
    assert "http" not in page.text


@pytest.mark.parametrize(
    "path", ["/server.py", "/../server.py", "/%2e%2e/server.py", "//etc/passwd", "/site/app.js"]
)
def test_no_other_file_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("127.0.0.1:8420", True),
        ("localhost:8420", True),
        ("[::1]:8420", True),
        ("192.168.1.7", True),
        ("workstation:8420", True),
        ("evil.example", False),
        ("evil.example:8420", False),
        ("127.0.0.1.evil.example:8420", False),
        ("", False),
    ],
)
def test_only_addresses_and_our_own_name_are_served(stage: Stage, host: str, served: bool) -> None:
    """A name of somebody else's can be made to point here, and its page would then be of our origin."""
    answer = browser_of(stage, "workstation").get("/", headers={"host": host})
    assert answer.status_code == (200 if served else 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9", "null", ""])
def test_a_page_of_another_site_cannot_play(client: TestClient, origin: str) -> None:
    with pytest.raises(WebSocketDisconnect), open_tab(client, origin):
        pass


def test_a_taken_port_is_told_and_the_usual_one_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen("127.0.0.1", 0) as first:
        taken = first.getsockname()[1]
        with pytest.raises(UsageError, match=f"127.0.0.1, port {taken}: .*in use.*try --port 0"):
            listen("127.0.0.1", taken)
        monkeypatch.setattr(server, "USUAL_PORT", taken)
        with listen("127.0.0.1", None) as second:
            assert second.getsockname()[1] != taken
            assert address_of(second, "127.0.0.1") == f"http://127.0.0.1:{second.getsockname()[1]}/"


def test_a_host_of_another_machine_is_told() -> None:
    with pytest.raises(UsageError, match=r"cannot listen at 203\.0\.113\.1, port 0"):
        listen("203.0.113.1", 0)


def test_the_command_serves_until_it_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    served: list[socket.socket] = []

    class StoppedServer:
        def run(self, sockets: list[socket.socket]) -> None:
            served.extend(sockets)
            raise KeyboardInterrupt("SIGINT")

    opened: list[str] = []
    monkeypatch.setattr(play_command, "make_server", lambda stage, host: StoppedServer())
    monkeypatch.setattr(play_command, "_open_page", opened.append)
    assert main(["play", str(run.path), "--port", "0", "--no-browser"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("play at http://127.0.0.1:")
    assert said.out.endswith("ended\n")
    assert "no recorded frames to start from" in said.err
    assert served[0].fileno() == -1, "the socket is closed"
    assert opened == []
    assert main(["play", str(run.path), "--host", "0.0.0.0"]) == 0
    assert "other machines can reach this page" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--seed", "-1"), "--seed is -1"),
        (("--port", "70000"), "--port is 70000, wanted 0 to 65535"),
        (("--host", "203.0.113.1", "--port", "0"), "cannot listen at 203.0.113.1"),
    ],
)
def test_wrong_use_of_the_command_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    run = make_run(tmp_path / "run")
    assert main(["play", str(run.path), "--no-browser", *words]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]

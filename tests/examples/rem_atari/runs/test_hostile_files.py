"""Files from somebody else: nothing in them is executed, followed or believed before it is checked."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from saved_runs import SHAPE, SavedRun, assert_is_step, entries_of

import rem_atari
from rem_atari.cli import main
from rem_atari.errors import RunWarning, UsageError
from rem_atari.replay.buffer import Replay
from rem_atari.replay.recovery import recover_shards
from rem_atari.replay.shards import ReplayCorruptError, ShardEntry
from rem_atari.runs.checkpoint import (
    CONTENT_FILES,
    MANIFEST_FILE,
    MOST_BYTES,
    MOST_TENSOR_BYTES,
    REPLAY_FOLDER,
    STATE_FILE,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
)
from rem_atari.runs.folder import LOCK_FILE, hold_run_folder, open_run_folder

TENSOR_FILES = tuple(name for name in CONTENT_FILES if name.endswith(".safetensors"))


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


@contextmanager
def little_memory(more: int = 2**30) -> Iterator[None]:
    """No more memory than a gibibyte above what is in use: whoever believes a size of 2^60 fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The only checkpoint of a run."""
    run = SavedRun(tmp_path / "run")
    run.save_next()
    return tmp_path / "run" / "checkpoints" / "step-00000000"


def forge(checkpoint: Path, name: str, data: bytes) -> None:
    """Replace a file and make the manifest fit: digests are no protection from those who can compute them."""
    (checkpoint / name).unlink()
    (checkpoint / name).write_bytes(data)
    vouch_for(checkpoint, name, len(data), hashlib.sha256(data).hexdigest())


def vouch_for(checkpoint: Path, name: str, size: int, digest: str) -> None:
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
    manifest["files"][name] = {"bytes": size, "sha256": digest}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))


def header(length: int, content: dict[str, Any] | bytes = b"", data: bytes = b"") -> bytes:
    """A safetensors file of any header and data."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", length or len(text)) + text + data


def tensor(shape: list[int], offsets: list[int], kind: str = "F32") -> dict[str, Any]:
    return {"weight": {"dtype": kind, "shape": shape, "data_offsets": offsets}}


HOSTILE_TENSORS = {
    "a header of 2^60 bytes": header(2**60, b"{}"),
    "a header of 2^63 bytes": header(2**63, b"{}"),
    "a tensor of 2^60 bytes": header(0, tensor([2**58], [0, 2**60]), bytes(16)),
    "a shape that overflows": header(0, tensor([2**32, 2**32, 2**32], [0, 0]), b""),
    "a shape of 2^60 without data": header(0, tensor([2**60], [0, 16]), bytes(16)),
    "offsets that run backwards": header(0, tensor([4], [16, 0]), bytes(16)),
    "offsets below zero": header(0, tensor([4], [-16, 0]), bytes(16)),
    "an unknown type": header(0, tensor([4], [0, 16], "PICKLE"), bytes(16)),
    "a deep header": header(0, b'{"weight":' + b"[" * 50_000),
    "nothing": b"",
}


@pytest.mark.parametrize("content", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS)
def test_tensors_that_are_none_are_refused_before_memory_is_taken(checkpoint: Path, content: bytes) -> None:
    for name in TENSOR_FILES:
        forge(checkpoint, name, content)
        with little_memory(), pytest.raises(CheckpointError, match="is damaged"):
            read_checkpoint(checkpoint, 0)


@pytest.mark.parametrize("name", [*CONTENT_FILES, MANIFEST_FILE])
def test_a_pickle_executes_nothing(checkpoint: Path, tmp_path: Path, name: str) -> None:
    for data in (pickle.dumps(Payload(tmp_path / "executed")), torch_file(tmp_path)):
        if name == MANIFEST_FILE:
            (checkpoint / name).write_bytes(data)
        else:
            forge(checkpoint, name, data)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_checkpoint(checkpoint, 0)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists(), "the payload itself does nothing"


def torch_file(folder: Path) -> bytes:
    """What torch.save would write, with a payload."""
    torch.save({"weight": Payload(folder / "executed")}, folder / "torch")
    return (folder / "torch").read_bytes()


@pytest.mark.parametrize("name", [*CONTENT_FILES, MANIFEST_FILE])
def test_a_file_that_claims_or_has_a_monstrous_size_is_not_read(checkpoint: Path, name: str) -> None:
    """Its bytes are on no disk: the file is one big hole."""
    most = MOST_BYTES.get(name, MOST_TENSOR_BYTES)
    os.truncate(checkpoint / name, most + 1)
    if name != MANIFEST_FILE:
        vouch_for(checkpoint, name, most + 1, "0" * 64)
    with little_memory(), pytest.raises(CheckpointError, match=rf"has {most + 1} bytes, at most {most}"):
        read_checkpoint(checkpoint, 0)
    if name != MANIFEST_FILE:
        os.truncate(checkpoint / name, 10)
        vouch_for(checkpoint, name, 2**60, "0" * 64)
        with little_memory(), pytest.raises(CheckpointError, match=r"has 10 bytes, its manifest says 11529"):
            read_checkpoint(checkpoint, 0)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "9" * 10_000, '{"files": 1}', '{"files": {"model.safetensors": []}}', "null", '"'],
    ids=["deep", "long", "number", "lists", "null", "cut"],
)
def test_json_that_is_a_trap_is_an_error(checkpoint: Path, text: str) -> None:
    whole = (checkpoint / MANIFEST_FILE).read_bytes()
    (checkpoint / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(checkpoint, 0)
    (checkpoint / MANIFEST_FILE).write_bytes(whole)
    if text[0] in '["9':
        forge(checkpoint, STATE_FILE, (text if text != "null" else "[").encode())
        with pytest.raises(CheckpointError, match="is damaged"):
            read_checkpoint(checkpoint, 0)


def test_a_manifest_names_no_other_files(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"")
    for name in ("../../../secret", str(tmp_path / "secret"), "replay/../../x"):
        vouch_for(checkpoint, name, 0, hashlib.sha256(b"").hexdigest())
    assert_is_step_without_entries(checkpoint)
    os.mkfifo(tmp_path / "fifo")
    vouch_for(checkpoint, "../../../fifo", 0, "")
    assert_is_step_without_entries(checkpoint)


def assert_is_step_without_entries(checkpoint: Path) -> None:
    assert_is_step(read_checkpoint(checkpoint, 0), 0)


@pytest.mark.parametrize("name", [*CONTENT_FILES, MANIFEST_FILE])
def test_links_and_pipes_are_not_opened(checkpoint: Path, tmp_path: Path, name: str) -> None:
    shutil.move(checkpoint / name, tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name} is no plain file"):
        read_checkpoint(checkpoint, 0)
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)  # to read it would wait for ever
    with pytest.raises(CheckpointError, match=f"{name} is no plain file"):
        read_checkpoint(checkpoint, 0)


@pytest.mark.parametrize(
    "name",
    ["step-00000009\n", "step-٠٠٠٠٠٠٠٩", "step-9", "step-+0000009", "step-00000009.bak", "xstep-00000009",
     "STEP-00000009", "step-0000000000000000009", " step-00000009"],
)  # fmt: skip
def test_names_are_matched_whole(checkpoint: Path, name: str) -> None:
    shutil.copytree(checkpoint, checkpoint.with_name(name))
    assert [step for step, _ in list_checkpoints(checkpoint.parent)] == [0]


def test_nothing_is_deleted_or_written_through_a_link_in_the_way(checkpoint: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    for name in (".writing-step-00000001", ".deleting-step-00000000", "step-00000007"):
        (checkpoint.parent / name).symlink_to(victim)
    (checkpoint.parents[1] / "replay" / ".shard-00000001.safetensors.writing").symlink_to(victim / "file")
    run = SavedRun(checkpoint.parents[1])
    for _ in range(4):
        run.save_next()
    assert load_checkpoint(checkpoint.parent).step == 4
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert (victim / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../victim"},
        {"name": "/etc/passwd"},
        {"name": "shard-00000001.safetensors"},
        {"num_rows": 10**9},
        {"num_rows": -1},
        {"sha256": "0" * 63},
        {"sha256": "../" + "0" * 61},
    ],
    ids=str,
)
def test_entries_of_shards_lead_nowhere_else(
    tmp_path: Path, checkpoint: Path, change: dict[str, Any]
) -> None:
    (tmp_path / "victim").write_text("mine")
    good = entries_of(read_checkpoint(checkpoint, 0))[0]
    entry = ShardEntry(**{**vars(good), **change})
    replay = checkpoint.parents[1] / "replay"
    with pytest.raises(ValueError, match="shard 0"):
        recover_shards(replay, [entry], frame_shape=SHAPE, copies=checkpoint / REPLAY_FOLDER)
    assert (tmp_path / "victim").read_text() == "mine"
    assert Replay.load(replay).num_steps == good.num_rows


@pytest.mark.parametrize("content", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS)
def test_shards_that_are_none_are_refused_before_memory_is_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "shard-00000000.safetensors").write_bytes(content)
    with little_memory(), pytest.raises(ReplayCorruptError):
        Replay.load(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that could go on."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--preset", "debug", "--run", str(folder)]) == 0
    for _, earlier in list_checkpoints(folder / "checkpoints")[:-1]:
        shutil.rmtree(earlier)
    return folder


def resume(folder: Path) -> int:
    return main(["resume", str(folder), "--schedule.epochs", "3"])


HOSTILE_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "evaluation": lambda state: state | {"evaluation": {"games": [{"__class__": "os"}]}},
    "no object": lambda state: [],
    "nothing in it": lambda state: {},
    "epoch of text": lambda state: state | {"epoch": "1; rm -rf ~"},
    "unknown phase": lambda state: state | {"phase": "__import__('os')"},
    "shard elsewhere": lambda state: state | {"shards": [state["shards"][0] | {"name": "../config.json"}]},
    "shards of text": lambda state: state | {"shards": "shards"},
    "environments of text": lambda state: state | {"environments": "x" * 2},
    "environment of layers": lambda state: state | {"environments": [{"env": {"layers": 5}}] * 2},
    "more environments": lambda state: state | {"environments": state["environments"] * 50},
    "random numbers": lambda state: state | {"random": {"python": "__import__('os').system('x')"}},
    "collection": lambda state: state | {"collection": {"__class__": "os"}},
    "updates": lambda state: state | {"updates": None},
}


@pytest.mark.parametrize("change", HOSTILE_STATES.values(), ids=HOSTILE_STATES)
def test_a_state_that_makes_no_sense_ends_the_resumption_with_a_sentence(
    tmp_path: Path,
    trained: Path,
    change: Callable[[dict[str, Any]], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    checkpoint = list_checkpoints(folder / "checkpoints")[-1][1]
    state = change(json.loads((checkpoint / STATE_FILE).read_bytes()))
    forge(checkpoint, STATE_FILE, json.dumps(state).encode())
    shards = sorted(path.name for path in (folder / "replay").iterdir())
    assert resume(folder) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("rem-atari: ")
    assert "checkpoint" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert sorted(path.name for path in (folder / "replay").iterdir()) == shards
    assert open_run_folder(folder).load_config().preset == "debug"


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_tensors_of_other_names_and_shapes_end_the_resumption_with_a_sentence(
    tmp_path: Path, trained: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    checkpoint = list_checkpoints(folder / "checkpoints")[-1][1]
    for tensors in ({"odd": torch.zeros(3)}, {}):
        forge(checkpoint, name, safetensors.torch.save(tensors))
        assert resume(folder) == 1
        assert "checkpoint" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "tensorboard", "checkpoints", "replay", "media", "config.json"]
)
def test_a_run_folder_leads_nowhere_else(
    tmp_path: Path, trained: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    victim = tmp_path / "victim"
    shutil.move(folder / name, victim)
    (folder / name).symlink_to(victim)

    def content() -> dict[str, bytes]:
        files = [victim] if victim.is_file() else sorted(path for path in victim.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    before = content()
    assert resume(folder) == 2
    assert f"{folder / name} is a link" in capsys.readouterr().err
    assert content() == before


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(UsageError, match="cannot create or lock"), hold_run_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("text", ["[" * 100_000, "{}" + " " * 1_000_001, '{"preset": {"__class__": 1}}'])
def test_a_configuration_that_is_a_trap_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="is not the configuration of a run"):
        open_run_folder(tmp_path).load_config()


MAY_UNPICKLE = {"envs/process.py": "what its own other end has sent, over a socket that nobody else has"}
EXECUTORS = {"eval", "exec", "compile", "__import__", "system", "popen", "import_module"}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dangers(path: Path) -> Iterator[str]:
    """What in a module's code could execute data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in EXECUTORS:
                yield function.id
            elif isinstance(function, ast.Attribute):
                owner = getattr(function.value, "id", "")
                if owner in ("os", "builtins", "importlib") and function.attr in EXECUTORS:
                    yield f"{owner}.{function.attr}"
            words = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if words.get("shell") or words.get("allow_pickle"):
                yield "shell or allow_pickle"
            if (
                getattr(function, "attr", "") == "load"
                and ast.unparse(function) == "torch.load"
                and words.get("weights_only") is not True
            ):
                yield "torch.load"


def test_no_code_executes_data() -> None:
    root = Path(rem_atari.__file__).parent
    searched = {str(path.relative_to(root)): sorted(set(dangers(path))) for path in root.rglob("*.py")}
    found = {name: what for name, what in searched.items() if what}
    assert found.pop("envs/process.py") == ["pickle"], "the search itself finds nothing"
    # The module that env.wrapper names, as gymnasium imports that of env.id: the docs warn of both.
    assert found.pop("envs/gym_pixels.py") == ["import_module"]
    # The package's own modules, by names that it holds itself.
    assert found.pop("__init__.py") == ["import_module"]
    # LPIPS's published weights are a pickle: it is read by an unpickler that knows nothing but arrays.
    assert all(name.startswith("weights/") and set(what) == {"pickle"} for name, what in found.items()), found


def test_a_malicious_checkpoint_is_passed_over_for_a_whole_one(tmp_path: Path) -> None:
    run = SavedRun(tmp_path / "run")
    run.save_next()
    newest = run.checkpoints / "step-00000001"
    run.save_next()
    forge(newest, "model.safetensors", torch_file(tmp_path))
    with pytest.warns(RunWarning, match="step-00000001 is damaged"):
        assert_is_step(load_checkpoint(run.checkpoints), 0)
    assert not (tmp_path / "executed").exists()

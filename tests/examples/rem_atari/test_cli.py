"""The command line: what a stranger types, and what the answer and the exit code are."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.abc import MetaPathFinder
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

import rem_atari.report
from rem_atari import commands
from rem_atari.arguments import ReportArguments, TrainArguments
from rem_atari.cli import EXTRAS, HELP, main
from rem_atari.commands import listing
from rem_atari.commands import train as train_command_module
from rem_atari.config import Config, EnvConfig
from rem_atari.config.presets import PRESETS
from rem_atari.errors import StoppedError, UsageError
from rem_atari.parsing import parse_arguments
from rem_atari.runs.command_line import resume_command
from rem_atari.runs.folder import create_run_folder
from rem_atari.runs.session import train_command
from rem_atari.training import trainer

COMMANDS = (
    "blind",
    *("train", "resume", "evaluate", "record", "export", "play", "report", "diagnose", "retrain"),
    *("scores", "benchmark", "weights", "list"),
)

TRAINED_WITH = EXTRAS["atari"].keys() - {"numpy", "imageio_ffmpeg"}
"""Packages that training needs; of numpy nothing would be left, and films are made by other commands."""

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


def parse_train(*words: str) -> Config:
    arguments = parse_arguments(["train", *words])
    assert isinstance(arguments, TrainArguments)
    return arguments.config


def fails_with(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> str:
    """Run the command, check its exit code, and return the last line of stderr."""
    assert main(words) == code
    return capsys.readouterr().err.splitlines()[-1]


def test_the_default_preset_is_tiny() -> None:
    assert parse_train() == PRESETS["tiny"]


@pytest.mark.parametrize("words", [["--preset", "catch"], ["--preset=catch"]])
def test_a_preset_is_what_flags_start_from(words: list[str]) -> None:
    assert parse_train(*words) == PRESETS["catch"]
    config = parse_train("--controller.optim.lr", "0.5", *words, "--seed", "7")
    assert (config.controller.optim.lr, config.seed) == (0.5, 7)
    assert config.tokenizer == PRESETS["catch"].tokenizer


def test_every_kind_of_value_can_be_a_flag() -> None:
    config = parse_train(
        *("--tokenizer.channels", "4", "8"),
        *("--tokenizer.no-init-from-data", "--env.id", "rem_atari/Catch-v0"),
        *("--schedule.collect-max-seconds", "None", "--controller.td-lambda", "0.5"),
    )
    assert config.tokenizer.channels == (4, 8)
    assert config.tokenizer.init_from_data is False
    assert config.env.id == "rem_atari/Catch-v0"
    assert config.schedule.collect_max_seconds is None
    assert config.controller.td_lambda == 0.5


def test_a_game_wins_over_the_presets_id_but_cannot_be_given_with_an_id() -> None:
    assert parse_train("--preset", "catch", "--env.game", "Pong").env.id is None
    assert parse_train("--preset", "catch", "--env.game=Pong").env.game == "Pong"
    assert parse_train("--env.game", "Pong", "--env.id", "None").env.id is None
    with pytest.raises(UsageError, match=r"--env\.game Pong and --env\.id A/B-v0 are two games; give one"):
        parse_train("--env.game", "Pong", "--env.id", "A/B-v0")


def test_report_takes_a_folder() -> None:
    assert parse_arguments(["report", "runs/a"]) == ReportArguments(run=Path("runs/a"))


def test_help_names_the_commands_and_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in COMMANDS)
    assert "--preset tiny --env.game Breakout" in overview
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    details = capsys.readouterr().out
    for flag in ("--run", "--env.game", "--device", "--threads", "--world-model.optim.first-updates"):
        assert flag in details


def test_no_command_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{HELP}\n")
    with pytest.raises(SystemExit) as ended:
        parse_arguments([])
    assert ended.value.code == 2


def test_help_loads_neither_torch_nor_the_environments() -> None:
    script = (
        "import sys\nfrom rem_atari.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', [name for name in ('torch', 'gymnasium', 'ale_py') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("loaded: []\n")


def test_the_module_runs_as_a_program() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "rem_atari", "train", "--preset", "huge"], capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert (
        ran.stderr
        == "rem-atari: there is no preset 'huge'; there are debug, tiny, catch, minatar, small, paper.\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--preset", "tini"], "there is no preset 'tini'; did you mean tiny?"),
        (["--env.game", "Brekout"], "did you mean Breakout"),
        (["--env.id", "Nowhere/Nothing-v9"], "Nowhere/Nothing-v9"),
        (["--preset", "paper"], "`rem-atari weights` fetches them once, --tokenizer.lpips-weights PATH"),
        (["--seed", "-1"], "seed is -1, wanted at least 0"),
        (["--controller.temperature", "0"], "controller.temperature is 0.0, wanted more than 0"),
        (["--threads", "100000"], "threads is 100000, wanted at most 1024"),
        (["--controller.optim.batch-size", "0"], "controller.optim.batch_size is 0, wanted at least 1"),
        (["--controller.min-real-frames", "8"], "controller.min_real_frames is 8"),
        (["--device", "toaster"], "the device 'toaster' cannot be used; wanted cpu, cuda or mps"),
        (["--device", "meta"], "the device 'meta' cannot be used; wanted cpu, cuda or mps"),
        (["--device", "mps"], "the device 'mps' cannot be used: torch finds no such GPU on this machine"),
        (["--env.frame-size", "60"], "env.frame_size is 60"),
        (["--controller.horizon", "1"], "controller.horizon is 1, wanted at least 2"),
        (["--tokenizer.channels"], "tokenizer.channels is empty"),
        (["--controller.optim.lr", "nan"], "controller.optim.lr is nan, wanted a finite number"),
        (["--env.game", "Pong", "--env.id", "A/B-v0"], "are two games"),
    ],
)
def test_wrong_use_is_explained_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without the weights of the preset paper
    line = fails_with(capsys, ["train", "--run", str(tmp_path / "run"), *words], code=2)
    assert line.startswith("rem-atari: ")
    assert sentence in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--sed", "1"])
    assert ended.value.code == 2
    assert "--sed" in capsys.readouterr().err


def test_an_existing_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    line = fails_with(capsys, ["train", "--preset", "debug", "--run", str(tmp_path)], code=2)
    assert "exists and is not empty" in line
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["train", "--preset", "debug", "--run", str(tmp_path / "file" / "run")]
    assert "cannot create or lock the run folder" in fails_with(capsys, words, code=2)


def test_a_report_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run folder" in fails_with(capsys, ["report", str(tmp_path)], code=2)


def test_a_report_needs_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    line = fails_with(capsys, ["report", str(tmp_path)], code=2)
    assert line.startswith(f"rem-atari: {tmp_path / 'config.json'} is not the configuration of a run: ")
    assert "checkpoints" not in line


def test_a_failure_is_one_line_and_debug_adds_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> None:
        raise RuntimeError("the disk\n  is on fire")

    monkeypatch.setattr(listing, "list_everything", fail)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "rem-atari: the disk is on fire\n"
    assert main(["list", "--debug"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "rem-atari: the disk is on fire"


@pytest.mark.parametrize("error", [StoppedError("stopped by SIGTERM"), KeyboardInterrupt()])
def test_a_stop_has_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def stop(arguments: object) -> None:
        raise error

    monkeypatch.setattr(listing, "list_everything", stop)
    assert "stopped by SIG" in fails_with(capsys, ["list"], code=3)


def terminate(*_: object) -> None:
    """Send this process a SIGTERM, and be busy until it comes."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def test_sigterm_stops_the_report_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_run_folder(tmp_path / "run", PRESETS["debug"])
    monkeypatch.setattr(rem_atari.report, "write_report", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert fails_with(capsys, ["report", str(tmp_path / "run")], code=3) == "rem-atari: stopped by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_inside_another_leaves_its_handler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_another_and_terminate(arguments: object) -> None:
        assert main(["--help"]) == 0
        terminate()

    monkeypatch.setattr(listing, "list_everything", run_another_and_terminate)
    assert fails_with(capsys, ["list"], code=3) == "rem-atari: stopped by SIGTERM"


def test_a_command_runs_in_a_thread_without_handlers() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["--help"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe to write to whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize(
    ("words", "unbuffered"), [(["--help"], "1"), (["list"], ""), (["train", "--help"], "1")]
)
def test_output_that_nobody_reads_ends_the_command_quietly(
    unread: int, words: list[str], unbuffered: str
) -> None:
    command = [sys.executable, "-m", "rem_atari", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ran = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, env=environment, text=True)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_errors_that_nobody_reads_end_the_command_quietly(unread: int) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "rem_atari"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=unread, env=environment)
    assert (ran.returncode, ran.stdout) == (141, b"")


@contextmanager
def without(package: str) -> Iterator[None]:
    """Inside it `package` is not installed, and rem_atari is imported anew."""
    # torch's own module is one of them because it imports tensorboard only once.
    roots = ("rem_atari", package, "torch.utils.tensorboard")

    def imported() -> list[str]:
        return [name for name in sys.modules if any(f"{name}.".startswith(f"{root}.") for root in roots)]

    class Missing(MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    before = {name: sys.modules.pop(name) for name in imported()}
    finder = Missing()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in imported():
            del sys.modules[name]
        sys.modules.update(before)


@pytest.mark.filterwarnings("ignore:.*Overriding environment")
@pytest.mark.parametrize("package", sorted(TRAINED_WITH))
def test_each_package_of_the_extra_is_missed_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    with without(package):
        fresh = importlib.import_module("rem_atari.cli")
        assert fresh.main(["train", "--env.game", "Pong", "--run", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"package ({package}|{EXTRAS['atari'][package]})\b", line)
    assert "pip install 'retpop[atari]'" in line
    assert not (tmp_path / "run").exists()


def test_a_missing_module_that_is_not_of_the_extra_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> None:
        importlib.import_module("matplotlib.no_such_part")

    monkeypatch.setattr(listing, "list_everything", fail)
    assert fails_with(capsys, ["list"], code=1) == "rem-atari: No module named 'matplotlib.no_such_part'"


def skip_without(extra: str) -> None:
    """Skip the test unless all packages of the extra are installed."""
    if missing := sorted(EXTRAS[extra].keys() - packages_distributions().keys()):
        pytest.skip(f"{', '.join(missing)} not installed (extra `{extra}`)")


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_is_that_of_the_package(extra: str) -> None:
    requirements = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"][extra]
    names = {re.match(r"[\w-]+", text)[0] for text in requirements}
    names.discard("retpop")  # "retpop[atari]" is another extra
    assert sorted(EXTRAS[extra].values()) == sorted(names)
    skip_without(extra)
    distributions = packages_distributions()
    assert {name: {each.lower() for each in distributions[name]} for name in EXTRAS[extra]} == {
        name: {package} for name, package in EXTRAS[extra].items()
    }


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [("rliable", ["scores"], "scores"), ("uvicorn", ["play", "runs/catch"], "play")],
)
@pytest.mark.filterwarnings("ignore:.*Overriding environment")  # the games are registered once more
def test_a_missing_package_names_its_extra(
    capsys: pytest.CaptureFixture[str], package: str, words: list[str], extra: str
) -> None:
    skip_without(extra)
    with without(package):
        fresh = importlib.import_module("rem_atari.cli")
        assert fresh.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"the package {package} is needed and not installed: pip install 'retpop[{extra}]'")


def test_list_shows_presets_and_games(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    words = shown.split()
    assert PRESETS.keys() <= set(words)
    assert {"Breakout*", "MsPacman*", "Tetris", "rem_atari/Catch-v0", "rem_atari/Catch8-v0"} <= set(words)
    assert words.count("Breakout*") == 1
    assert listing.PURPOSES.keys() == PRESETS.keys()


def test_list_is_bare_where_a_script_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "presets"]) == 0
    assert capsys.readouterr().out.splitlines() == list(PRESETS)
    assert main(["list", "games"]) == 0
    games = capsys.readouterr().out.splitlines()
    assert {"--env.game Breakout", "--env.game MsPacman", "--env.id rem_atari/Catch-v0"} <= set(games)
    for flags in (games[0], games[-1]):
        assert parse_train(*flags.split()).env != parse_train().env


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"rem-atari {command}" in capsys.readouterr().out


def test_the_report_is_announced_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announced: list[str] = []

    def write_report(run: Path) -> Path:
        announced.extend(capsys.readouterr().err.splitlines())
        raise ValueError("enough seen")

    monkeypatch.setattr(trainer.Trainer, "run", lambda self: None)
    monkeypatch.setattr(rem_atari.report, "write_report", write_report)
    assert main(["train", "--preset", "debug", "--run", str(tmp_path / "run")]) == 1
    sees = "the agent sees the game's images, 24 x 24, as 24 x 24 pixels"
    assert announced == [f"run folder: {tmp_path / 'run'}", sees, "writing the report"]


def test_a_report_that_fails_keeps_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: Path) -> Path:
        raise ZeroDivisionError("no frames")

    monkeypatch.setattr(rem_atari.report, "write_report", fail)
    run = tmp_path / "run"
    line = fails_with(
        capsys, ["train", "--preset", "debug", "--run", str(run), "--schedule.epochs", "1"], code=1
    )
    assert line.startswith(f"rem-atari: the report of {run} could not be written (no frames)")
    assert len(list((run / "checkpoints").iterdir())) == 1
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["final"] == 1


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rem-atari {version('retpop')}\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_gets_other_characters(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))

    def show(arguments: object) -> None:
        print("mean ±1 − 2 × \udcff ☃")

    monkeypatch.setattr(commands, "run_command", show)
    assert main(["list"]) == 0
    wanted = {"ascii": "mean +-1 - 2 x ? ?\n", "latin-1": "mean ±1 - 2 × ? ?\n"}
    assert written.getvalue().decode(encoding) == wanted[encoding]


def test_a_whole_run_in_the_c_locale(tmp_path: Path) -> None:
    """With everything that Python does to be in UTF-8 all the same switched off."""
    c_locale = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = ["train", "--preset", "debug", "--schedule.epochs", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "rem_atari", *words],
        env={**os.environ, **c_locale},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"mean return: agent -" in done.stdout
    assert b" +- " in done.stdout


def test_two_runs_of_the_same_second_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2031, 2, 3, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command_module, "datetime", Noon)
    monkeypatch.setattr(trainer.Trainer, "run", lambda self: None)
    monkeypatch.setattr(train_command_module, "conclude", lambda run: None)
    for _ in range(3):
        assert main(["train", "--preset", "debug"]) == 0
    name = "Catch-debug-0-20310203-120000"
    assert sorted(path.name for path in Path("runs").iterdir()) == [name, f"{name}-2", f"{name}-3"]


def test_suggested_commands_work_for_a_module_beside_the_run() -> None:
    beside, installed = EnvConfig(id="my_game:Game-v0"), EnvConfig(id="ALE/Pong-v5")
    assert resume_command(beside, Path("my run")) == "python -m rem_atari resume 'my run'"
    assert resume_command(installed, Path("run")) == "rem-atari resume run"
    wrapped = EnvConfig(id="ALE/Pong-v5", wrapper="mine:Wrapper")
    assert resume_command(wrapped, Path("run")) == "python -m rem_atari resume run"
    started = train_command(Config(env=beside), None)
    assert started == "python -m rem_atari train --seed 0 --env.id my_game:Game-v0"


def test_suggested_commands_work_for_a_module_that_pythonpath_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "my games"):
        (tmp_path / folder).mkdir()
    (tmp_path / "my games" / "path_game.py").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", "../my games")
    game, installed = EnvConfig(id="path_game:Game-v0"), EnvConfig(id="ALE/Pong-v5")
    assert resume_command(game, Path("run")) == "PYTHONPATH='../my games' python -m rem_atari resume run"
    assert resume_command(installed, Path("run")) == "rem-atari resume run"
    Path("path_game.py").touch()
    assert resume_command(game, Path("run")) == "python -m rem_atari resume run"


def test_a_module_in_the_current_folder_is_pointed_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("game_beside.py").touch()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    line = fails_with(capsys, ["train", "--preset", "debug", "--env.id", "game_beside:Game-v0"], code=2)
    hint = "`python -m rem_atari` instead of `rem-atari` finds game_beside.py in the current folder"
    assert line.endswith(hint)

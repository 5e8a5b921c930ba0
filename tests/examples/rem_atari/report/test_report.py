"""The report's page and pictures, from run folders that were written without any training."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import RIVALS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rem_atari.agent import Agent
from rem_atari.arguments import TrainArguments
from rem_atari.config import Config
from rem_atari.config.presets import PRESETS
from rem_atari.errors import UsageError
from rem_atari.films.dreams import dream_along, make_scenes
from rem_atari.films.pictures import (
    DIFFERENCE_CEILING,
    Film,
    FilmStep,
    Scene,
    difference_image,
    filmstrip,
    save_imagination,
)
from rem_atari.models.base_tokenizer import FOREGROUND_THRESHOLD
from rem_atari.models.sequence_tokens import SequenceTokens, tokenize
from rem_atari.parsing import parse_arguments
from rem_atari.replay.buffer import Replay
from rem_atari.report import write_report
from rem_atari.report.analysis import codebook_use, frame_errors
from rem_atari.report.contents import Report, action_names
from rem_atari.report.measure import (
    Ahead,
    look_at_drift,
    look_at_horizon,
    look_at_returns,
    predict_sequences,
    token_pairs,
)
from rem_atari.report.page import render
from rem_atari.report.quality import FrameQuality, Quality, Redrawn
from rem_atari.report.rivals import read_rivals
from rem_atari.report.text import number
from rem_atari.runs.checkpoint import Checkpoint, save_checkpoint
from rem_atari.runs.folder import RunFolder, create_run_folder
from rem_atari.runs.session import train_command

DEBUG = PRESETS["debug"]
ACTIONS, SIDE, EPISODE = 3, 24, 6
NAMES = ("left", "stay", "right")
PARTS = ("frames", "tokens", "rewards", "ends", "horizon", "drift", "returns")
SECTIONS = (
    "Imagination",
    "The run",
    "Frames and reconstructions",
    "Imagination against the game, step by step",
    "Measured on held-out frames",
    "Beside policies that see nothing",
    "Curves",
    "Signs that it does not learn",
    "Throughput",
    "Configuration",
    "How to reproduce",
    "Files",
)


def make_agent() -> Agent:
    torch.manual_seed(0)
    agent = Agent.from_config(DEBUG, ACTIONS)
    torch.nn.init.normal_(agent.tokenizer.codebook.weight)
    return agent.eval()


def fill_replay(folder: Path | None, *, episodes: int, seed: int) -> Replay:
    """Episodes of EPISODE steps of noise with a bright square that moves; the last step gives the reward."""
    replay = Replay((SIDE, SIDE, 3), episodes * EPISODE, folder=folder, seed=seed)
    generator = np.random.default_rng(seed)
    for episode in range(episodes):
        for step in range(EPISODE):
            frame = generator.integers(0, 20, size=(SIDE, SIDE, 3), dtype=np.uint8)
            frame[4 * step : 4 * step + 4, 4 * (episode % 6) : 4 * (episode % 6) + 4] = 255
            last = step == EPISODE - 1
            reward = (1.0 if episode % 2 else -1.0) if last else 0.0
            replay.append(0, frame, int(generator.integers(ACTIONS)), reward, last, False)
    replay.flush()
    return replay


def metric_lines(*, finished: bool) -> list[dict]:
    trained = {"loss": 2.0, "updates": 2, "rate": 4.0, "phase_seconds": 0.5}
    lines = [{"phase": "random", "mean_return": -0.6, "episodes": 4, "returns": [-1, -1, -1, 0.6]}]
    for epoch in range(2 if finished else 1):
        at = {"epoch": epoch, "env_steps": 32 * (epoch + 1), "seconds": 3.0 * (epoch + 1)}
        lines.append(at | {"phase": "collect", "steps": 32, "phase_seconds": 0.2, "mean_game_return": -0.5})
        lines.append(at | trained | {"phase": "tokenizer", "reconstruction": 0.2, "frozen": 0})
        lines.append(at | trained | {"phase": "world_model", "tokens": 1.0, "reward": 0.3, "end": 0.1})
        lines.append(at | trained | {"phase": "controller", "entropy": 1.0, "frames_per_second": 99.0})
    if finished:
        returns = {
            "mean_return": 0.5,
            "min_return": -1,
            "max_return": 1,
            "episodes": 4,
            "returns": [1, 1, 1, -1],
        }
        lines.append(at | returns | {"phase": "evaluate", "phase_seconds": 0.4, "final": 1})
    return [{"epoch": 0, "env_steps": 0, "seconds": 0.5, "phase_seconds": 0.1} | line for line in lines]


def write_run(path: Path, *, config: Config = DEBUG, finished: bool = True, heldout: int = 8) -> RunFolder:
    """A run folder as the trainer leaves it."""
    run = create_run_folder(path, config)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in metric_lines(finished=finished)))
    model = {name: value.detach() for name, value in make_agent().state_dict().items()}
    state = {"action_names": list(NAMES)}
    save_checkpoint(run.checkpoints, Checkpoint(step=2, model=model, optimizer={}, state=state), keep=1)
    fill_replay(run.replay, episodes=16, seed=1)
    if heldout:
        fill_replay(run.heldout, episodes=heldout, seed=2)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with its report."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run")
    assert write_report(folder.path) == folder.path / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run: RunFolder) -> str:
    return (run.path / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Collects what the page loads, and whether its tags close in order."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.loads += re.findall(r"url\((.*?)\)", dict(attrs).get("style") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def make_report(**changes: object) -> Report:
    """A report of a run that left next to nothing, with changes."""
    nothing = Report(
        game="Catch",
        config=DEBUG,
        versions={},
        lines=[],
        command="",
        notes=[],
        step=None,
        quality=Quality(),
        scenes=[],
    )
    return replace(nothing, **changes)


def test_page_needs_nothing_but_itself(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.loads
    assert all(load.startswith("data:image/png;base64,") for load in outline.loads)
    assert not re.search(r"https?://|@import|url\((?!data:)", page)
    assert len(page) < 6_000_000


def test_page_has_every_section_and_the_run_in_its_title(page: str) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(SECTIONS)
    assert "<title>REM on Catch: debug, seed 0</title>" in page
    assert "shows plumbing, not play" in page
    assert "mean return 0.50 ± 0.50 over 4 games; random play −0.60 ± 0.40 over 4 games" in page


def test_the_first_screen_says_whether_the_agent_learned_and_how_to_play(page: str, run: RunFolder) -> None:
    first = page[page.index("<header>") : page.index("</header>")]
    assert first.count('<p class="lede">The agent does not clearly differ from random play: mean') == 1
    assert f"<code>rem-atari play {run.path}</code>" in first
    assert page.index("</header>") < page.index("<h2>Imagination</h2>") < page.index("<h2>The run</h2>")


def test_page_shows_frames_enlarged_by_whole_pixels(page: str) -> None:
    assert page.count('alt="held-out frame"') == page.count('alt="reconstruction"') > 0
    assert "image-rendering: pixelated" in page


def test_page_marks_each_comparison_won_or_missed(page: str) -> None:
    rows = page.count('<tr class="won">') + page.count('<tr class="missed">')
    assert rows == 10
    assert page.count('<span class="no">no: a miss</span>') == page.count('<tr class="missed">') > 0


def redrawn_as(level: int, *, mean: int) -> Quality:
    """Two black frames, redrawn in one level of grey, beside a mean frame in another."""
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    nothing = np.zeros((2, 4, 4), dtype=bool)
    ours, theirs = (
        frame_errors(frames, np.full_like(frames, grey), foreground=nothing, moving=nothing)
        for grey in (level, mean)
    )
    shown = Redrawn(frames, np.full_like(frames, level), [1.0, 1.0])
    use = codebook_use(np.zeros(4, dtype=np.int64), 16)
    return Quality(
        steps=2, frames=FrameQuality(redrawn=shown, count=2, ours=ours, mean_frame=theirs, codebook=use)
    )


def test_a_miss_is_shown_as_a_miss() -> None:
    missed = render(make_report(quality=redrawn_as(30, mean=20)), [])
    assert missed.count('<span class="no">no: a miss</span>') == 1
    assert '<span class="yes">' not in missed
    assert "it wins 0 of 1 comparison; it misses Reconstruction error (MSE) against mean frame" in missed
    won = render(make_report(quality=redrawn_as(10, mean=20)), [])
    assert won.count('<span class="yes">yes</span>') == 1
    assert '<span class="no">' not in won


def test_what_others_named_is_escaped() -> None:
    nasty = '<script>alert("1")</script>'
    config = replace(DEBUG, preset=nasty, env=replace(DEBUG.env, game=nasty))
    film = Film(
        title=nasty,
        frames=np.zeros((2, 4, 4, 3), dtype=np.uint8),
        steps=[FilmStep(action=nasty, reward=0, ended=False)],
    )
    page = render(
        make_report(game=nasty, config=config, command=nasty, notes=[nasty], scenes=[Scene([film])]), []
    )
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(&quot;1&quot;)") >= 6


def test_page_tells_with_what_and_on_what_the_run_was_made() -> None:
    session = {"started": "2031-02-03", "command": "resume", "commit": "0123456789-dirty", "cores": 2}
    page = render(make_report(sessions=[session | {"versions": {"torch": "<2.9>"}}, {}]), [])
    assert "<td>2031-02-03</td><td>resume</td><td>0123456-dirty</td><td>torch &lt;2.9&gt;</td>" in page
    assert "cores: 2" in page
    assert page.count("<td>unknown</td>") == 1


def test_page_shows_the_signs_with_the_first_to_heed() -> None:
    lines = [{"epoch": epoch, "phase": "tokenizer", "codes_used": 1.0} for epoch in range(3)]
    page = render(make_report(lines=lines), [])
    assert '<span class="no">seen</span>' in page
    assert "Begin with the first that is seen, <b>codebook use</b>" in page
    assert "Try: Frames that differ get the same tokens." in page


def test_page_shows_the_policies_that_see_nothing(tmp_path: Path) -> None:
    (tmp_path / "blind.json").write_text(json.dumps(RIVALS))
    rivals = read_rivals(tmp_path / "blind.json")
    page = render(make_report(lines=metric_lines(finished=True), rivals=rivals), [])
    assert "<td>best list of actions</td>" in page
    assert '<td class="number">6.50</td><td class="number">0.30</td><td class="number">100</td>' in page
    assert page.count("is not above it by three standard errors") == 2  # at the top, and beside the table
    assert "sought for 30,000 environment steps" in page
    without = render(make_report(lines=metric_lines(finished=True)), [])
    assert "They were not measured: <code>rem-atari blind</code>" in without


def test_pictures_are_written(run: RunFolder) -> None:
    media = run.path / "media"
    with Image.open(media / "imagination.gif") as movie:
        assert movie.n_frames > 1
    for name in ("curves.png", "reconstructions.png"):
        with Image.open(media / name) as picture:
            assert picture.width > 300
    events = EventAccumulator(str(run.tensorboard / "pictures")).Reload()
    assert set(events.Tags()["images"]) == {"reconstructions", "imagination"}
    assert events.Images("imagination")[0].encoded_image_string == (media / "imagination.gif").read_bytes()


def test_writing_again_gives_the_same_page(run: RunFolder, page: str) -> None:
    write_report(run.path)
    sizes = re.compile(r'<td class="number">[\d.]+ k?M?B</td>')
    again = (run.path / "report.html").read_text(encoding="utf-8")
    assert sizes.sub("", again) == sizes.sub("", page)


def test_run_stopped_early_says_what_it_lacks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False, heldout=0)
    with run.metrics.open("a") as file:
        file.write('{"epoch": 1, "phase": "coll')
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "This run did not finish: it began 1 of 2 epochs." in page
    assert "There are no held-out frames" in page
    assert "1 of 6 lines of metrics.jsonl cannot be read: line " in page
    assert "How well the agent plays was not measured." in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(SECTIONS)


def test_folder_with_a_configuration_alone_gives_a_page(tmp_path: Path) -> None:
    run = create_run_folder(tmp_path / "run", DEBUG)
    page = write_report(run.path).read_text(encoding="utf-8")
    for part in ("tokenizer", "world model", "controller"):
        assert f"The {part} never trained" in page
    assert "There are no weights to look at" in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(SECTIONS)


def test_weights_of_another_configuration_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", heldout=2)
    data = json.loads(run.config.read_text())
    data["controller"]["lstm_dim"] += 1
    run.config.write_text(json.dumps(data))
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "does not fit the run&#x27;s configuration" in page


def test_no_module_that_a_configuration_names_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rem_atari_trap.py").write_text("raise SystemExit('the trap was sprung')")
    monkeypatch.syspath_prepend(tmp_path)
    env = replace(DEBUG.env, id="rem_atari_trap:My-Game.2-v0")
    page = write_report(write_run(tmp_path / "run", config=replace(DEBUG, env=env)).path)
    text = page.read_text(encoding="utf-8")
    assert "<title>REM on My-Game.2: debug, seed 0</title>" in text
    assert "&quot;1: stay&quot;" in text or "&quot;1: left&quot;" in text or "&quot;1: right&quot;" in text


@pytest.mark.parametrize("state", [{}, {"action_names": None}, {"action_names": ["left"]}])
def test_actions_without_a_name_for_each_are_numbered(state: dict) -> None:
    assert action_names(state, 2) == ["action 0", "action 1"]


def test_settings_are_compared_with_the_published_agents() -> None:
    page = render(make_report(config=PRESETS["paper"]), [])
    assert "<th>Paper</th>" in page
    assert '<tr class="set">' not in page
    changed = replace(PRESETS["paper"], controller=replace(PRESETS["paper"].controller, burn_in_actions=True))
    page = render(make_report(config=changed), [])
    assert page.count('<tr class="set">') == 1
    assert '<td class="faint"><code>False</code></td>' in page


def test_very_few_held_out_frames(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", heldout=0)
    replay = Replay((SIDE, SIDE, 3), 1, folder=run.heldout, seed=0)
    replay.append(0, np.zeros((SIDE, SIDE, 3), dtype=np.uint8), 0, 0.0, True, False)
    replay.flush()
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "Reconstruction error (MSE)" in page
    assert "Token accuracy" not in page
    assert "There were no held-out frames from which to imagine" in page


@pytest.mark.parametrize("content", [None, "not JSON", "{}"])
def test_what_is_no_run_folder_is_said_in_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "catch", "--seed", "3"],
        ["--preset", "tiny", "--env.game", "Pong", "--threads", "2", "--tokenizer.channels", "8", "8", "16"],
        ["--preset", "debug", "--world-model.no-position-in-block", "--controller.normalize-codes"],
        ["--preset", "catch", "--env.game", "Pong", "--world-model.optim.max-seconds", "1.5"],
    ],
)
def test_command_to_reproduce_gives_the_same_configuration(flags: list[str]) -> None:
    arguments = parse_arguments(["train", *flags])
    assert isinstance(arguments, TrainArguments)
    command = train_command(arguments.config, PRESETS[arguments.config.preset])
    words = shlex.split(command)
    assert words[0] == "rem-atari"
    again = parse_arguments(words[1:])
    assert isinstance(again, TrainArguments)
    assert again.config == arguments.config


def test_difference_image_is_brightest_from_the_ceiling_on() -> None:
    black = np.zeros((1, 3, 3), dtype=np.uint8)
    other = black.copy()
    other[0, 1, 2], other[0, 2, 0] = DIFFERENCE_CEILING, 255
    heat = difference_image(other, black).astype(int).sum(axis=-1)[0]
    assert heat[0] < 20
    assert heat[1] == heat[2] > 500


def test_filmstrip_puts_frames_side_by_side() -> None:
    frames = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    strip = filmstrip(frames)
    assert strip.shape == (2, 6, 3)
    np.testing.assert_array_equal(strip[:, 2:4], frames[1])


def test_gif_has_a_picture_for_the_start_and_each_step(tmp_path: Path) -> None:
    steps = [FilmStep(action="stay", reward=0, ended=False), FilmStep(action="stay", reward=1, ended=True)]
    frames = np.stack([np.full((8, 8, 3), level, dtype=np.uint8) for level in (0, 200)])
    save_imagination(tmp_path / "film.gif", [Scene([Film(title="real", frames=frames, steps=steps)])])
    with Image.open(tmp_path / "film.gif") as movie:
        assert movie.n_frames == 3


def test_captions_say_what_happened_and_what_chance_it_had() -> None:
    film = Film(
        title="imagined",
        frames=np.zeros((2, 4, 4, 3), dtype=np.uint8),
        steps=[
            FilmStep(action="left", reward=0, ended=False),
            FilmStep(action="stay", reward=-2.5, ended=True, reward_chances=(0.7, 0.2, 0.1), end_chance=0.9),
        ],
    )
    assert film.caption(0) == ("start", "")
    assert film.caption(1) == ("1: left", "")
    assert film.caption(2) == ("2: stay, reward −2.5, episode over", "reward −1 70%, +1 10%; end 90%")
    assert film.caption(7) == film.caption(2)


@pytest.fixture(scope="module")
def agent() -> Agent:
    return make_agent()


def held_out(agent: Agent, steps: int, min_real: int) -> tuple[torch.Tensor, SequenceTokens]:
    batch = fill_replay(None, episodes=6, seed=3).sample_sequences(5, steps, min_real=min_real)
    return batch.frames, tokenize(batch, agent.tokenizer)


def test_token_pairs_never_cross_into_padding(agent: Agent) -> None:
    _, batch = held_out(agent, EPISODE, min_real=2)
    now, before = token_pairs(batch)
    real = batch.mask.sum(dim=1)
    assert len(now) == int((real - 1).sum())
    np.testing.assert_array_equal(now[0], batch.tokens[0, 1].numpy())
    np.testing.assert_array_equal(before[0], batch.tokens[0, 0].numpy())


def test_predictions_equal_the_world_models_steps(agent: Agent) -> None:
    _, batch = held_out(agent, 4, min_real=4)
    codes = agent.tokenizer.codes
    tokens, rewards, ends = predict_sequences(agent.world_model, codes, batch, first=2)
    assert tokens.target.shape == (5 * 2, agent.tokenizer.num_tokens)
    np.testing.assert_array_equal(tokens.previous[0], batch.tokens[0, 1].numpy())
    with torch.no_grad():
        state = agent.world_model.take_in(batch.tokens[:, :1], batch.actions[:, :1], codes)
        step = agent.world_model.step(batch.tokens[:, 1], batch.actions[:, 1], codes, state)
        token_logits = agent.world_model.token_logits(step, codes)
        after = agent.world_model.step(batch.tokens[:, 2], batch.actions[:, 2], codes, step.state)
    chances = token_logits.log_softmax(dim=-1).gather(-1, batch.tokens[:, 2, :, None])[..., 0]
    np.testing.assert_allclose(tokens.predictions.log_prob[::2], chances.numpy(), atol=1e-4)
    signs = batch.rewards[:, 2].sign().long() + 1
    reward_chances = after.reward_logits.log_softmax(dim=-1).gather(-1, signs[:, None])
    np.testing.assert_allclose(rewards.predictions.log_prob[::2], reward_chances.numpy(), atol=1e-4)
    np.testing.assert_array_equal(rewards.target[::2], signs[:, None].numpy())
    ended = batch.ended[:, 2].long()
    end_chances = after.end_logits.log_softmax(dim=-1).gather(-1, ended[:, None])
    np.testing.assert_allclose(ends.predictions.log_prob[::2], end_chances.numpy(), atol=1e-4)
    np.testing.assert_array_equal(ends.target[::2], ended[:, None].numpy())


def test_an_episode_that_was_cut_short_says_nothing_of_its_end(agent: Agent) -> None:
    _, batch = held_out(agent, 4, min_real=4)
    batch.truncated[:, 3] = ~batch.ended[:, 3]
    tokens, _, ends = predict_sequences(agent.world_model, agent.tokenizer.codes, batch, first=2)
    assert len(tokens.target) == 5 * 2
    assert len(ends.target) == 5 * 2 - int((~batch.ended[:, 3]).sum()) < 5 * 2


def ahead_of(agent: Agent, steps: int, min_real: int) -> Ahead:
    """Dreams beside held-out episodes, from their second frames on."""
    frames, batch = held_out(agent, steps, min_real)
    dream = dream_along(agent, batch, 1, torch.Generator().manual_seed(0))
    return Ahead(frames[:, 1:], batch.since(1), along=dream, free=dream)


def test_imagination_is_compared_with_the_frame_of_its_own_step(agent: Agent) -> None:
    ahead = ahead_of(agent, EPISODE + 2, min_real=EPISODE)
    errors = look_at_horizon(agent, ahead)
    assert errors is not None
    assert errors.starts == 5
    assert [(step.step, step.count) for step in errors.steps] == [(step, 5) for step in range(1, EPISODE - 1)]
    for step in errors.steps:
        real, start = (ahead.frames[:, at].double() / 127.5 - 1 for at in (step.step, 0))
        imagined, redrawn = (
            agent.tokenizer.decode(tokens[:, at]).double() / 127.5 - 1
            for tokens, at in ((ahead.along.tokens, step.step), (ahead.real.tokens, step.step))
        )
        assert step.imagined == pytest.approx((imagined - real).square().mean().item(), rel=1e-3)
        assert step.copied == pytest.approx((start - real).square().mean().item(), rel=1e-4)
        assert step.redrawn == pytest.approx((redrawn - real).square().mean().item(), rel=1e-3)
        levels = (ahead.frames[:, step.step].int() - ahead.frames[:, 0].int()).abs()
        moving = (levels > FOREGROUND_THRESHOLD).any(dim=-1)
        assert step.copied_moving == pytest.approx((start - real)[moving].square().mean().item(), rel=1e-4)
        assert step.passed == (step.imagined < step.copied)
    total = sum(step.imagined for step in errors.steps) / len(errors.steps)
    assert errors.mean("imagined") == pytest.approx(total)


def test_a_horizon_ends_with_its_episodes(agent: Agent) -> None:
    ahead = ahead_of(agent, 4, min_real=4)
    ahead.real.mask[:, 2] = False
    ahead.real.mask[1:, 1] = False
    errors = look_at_horizon(agent, ahead)
    assert errors is not None
    assert [(step.step, step.count) for step in errors.steps] == [(1, 1)]
    ahead.real.mask[:, 1] = False
    assert look_at_horizon(agent, ahead) is None
    assert look_at_drift(agent, ahead) is None


def test_drift_is_that_of_episodes_that_go_on_in_both(agent: Agent) -> None:
    ahead = ahead_of(agent, EPISODE, min_real=EPISODE)
    ahead.along.ended[:] = False
    ahead.along.ended[0, 1] = True
    ahead.along.ended[1, 0] = True
    ahead.real.mask[2, 4] = False
    drift = look_at_drift(agent, ahead)
    assert drift is not None
    assert [(step.step, step.count) for step in drift.steps] == [(1, 4), (2, 3), (4, 2)]
    assert drift.starts == 5


def test_imagined_returns_are_compared_as_far_as_the_game_is_known(agent: Agent) -> None:
    ahead = ahead_of(agent, EPISODE, min_real=EPISODE)
    real, free = ahead.real, ahead.free
    for column in (real.rewards, real.ended, real.truncated, free.rewards, free.ended):
        column.zero_()
    free.rewards[:] = 1.0
    free.ended[0, 1] = True  # two steps of four are paid
    real.mask[1, 3:] = False  # cut short: the fourth step is not known
    real.mask[2, 3:], real.ended[2, 2] = False, True  # over: the fourth step pays nothing, and that is known
    real.rewards[3, 0], real.rewards[3, 2] = -7.0, 3.0
    returns = look_at_returns(ahead, DEBUG)
    assert (returns.steps, returns.real) == (4, 0.0)
    assert returns.imagined == pytest.approx((2 + 3 + 4 + 4 + 4) / 5)
    assert returns.size == pytest.approx(2 / 5)
    assert returns.standard_error == pytest.approx(np.std([2, 3, 4, 4, 4], ddof=1) / 5**0.5)
    sized = replace(DEBUG, world_model=replace(DEBUG.world_model, reward_bins=41))
    assert look_at_returns(ahead, sized).real == pytest.approx(-4 / 5)


def test_quality_is_written_as_json_too(run: RunFolder, page: str) -> None:
    quality = json.loads((run.path / "quality.json").read_text())
    assert (quality["schema"], quality["game"], quality["seed"], quality["step"]) == (1, "Catch", 0, 2)
    assert quality["heldout_steps"] == 8 * EPISODE
    assert quality["frames"]["codebook"]["size"] == DEBUG.tokenizer.codebook_size
    for measure in ("cross_entropy", "accuracy", "changed_accuracy"):
        assert set(quality["tokens"][measure]) == {
            "world_model",
            "unigram",
            "unigram_per_place",
            "copy_last_frame",
        }
    assert 0 < quality["rewards"]["events"] < quality["rewards"]["steps"]
    assert quality["ends"]["events"] == quality["rewards"]["events"]  # each last step gives a reward here
    assert [step["step"] for step in quality["horizon"]["steps"]] == [1, 2]
    assert quality["epoch"] == 1
    assert [step["step"] for step in quality["drift"]["steps"]] == [1, 2]
    assert "Drift: frames with too much" in page
    assert max(quality["drift"]["steps"], key=lambda step: step["distance"])["colour"] in page
    assert quality["returns"]["steps"] == 2
    last = quality["horizon"]["steps"][-1]["psnr"]
    assert "<td>2</td>" in page
    for name in ("imagined", "copy_last_frame", "tokenizer"):
        assert f"{number(last[name])} dB" in page


def test_quality_of_a_run_without_held_out_frames_says_that_it_is_unknown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False, heldout=0)
    write_report(run.path)
    quality = json.loads((run.path / "quality.json").read_text())
    assert quality["heldout_steps"] == 0
    assert [quality[part] for part in PARTS] == [None] * len(PARTS)


def test_scenes_show_the_real_continuation_and_two_imagined_ones(agent: Agent) -> None:
    frames, batch = held_out(agent, EPISODE + 4, min_real=EPISODE)
    scenes = make_scenes(agent, frames, batch, context=1, action_names=NAMES, temperature=1.0, seed=0)
    assert len(scenes) == 5
    for row, scene in enumerate(scenes):
        real, along, free = scene.films
        assert [film.title for film in scene.films] == [
            "real",
            "imagined, same actions",
            "imagined, agent plays",
        ]
        assert len(real.steps) == len(real.frames) == EPISODE - 1  # no frame follows the end
        assert [step.ended for step in real.steps] == [False] * (EPISODE - 2) + [True]
        np.testing.assert_array_equal(real.frames[0], frames[row, 1].numpy())
        actions = [NAMES[action] for action in batch.actions[row, 1:EPISODE].tolist()]
        assert [step.action for step in real.steps] == actions
        assert [step.action for step in along.steps] == actions[: len(along.steps)]
        decoded = agent.tokenizer.decode(batch.tokens[row : row + 1, 1])[0].numpy().astype(int)
        for film in (along, free):
            np.testing.assert_allclose(film.frames[0], decoded, atol=1)  # rounding depends on the batch
            assert len(film.frames) == len(film.steps) + (not film.steps[-1].ended)
            assert all(not step.ended for step in film.steps[:-1])
            assert all(sum(step.reward_chances) == pytest.approx(1.0, abs=1e-5) for step in film.steps)


def test_a_row_without_more_frames_is_cut_and_a_whole_one_is_not(agent: Agent) -> None:
    frames, batch = held_out(agent, 4, min_real=4)
    whole = make_scenes(agent, frames, batch, context=1, action_names=NAMES, temperature=1.0, seed=0)[0]
    assert (len(whole.films[0].frames), len(whole.films[0].steps)) == (3, 2)
    assert not whole.films[0].steps[-1].cut
    batch.mask[:, 3:] = False
    batch.ended[:] = False
    cut = make_scenes(agent, frames, batch, context=1, action_names=NAMES, temperature=1.0, seed=0)[0]
    assert (len(cut.films[0].frames), len(cut.films[0].steps)) == (2, 2)
    assert cut.films[0].steps[-1].cut


def test_imagined_chances_are_those_of_the_first_step(agent: Agent) -> None:
    frames, batch = held_out(agent, 3, min_real=3)
    scenes = make_scenes(agent, frames, batch, context=1, action_names=NAMES, temperature=1.0, seed=0)
    codes = agent.tokenizer.codes
    with torch.no_grad():
        state = agent.world_model.take_in(batch.tokens[:, :1], batch.actions[:, :1], codes)
        step = agent.world_model.step(batch.tokens[:, 1], batch.actions[:, 1], codes, state)
    for row, scene in enumerate(scenes):
        first = scene.films[1].steps[0]
        assert first.reward_chances == pytest.approx(step.reward_logits[row].softmax(-1).tolist(), abs=1e-4)
        assert first.end_chance == pytest.approx(step.end_logits[row].softmax(-1)[1].item(), abs=1e-4)

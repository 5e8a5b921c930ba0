"""`rem-atari record`: the game as it was, its tokens decoded, and imagination that is told only actions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import DEBUG, files_in, make_run
from torch import Tensor

from rem_atari.cli import main
from rem_atari.commands.record import default_dream_steps
from rem_atari.envs.catch import BALL, PADDLE
from rem_atari.errors import RunError
from rem_atari.films import side_by_side
from rem_atari.films.panels import HEADING
from rem_atari.films.pictures import GAP
from rem_atari.films.side_by_side import Moment, RealStep, draw, play
from rem_atari.films.video import save_video
from rem_atari.play.imagination import ImaginedEnv
from rem_atari.runs.trained import TrainedAgent, load_trained

DREAM_STEPS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedAgent:
    run = make_run(tmp_path_factory.mktemp("record") / "run")
    return load_trained(run.path, step="newest", device=None, say=print)


@pytest.fixture(scope="module")
def moments(trained: TrainedAgent) -> list[Moment]:
    """Two games of Catch and a bit, the world model shown the game every third step."""
    return list(play(trained.agent, trained.config, steps=12, dream_steps=DREAM_STEPS, seed=0))


def test_a_film_is_as_long_as_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    before = files_in(tmp_path)
    assert main(["record", str(tmp_path / "run"), "--steps", "7"]) == 0
    film = tmp_path / "run/media/play-step-00000042.mp4"
    assert capsys.readouterr().out == f"film: {film}\n"
    assert files_in(tmp_path) - before == {"run/media/play-step-00000042.mp4"}
    stream = imageio_ffmpeg.read_frames(str(film))
    about = next(stream)
    assert (about["fps"], about["size"]) == (5.0, (824, 332))
    assert len(list(stream)) == 8 + 1, "the frame that the game ended with too"


def test_a_gif_where_it_is_wanted(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    words = ["record", str(tmp_path / "run"), "--steps", "3", "--fps", "10"]
    assert main([*words, "--format", "gif"]) == 0
    assert main([*words, "--out", str(tmp_path / "new" / "film.gif"), "--dream-steps", "9"]) == 0
    for path in (tmp_path / "run/media/play-step-00000042.gif", tmp_path / "new/film.gif"):
        with Image.open(path) as image:
            assert (image.format, image.n_frames, image.info["duration"]) == ("GIF", 4, 100)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "0"], "--steps is 0, wanted at least 1"),
        (["--dream-steps", "0"], "--dream-steps is 0, wanted at least 1"),
        (["--fps", "0"], "--fps is 0.0, wanted more than 0"),
        (["--fps", "nan"], "--fps is nan, wanted more than 0"),
        (["--out", "film.avi"], "the film film.avi has the ending '.avi'; wanted .mp4 or .gif"),
        (["--temperature", "-1"], "evaluation.temperature is -1.0, wanted at least 0"),
        (["--step", "1"], "holds no checkpoint 1; there are: 42"),
    ],
)
def test_wrong_use_is_explained_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    make_run(tmp_path / "run")
    before = files_in(tmp_path)
    assert main(["record", str(tmp_path / "run"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert files_in(tmp_path) == before


def test_the_game_is_shown_as_it_was_played(moments: list[Moment]) -> None:
    """A ball falls a cell a step and lands after five; then the next game begins."""
    assert [moment.step for moment in moments] == list(range(13))
    rows = [int(np.argwhere((moment.frame == BALL).all(axis=-1))[0, 0]) // 4 for moment in moments]
    assert rows == [0, 1, 2, 3, 4] * 2 + [0, 1, 2]
    assert all((moment.frame == PADDLE).all(axis=-1).sum() == 16 for moment in moments)
    over = [moment.step for moment in moments if moment.latest is not None and moment.latest.ended]
    assert over == [5, 10]
    assert all(moments[step].latest.game_return == moments[step].latest.reward != 0 for step in over)
    assert moments[0].latest is None
    assert {moment.latest.action for moment in moments[1:]} <= {"left", "stay", "right"}


def test_a_game_is_shown_to_its_last_frame(moments: list[Moment]) -> None:
    endings = [moment.ending for moment in moments if moment.ending is not None]
    assert [ending.step for ending in endings] == [5, 10]
    for ending in endings:
        row = int(np.argwhere((ending.frame == BALL).all(axis=-1))[0, 0]) // 4
        assert row == 5, "the ball has landed"
        assert ending.latest is not None
        assert ending.latest.ended
        assert ending.dream_step > 0, "what it believes of that frame, not of the next game"


def test_the_middle_shows_what_the_tokens_keep(trained: TrainedAgent, moments: list[Moment]) -> None:
    for moment in moments:
        tokens = trained.agent.tokenizer.encode(torch.as_tensor(moment.frame)[None])
        assert (moment.decoded == trained.agent.tokenizer.decode(tokens)[0].numpy()).all()


def test_the_world_model_is_shown_the_game_now_and_then(moments: list[Moment]) -> None:
    # After each game, and two steps after it was shown the last time; games have five steps.
    assert [moment.dream_step for moment in moments] == [0, 1, 2, 0, 1] * 2 + [0, 1, 2]
    for moment in moments:
        if moment.dream_step == 0:
            assert (moment.imagined == moment.decoded).all()
            assert not moment.dream_over


def test_imagination_is_told_the_actions_taken_and_the_past_of_the_episode(
    trained: TrainedAgent, moments: list[Moment], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    told: list[int] = []

    class Overheard(ImaginedEnv):
        def reset(
            self,
            tokens: Tensor,
            context_tokens: Tensor | None = None,
            context_actions: Tensor | None = None,
            context_mask: Tensor | None = None,
        ) -> Tensor:
            shown.append((tokens, context_tokens, context_actions))
            return super().reset(tokens, context_tokens, context_actions, context_mask)

        def step(self, actions: Tensor) -> object:
            told.append(int(actions))
            return super().step(actions)

    monkeypatch.setattr(side_by_side, "ImaginedEnv", Overheard)
    two_frames = replace(trained.config.controller, context_frames=2)
    config = replace(trained.config, controller=two_frames)
    list(play(trained.agent, config, steps=12, dream_steps=DREAM_STEPS, seed=0))
    names = ["left", "stay", "right"]
    assert [names[action] for action in told[:12]] == [moment.latest.action for moment in moments[1:]]

    def tokens_of(*steps: int) -> Tensor:
        frames = np.stack([moments[step].frame for step in steps])
        return trained.agent.tokenizer.encode(torch.as_tensor(frames))

    # Shown at steps 0, 3, 5, 8 and 10: at the start of a game there is no past, later two steps of it.
    for place, step in enumerate((0, 3, 5, 8, 10)):
        tokens, past, actions = shown[place]
        assert torch.equal(tokens, tokens_of(step))
        if step % 5 == 0:
            assert past is None
        else:
            assert torch.equal(past[0], tokens_of(step - 2, step - 1))
            assert actions.tolist() == [told[step - 2 : step]]


def test_the_same_seed_films_the_same_another_one_something_else(
    trained: TrainedAgent, moments: list[Moment]
) -> None:
    for seed, same in ((0, True), (1, False)):
        again = play(trained.agent, trained.config, steps=12, dream_steps=DREAM_STEPS, seed=seed)
        pairs = zip(moments, again, strict=True)
        assert (
            all(
                (one.frame == other.frame).all() and (one.imagined == other.imagined).all()
                for one, other in pairs
            )
            is same
        )


def test_dreams_are_as_long_as_the_training_sequences() -> None:
    assert default_dream_steps(DEBUG) == 3
    short = replace(DEBUG, world_model=replace(DEBUG.world_model, sequence_blocks=1))
    assert default_dream_steps(short) == 1


def test_a_picture_holds_the_three_panels_with_square_pixels(moments: list[Moment]) -> None:
    moment = replace(moments[4], dream_over=False)
    picture = draw(moment, DREAM_STEPS)
    assert (picture.shape, picture.dtype) == ((24 + 264 + 44, 3 * (264 + GAP) + GAP, 3), np.uint8)
    for place, frame in enumerate((moment.frame, moment.decoded, moment.imagined)):
        left = GAP + place * (264 + GAP)
        panel = picture[HEADING : HEADING + 264, left : left + 264]
        assert (panel[5::11, 5::11] == frame).all()
        assert (panel[::11, ::11] == frame).all()


def test_what_follows_an_imagined_end_is_pale(moments: list[Moment]) -> None:
    over = draw(replace(moments[1], dream_over=True, imagined=np.zeros_like(moments[1].frame)), DREAM_STEPS)
    left = GAP + 2 * (264 + GAP)
    assert (over[HEADING : HEADING + 264, left : left + 264] == 191).all()


def test_a_minus_is_drawn_for_a_loss(moments: list[Moment]) -> None:
    """The caption is text in the picture: it differs where the reward does."""
    step = RealStep(action="left", reward=-1.0, game_return=-1.0, ended=True)
    pictures = [draw(replace(moments[1], latest=replace(step, reward=r)), DREAM_STEPS) for r in (-1.0, 1.0)]
    assert (pictures[0] != pictures[1]).any()
    assert (pictures[0][: HEADING + 264] == pictures[1][: HEADING + 264]).all()


def pictures(number: int, shape: tuple[int, int] = (15, 17)) -> Iterator[np.ndarray]:
    for value in range(number):
        yield np.full((*shape, 3), 40 * value, np.uint8)


def test_an_mp4_holds_every_picture_at_an_even_size(tmp_path: Path) -> None:
    save_video(tmp_path / "film.mp4", pictures(5), fps=7.5)
    stream = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    about = next(stream)
    assert (about["size"], about["fps"]) == ((18, 16), 7.5)
    shown = [np.frombuffer(frame, np.uint8).mean() for frame in stream]
    assert shown == pytest.approx([0, 40, 80, 120, 160], abs=3)


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_a_film_that_fails_leaves_the_earlier_one(tmp_path: Path, name: str) -> None:
    save_video(tmp_path / name, pictures(2), fps=5)
    before = (tmp_path / name).read_bytes()

    def broken() -> Iterator[np.ndarray]:
        yield from pictures(2)
        yield np.zeros((3, 3, 3), np.uint8)

    with pytest.raises(ValueError, match=r"picture 2 is \(3, 3, 3\), the first one \(15, 17, 3\)"):
        save_video(tmp_path / name, broken(), fps=5)
    with pytest.raises(ValueError, match="there are no pictures"):
        save_video(tmp_path / name, iter(()), fps=5)
    assert (tmp_path / name).read_bytes() == before
    assert files_in(tmp_path) == {name}


def test_what_the_system_refuses_is_said_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"\.mp4 cannot be written: File name too long"):
        save_video(tmp_path / f"{'x' * 245}.mp4", pictures(1), fps=5)


def test_what_ffmpeg_cannot_write_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"the film .*film\.mp4 cannot be written: File exists"):
        save_video(tmp_path / "file" / "film.mp4", pictures(1), fps=5)

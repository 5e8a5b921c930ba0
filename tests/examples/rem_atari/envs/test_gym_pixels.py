"""Any gymnasium environment with pixels: which ones, what is refused, repeated actions, bounds, resuming."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from PIL import Image

from rem_atari.config import EnvConfig
from rem_atari.envs import UnknownGameError, list_games, make_env
from rem_atari.envs.env_options import parse_kwargs
from rem_atari.envs.env_state import load_env, save_env
from rem_atari.envs.vector import VectorEnv
from rem_atari.errors import RunWarning

PICTURES = Box(0, 255, (12, 18, 3), np.uint8)


class Game(gymnasium.Env):
    """Counts its steps and ends after `length`; rewards and pictures come from the count."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012 (gymnasium's attribute)
    observation_space: gymnasium.Space = Box(0, 1000, (1,), np.float32)
    action_space: gymnasium.Space = Discrete(3)

    def __init__(self, length: int = 1000, render_mode: str | None = None) -> None:
        self.length, self.render_mode = length, render_mode
        self.count = 0
        self.actions: list[int] = []

    def observe(self) -> np.ndarray:
        return np.array([self.count], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.count = int(self.np_random.integers(100))
        self.start = self.count
        return self.observe(), {}

    def step(self, action: int):
        self.count += 1
        self.actions.append(action)
        return self.observe(), float(self.count), self.count - self.start >= self.length, False, {}

    def render(self) -> Any:
        assert self.render_mode == "rgb_array"
        return picture(self.count)


class Filmed(Game):
    """Shows its picture, darkened, as the observation too."""

    observation_space = PICTURES

    def observe(self) -> np.ndarray:
        return picture(self.count) // 2


class Resumable(Game):
    """Tells its state."""

    def get_resume_state(self) -> dict[str, Any]:
        return {"count": self.count, "start": self.start}

    def set_resume_state(self, state: dict[str, Any]) -> None:
        self.count, self.start = state["count"], state["start"]


def picture(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(256, size=(12, 18, 3), dtype=np.uint8)


def resized(image: np.ndarray, size: int = 8) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The games above under "pixels/<name>-v0"; what a test registers is gone after it."""
    list_games()  # ale-py registers its games once in a process, when it is first imported
    before = dict(gymnasium.registry)
    for game in (Game, Filmed, Resumable):
        gymnasium.register(f"pixels/{game.__name__}-v0", entry_point=game)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(before)


def register(game: Any, **changes: Any) -> EnvConfig:
    """The configuration of a game registered for one test."""
    name = f"pixels/Tried{len(gymnasium.registry)}-v0"
    gymnasium.register(name, entry_point=game, **changes)
    return EnvConfig(id=name, frame_size=8)


def config(name: str, **changes: Any) -> EnvConfig:
    return EnvConfig(**{"id": f"pixels/{name}-v0", "frame_size": 8, **changes})


# --- which pixels -----------------------------------------------------------------------------------------


def test_rendered_pictures_are_the_frames_of_a_game_without_images() -> None:
    env = make_env(config("Game"), training=True)
    assert env.observation_space == Box(0, 255, (8, 8, 3), np.uint8)
    frame, _ = env.reset(seed=3)
    count = env.unwrapped.count
    np.testing.assert_array_equal(frame, resized(picture(count)))
    for _ in range(3):
        frame, reward, *_ = env.step(1)
        count += 1
        assert reward == count
        np.testing.assert_array_equal(frame, resized(picture(count)))


def test_images_that_are_observed_are_taken_before_rendered_ones() -> None:
    env = make_env(config("Filmed"), training=True)
    frame, _ = env.reset(seed=3)
    np.testing.assert_array_equal(frame, resized(picture(env.unwrapped.count) // 2))
    assert env.unwrapped.render_mode is None


def test_games_repeat_with_their_seed() -> None:
    def first_frames(seed: int) -> np.ndarray:
        envs = VectorEnv(lambda: make_env(config("Game"), training=True), 3, seed=seed)
        frames = envs.reset()
        envs.close()
        return frames

    assert (first_frames(1) == first_frames(1)).all()
    assert (first_frames(1) != first_frames(2)).any()
    assert len(np.unique(first_frames(1), axis=0)) == 3


def test_a_module_named_in_the_id_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_pixel_game.py").write_text(
        "import gymnasium\n"
        "from rem_atari.envs.catch import Catch\n"
        "gymnasium.register('MyCatch-v0', entry_point=Catch)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = make_env(EnvConfig(id="my_pixel_game:MyCatch-v0", frame_size=24), training=True)
    assert env.reset(seed=0)[0].shape == (24, 24, 3)
    for name in ("no_such_module:MyCatch-v0", "my_pixel_game:Missing-v0", "not an id"):
        with pytest.raises(UnknownGameError, match=rf"no gymnasium environment '{name}': .+"):
            make_env(EnvConfig(id=name), training=True)


# --- what is refused --------------------------------------------------------------------------------------


def test_a_game_without_pixels_is_refused() -> None:
    class Blind(Game):
        metadata = {"render_modes": ["human", "ansi"]}  # noqa: RUF012

    message = r"-v0: the observation space is Box.*wanted RGB images.*'rgb_array' \(it has human, ansi\)"
    with pytest.raises(ValueError, match=message):
        make_env(register(Blind), training=True)


@pytest.mark.parametrize(
    ("actions", "named"),
    [
        (Box(-1, 1, (1,), np.float32), "Box"),
        (MultiDiscrete([2, 2]), "Multi"),
        (Discrete(3, start=1), "start=1"),
    ],
)
@pytest.mark.parametrize("kind", [Game, Filmed])
def test_other_actions_are_refused(kind: type[Game], actions: gymnasium.Space, named: str) -> None:
    class Steered(kind):
        action_space = actions

    with pytest.raises(ValueError, match=f"the action space is .*{named}.*wanted Discrete, counting from 0"):
        make_env(register(Steered), training=True)


@pytest.mark.parametrize(
    ("rendered", "named"),
    [
        (None, "NoneType"),
        (np.zeros((3, 12, 18), np.uint8), r"an array uint8 \(3, 12, 18\)"),
        (np.zeros((12, 18, 3)), r"an array float64 \(12, 18, 3\) from 0 to 0"),
        ([], "list"),
    ],
)
def test_what_is_rendered_must_be_a_picture(rendered: object, named: str) -> None:
    class Odd(Game):
        def render(self) -> object:
            return rendered

    with pytest.raises(ValueError, match=rf"-v0: render\(\) gives {named}"):
        make_env(register(Odd, disable_env_checker=True), training=True)


def test_gray_and_rgba_pictures_are_taken() -> None:
    rgb = picture(3)
    kinds = {
        "gray": (rgb[..., 0], rgb[..., [0, 0, 0]]),
        "one channel": (rgb[..., :1], rgb[..., [0, 0, 0]]),
        "RGBA": (np.concatenate([rgb, rgb[..., :1]], axis=2), rgb),
    }
    for shown, wanted in kinds.values():

        class Seen(Game):
            observation_space = Box(0, 255, shown.shape, np.uint8)

            def observe(self, shown: np.ndarray = shown) -> np.ndarray:
                return shown

        class Rendered(Game):
            def render(self, shown: np.ndarray = shown) -> np.ndarray:
                return shown

        for kind in (Seen, Rendered):
            frame, _ = make_env(register(kind), training=True).reset(seed=0)
            np.testing.assert_array_equal(frame, resized(wanted))


@pytest.mark.parametrize(
    "space",
    [Box(0, 255, (7, 7, 3), np.uint8), Box(0, 10, (12, 18, 3), np.uint8), Box(0, 255, (3, 12, 18), np.uint8)],
)
def test_symbols_are_not_taken_for_pictures(space: Box) -> None:
    class Symbols(Game):
        observation_space = space

        def observe(self) -> np.ndarray:
            return np.zeros(space.shape, np.uint8)

    env = make_env(register(Symbols), training=True)
    frame, _ = env.reset(seed=0)
    np.testing.assert_array_equal(frame, resized(picture(env.unwrapped.count)))


# --- how it is made ---------------------------------------------------------------------------------------


def test_rendering_can_be_asked_for() -> None:
    env = make_env(config("Filmed", render=True), training=True)
    frame, _ = env.reset(seed=3)
    np.testing.assert_array_equal(frame, resized(picture(env.unwrapped.count)))


def test_keyword_arguments_reach_the_game() -> None:
    for words in (("length=2",), ('{"length": 2}',)):
        env = make_env(config("Game", kwargs=words), training=True)
        assert env.unwrapped.length == 2
    assert parse_kwargs(("a=1", "b=x y", '{"c": [1]}', "d=")) == {"a": 1, "b": "x y", "c": [1], "d": ""}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("length",), "'length' is neither key=value nor a JSON object"),
        (("{length: 2}",), "'{length: 2}' is no JSON object"),
        (("length=2", '{"length": 3}'), "has length twice"),
        (("size=2",), r"Game-v0 cannot be made with \{'size': 2\}: it raised TypeError: .*'size'"),
    ],
)
def test_keyword_arguments_that_do_not_fit_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(config("Game", kwargs=words), training=True)


class Doubled(gymnasium.RewardWrapper):
    def reward(self, reward: float) -> float:
        return 2 * reward


def test_a_wrapper_can_be_put_around_the_game() -> None:
    env = make_env(config("Game", wrapper=f"{__name__}:Doubled"), training=True)
    env.reset(seed=0)
    assert env.step(0)[1] == 2 * env.unwrapped.count


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("Doubled", "wanted module:Name"),
        ("no_such_module:Doubled", "wanted module:Name .*no_such_module"),
        (f"{__name__}:Missing", "wanted module:Name .*Missing"),
        ("builtins:str", "builtins:str gave a str, wanted a gymnasium.Env"),
        ("operator:neg", "operator:neg raised TypeError"),
        ("sys:exit", "sys:exit raised SystemExit"),
        ("broken_wrapper:Any", "broken_wrapper:Any cannot be imported: it raised SyntaxError"),
        ("leaving_wrapper:Any", "leaving_wrapper:Any cannot be imported: it raised SystemExit: 3"),
    ],
)
def test_what_is_no_wrapper_is_refused(
    wrapper: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_wrapper.py").write_text("def Any(:")
    (tmp_path / "leaving_wrapper.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_env(config("Game", wrapper=wrapper), training=True)


@pytest.mark.parametrize("wrapper", ["beside_wrapper", "beside_package.wrappers"])
def test_a_wrapper_in_the_current_folder_is_hinted_at(
    wrapper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_wrapper.py").touch()
    (tmp_path / "beside_package").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [folder for folder in sys.path if folder])
    with pytest.raises(ValueError, match=r"`python -m rem_atari` .* finds beside_\w+(\.py)? in the current"):
        make_env(config("Game", wrapper=f"{wrapper}:Any"), training=True)


def test_a_wrapper_that_needs_rendering_has_it() -> None:
    name = "gymnasium.wrappers:AddRenderObservation"
    env = make_env(config("Game", wrapper=name, render=True), training=True)
    frame, _ = env.reset(seed=3)
    np.testing.assert_array_equal(frame, resized(picture(env.unwrapped.count)))


@pytest.mark.parametrize("option", [{"kwargs": ("a=1",)}, {"wrapper": "a:B"}, {"render": True}])
@pytest.mark.parametrize("name", [None, "MinAtar/Breakout-v1"])
def test_options_of_other_environments_are_not_ignored(name: str | None, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"env.{next(iter(option))} is .*Breakout.* takes none"):
        make_env(EnvConfig(id=name, **option), training=True)


def test_a_game_that_cannot_be_made_is_named() -> None:
    class Leaving(Game):
        def __init__(self, **options: Any) -> None:
            raise SystemExit("no licence")

    with pytest.raises(ValueError, match="-v0 cannot be made: it raised SystemExit: no licence"):
        make_env(register(Leaving), training=True)


def test_a_package_that_rendering_needs_is_missed_at_once() -> None:
    class Heavy(Game):
        def render(self) -> None:
            raise gymnasium.error.DependencyNotInstalled("pygame is not installed")

    with pytest.raises(ValueError, match="-v0 cannot be rendered: pygame is not installed"):
        make_env(register(Heavy), training=True)

    class Heavier(Game):
        def __init__(self, **options: Any) -> None:
            raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    with pytest.raises(ValueError, match="-v0 cannot be made: MuJoCo is not installed"):
        make_env(register(Heavier), training=True)


@pytest.mark.parametrize("method", ["reset", "render"])
@pytest.mark.parametrize("error", [RuntimeError("no display"), SystemExit("no display")])
def test_a_game_that_fails_before_it_begins_is_named(method: str, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    class Failing(Game):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
            return super().reset(seed=seed)

    setattr(Failing, method, fail)
    told = f"-v0 cannot be reset and rendered: it raised {type(error).__name__}: no display"
    with pytest.raises(ValueError, match=told):
        make_env(register(Failing), training=True)


@pytest.mark.parametrize("attribute", ["observation_space", "action_space"])
def test_a_game_without_a_space_is_refused(attribute: str) -> None:
    class Spaceless(Filmed):
        pass

    setattr(Spaceless, attribute, None)
    with pytest.raises(ValueError, match=f"-v0: its {attribute} is NoneType None; wanted a gymnasium.Space"):
        make_env(register(Spaceless), training=True)


def test_it_is_said_what_the_agent_sees() -> None:
    def sees(cfg: EnvConfig) -> str:
        return VectorEnv(lambda: make_env(cfg, training=True), 1, seed=0).sees

    assert sees(config("Game")) == "what the game renders, 18 x 12, not Box(1,), as 8 x 8 pixels"
    assert sees(config("Filmed")) == "the game's images, 18 x 12, as 8 x 8 pixels"
    assert (
        sees(EnvConfig(game="Breakout", frame_size=16)) == "the game's images, 160 x 210, as 16 x 16 pixels"
    )


# --- repeated actions and bounds --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Game", "Filmed"])
def test_a_repeated_action_adds_rewards_up_and_shows_the_last_frame(name: str) -> None:
    env = make_env(config(name, action_repeat=3), training=True)
    env.reset(seed=0)
    start = env.unwrapped.count
    frame, reward, terminated, truncated, _ = env.step(2)
    assert env.unwrapped.actions == [2, 2, 2]
    assert reward == 3 * start + 6
    assert (terminated, truncated) == (False, False)
    shown = picture(start + 3)
    np.testing.assert_array_equal(frame, resized(shown if name == "Game" else shown // 2))


def test_a_repeated_action_stops_where_the_episode_does() -> None:
    cfg = register(Game, kwargs={"length": 5})
    env = make_env(EnvConfig(**{**vars(cfg), "action_repeat": 3}), training=True)
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(0)[2:4] == (True, False)
    assert len(env.unwrapped.actions) == 5
    env.reset()
    assert env.step(0)[2:4] == (False, False)


@pytest.mark.parametrize(("training", "steps"), [(True, 5), (False, 7)])
def test_the_bound_counts_the_games_own_steps_and_truncates(training: bool, steps: int) -> None:
    cfg = config("Game", action_repeat=2, max_raw_frames=5, eval_max_raw_frames=7)
    env = make_env(cfg, training=training)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range((steps + 1) // 2)]
    assert ends == [(False, False)] * (len(ends) - 1) + [(False, True)]
    assert len(env.unwrapped.actions) == steps


def test_a_games_own_end_and_its_time_limit_are_told_apart() -> None:
    cfg = register(Game, kwargs={"length": 3}, max_episode_steps=2)
    envs = VectorEnv(lambda: make_env(cfg, training=True), 2, seed=0)
    envs.reset()
    envs.step([0, 0])
    step = envs.step([0, 0])
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([False, False], [True, True])
    cfg = register(Game, kwargs={"length": 2})
    envs = VectorEnv(lambda: make_env(cfg, training=True), 2, seed=0)
    envs.reset()
    envs.step([0, 0])
    step = envs.step([0, 0])
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([True, True], [False, False])


# --- resuming ---------------------------------------------------------------------------------------------


def test_a_game_that_tells_its_state_goes_on_elsewhere() -> None:
    cfg = config("Resumable", action_repeat=2, max_raw_frames=9)
    env, other = make_env(cfg, training=True), make_env(cfg, training=True)
    env.reset(seed=5)
    env.step(0)
    load_env(other, json.loads(json.dumps(save_env(env))))
    for _ in range(4):
        ours, theirs = env.step(1), other.step(1)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:4] == theirs[1:4]
    assert ours[3], "the bound counts the steps from before"


def test_a_game_that_does_not_is_not_saved() -> None:
    env = make_env(config("Game"), training=True)
    env.reset(seed=0)
    assert save_env(env) is None


@pytest.mark.parametrize("state", [RuntimeError("not now"), {"count": np.int64(3)}, {"board": np.zeros(2)}])
def test_a_state_that_cannot_be_told_is_said_once_and_ends_nothing(state: Any) -> None:
    class Telling(Resumable):
        def get_resume_state(self) -> dict[str, Any]:
            if isinstance(state, Exception):
                raise state
            return state

    cfg = register(Telling)
    with closing(VectorEnv(lambda: make_env(cfg, training=True), 1, seed=0)) as envs:
        envs.reset()
        with pytest.warns(RunWarning, match=r"-v0: get_resume_state\(\) gives no JSON data: .+") as told:
            assert [envs.resume_states() for _ in range(2)] == [[None], [None]]
        assert len(told) == 1
        assert not envs.step([0]).lost.any()

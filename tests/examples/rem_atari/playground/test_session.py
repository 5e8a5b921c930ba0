"""A session goes back, branches and enters recordings, and its dreams are those of the agent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from play_stages import make_test_stage

from rem_atari.playground import session as session_module
from rem_atari.playground.games import KeptStarts, ReplayedGames
from rem_atari.playground.server import Stage
from rem_atari.playground.session import Moment, RequestError, Session
from rem_atari.replay.starts import Starts

CATCH_STEPS = 5
"""Steps of a game of Catch."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_test_stage(tmp_path_factory.mktemp("play") / "run")


@pytest.fixture
def session(stage: Stage) -> Iterator[Session]:
    session = make_session(stage)
    yield session
    session.close()


def make_session(stage: Stage, seed: int = 3) -> Session:
    return Session(stage.agent, stage.open_game(seed), stage.recorded, seed)


def play(session: Session, start: Moment, actions: list[int], *, likely: bool = False) -> list[Moment]:
    moments = [start]
    for action in actions:
        moments.append(session.step(moments[-1].number, action, likely=likely, anew=False))
    return moments


def same_sides(one: Moment, other: Moment) -> bool:
    return bool((one.game.frame == other.game.frame).all() and (one.dream.frame == other.dream.frame).all())


@pytest.mark.parametrize("likely", [False, True])
def test_a_dream_is_the_agents_own(stage: Stage, session: Session, likely: bool) -> None:
    agent, start = stage.agent, session.start()
    dream = agent.dream(start.game.frame, seed=start.dream.dream.seed)
    for moment, action in zip(play(session, start, [0, 2, 1], likely=likely)[1:], [0, 2, 1], strict=True):
        dream = agent.imagine(dream, action, temperature=0.0 if likely else 1.0)
        assert (moment.dream.frame == agent.decode(dream.tokens)[0]).all()
        assert moment.dream.dream.reward_chances.tolist() == dream.reward_chances.tolist()
        assert moment.action == action
    assert (moment.step, moment.dream.dream.steps) == (3, 3)


def test_game_and_dream_begin_at_the_same_frame_and_take_the_same_actions(session: Session) -> None:
    start = session.start()
    assert (start.game.frame == start.dream.frame).all()
    moments = play(session, start, [1] * CATCH_STEPS)
    assert [moment.game.over for moment in moments] == [False] * CATCH_STEPS + [True]
    assert moments[-1].game.total == moments[-1].game.reward != 0
    assert not moments[-1].over, "the dream goes on"
    further = session.step(moments[-1].number, 1, likely=False, anew=False)
    assert further.game.reward == 0
    assert further.dream.dream.steps == CATCH_STEPS + 1


def test_the_same_step_leads_to_the_same_moment_and_another_one_branches(session: Session) -> None:
    first = play(session, session.start(), [0, 0, 1])
    again = session.step(first[1].number, 0, likely=False, anew=False)
    assert again is first[2]
    other = session.step(first[1].number, 2, likely=False, anew=False)
    assert other.parent == first[2].parent == first[1].number
    assert not same_sides(other, first[2])


def test_a_live_game_goes_back_exactly(stage: Stage) -> None:
    """From a moment of the past the game does what it would have done without what came after it."""
    one, other = make_session(stage), make_session(stage)
    went_back = play(one, play(one, one.start(), [0, 0])[0], [2, 2, 1, 1, 1])
    straight = play(other, other.start(), [2, 2, 1, 1, 1])
    assert all(map(same_sides, went_back, straight))
    assert went_back[-1].game.total == straight[-1].game.total
    one.close()
    other.close()


def test_a_step_taken_anew_draws_by_another_seed(session: Session) -> None:
    start = session.start()
    futures = [session.step(start.number, 1, likely=False, anew=True) for _ in range(6)]
    assert len({future.number for future in futures}) == 6
    assert len({future.dream.frame.tobytes() for future in futures}) > 1
    assert len({future.game.frame.tobytes() for future in futures}) == 1


def test_the_agent_acts_by_what_it_sees_on_a_side(stage: Stage, session: Session) -> None:
    agent, moments = stage.agent, play(session, session.start(), [0, 2])
    game, dream = agent.start(1, seed=3), agent.start(1, seed=3)
    for moment in moments[:-1]:
        game = agent.observe_action(
            moments[moment.step + 1].action, agent.judge(moment.game.frame, game).memory
        )
        seen = moment.dream.dream if moment.step else moment.game.frame
        dream = agent.observe_action(moments[moment.step + 1].action, agent.judge(seen, dream).memory)
    last = moments[-1]
    by_game = session.step(last.number, "game", likely=False, anew=False)
    by_dream = session.step(last.number, "dream", likely=False, anew=False)
    assert by_game.action == agent.act(last.game.frame, game)[0]
    assert by_dream.action == agent.act(last.dream.dream, dream)[0][0]


def test_starts_go_on_step_by_step() -> None:
    frames = np.arange(4, dtype=np.uint8).repeat(12).reshape(4, 1, 2, 2, 3)
    starts = Starts.at(frames[0])
    for step, action in enumerate((7, 8, 9), start=1):
        starts = starts.after([action], frames[step], 3)
    assert starts.frames[0, :, 0, 0, 0].tolist() == [1, 2, 3]
    assert starts.actions.tolist() == [[8, 9, 0]]
    assert starts.mask.tolist() == [[True] * 3]


def test_a_dream_can_be_shown_the_game_again(session: Session) -> None:
    last = play(session, session.start(), [0, 2])[-1]
    seen = session.look(last.number)
    assert (seen.parent, seen.step, seen.action) == (last.parent, last.step, last.action)
    assert seen.dream.dream.steps == 0
    assert (seen.dream.frame == last.game.frame).all()
    assert seen.game.recent.frames.shape[1] == 2, "the world model reads the frame before it"


def test_a_recording_is_followed_as_long_as_its_actions_are_taken(stage: Stage, session: Session) -> None:
    recorded = stage.recorded
    assert isinstance(recorded, ReplayedGames)
    assert len(recorded) == 60
    frames = recorded.frames(0, CATCH_STEPS)
    start = session.start_at(1)
    assert (start.game.recent.frames[0, -2:] == frames[:2]).all()
    futures = [session.step(start.number, action, likely=False, anew=False) for action in range(3)]
    followed = [future for future in futures if future.game is not None]
    assert len(followed) == 1
    assert (followed[0].game.frame == frames[2]).all()
    left = next(future for future in futures if future.game is None)
    assert "another action" in left.why_unknown
    assert session.step(left.number, 0, likely=False, anew=False).dream.dream.steps == 2
    with pytest.raises(RequestError, match="no game here"):
        session.look(left.number)


def test_a_recorded_game_ends_where_its_recording_does(stage: Stage, session: Session) -> None:
    start = session.start_at(CATCH_STEPS - 1)
    ends = [session.step(start.number, action, likely=False, anew=False).game for action in range(3)]
    (end,) = (game for game in ends if game is not None)
    assert end.over
    assert end.reward in (-1, 1)


def test_of_kept_starts_nothing_is_known_but_the_frame(stage: Stage) -> None:
    kept = KeptStarts(stage.agent.starts)
    session = Session(stage.agent, stage.open_game(0), kept, 0)
    start = session.start_at(7)
    assert (start.game.frame == kept.frames(7, 1)[0]).all()
    after = session.step(start.number, 1, likely=True, anew=False)
    assert after.game is None
    assert after.dream.dream.steps == 1
    session.close()


def test_where_all_is_over_nothing_follows(stage: Stage, session: Session) -> None:
    last = play(session, session.start(), [1] * CATCH_STEPS)[-1]
    ended = replace(last.dream, dream=replace(last.dream.dream, ended=np.array([True])))
    over = session._keep(replace(last, dream=ended))
    with pytest.raises(RequestError, match="start a new game"):
        session.step(over.number, 1, likely=False, anew=False)
    with pytest.raises(RequestError, match="no game here"):
        session.look(over.number)
    assert session.start().step == 0


def test_the_oldest_moments_are_forgotten(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MOST_MOMENTS", 4)
    moments = play(session, session.start(), [0, 1, 2, 1, 0])
    assert session.oldest == 2
    assert session.path(moments[-1].number) == moments[2:]
    with pytest.raises(RequestError, match="forgotten: 4 are kept"):
        session.step(moments[1].number, 0, likely=False, anew=False)


def test_what_cannot_be_is_refused(tmp_path: Path, stage: Stage, session: Session) -> None:
    start = session.start()
    with pytest.raises(RequestError, match="action is 3; wanted 0 to 2"):
        session.step(start.number, 3, likely=False, anew=False)
    with pytest.raises(RequestError, match="no moment 99"):
        session.step(99, 0, likely=False, anew=False)
    with pytest.raises(RequestError, match="recorded frames are 0 to 59"):
        session.start_at(60)
    alone = make_test_stage(tmp_path / "run", replay=False)
    assert alone.recorded is None
    with pytest.raises(RequestError, match="without recorded frames"):
        Session(stage.agent, alone.open_game(0), alone.recorded, 0).start_at(0)


def test_new_games_do_not_depend_on_going_back(stage: Stage) -> None:
    one, other = make_session(stage), make_session(stage)
    starts = [session.start().game.frame for session in (one, other)]
    play(one, play(one, one._get(0), [0, 0, 1])[1], [2, 1])
    starts += [session.start().game.frame for session in (one, other)]
    assert (starts[0] == starts[1]).all()
    assert (starts[2] == starts[3]).all()
    one.close()
    other.close()

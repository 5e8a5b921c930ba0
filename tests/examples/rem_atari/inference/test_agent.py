"""A loaded agent acts as the trained one does, and its dreams are those of its world model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import DEBUG, add_replay, make_run

import rem_atari
from rem_atari.config import Config
from rem_atari.errors import UsageError
from rem_atari.inference.agent import LoadedAgent
from rem_atari.inference.loading import load_starts
from rem_atari.replay.buffer import Replay
from rem_atari.runs.folder import RunFolder
from rem_atari.runs.trained import read_trained

WORLD_MODELS = {
    "independent": {},
    "coupled": {"draw": "coupled"},
    "refine": {"draw": "refine"},
    "groups": {"draw": "groups"},
    "token by token": {"pop": False},
    "reward bins": {"reward_bins": 5},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = make_run(tmp_path_factory.mktemp("agent") / "run")
    add_replay(run)
    return run


@pytest.fixture(scope="module")
def agent(run: RunFolder) -> LoadedAgent:
    return rem_atari.load_agent(run.path)


@pytest.fixture(params=WORLD_MODELS)
def dreamer(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedAgent:
    """An agent with each kind of world model."""
    config = replace(DEBUG, world_model=replace(DEBUG.world_model, **WORLD_MODELS[request.param]))
    return load_fresh(tmp_path / "run", config)


def load_fresh(path: Path, config: Config) -> LoadedAgent:
    run = make_run(path, config)
    add_replay(run, steps=20)
    return rem_atari.load_agent(run.path)


def play(agent: LoadedAgent, steps: int) -> tuple[np.ndarray, list[int], list[np.ndarray], list[float]]:
    """Frames, actions, policies and values of a game of the agent."""
    env, memory = agent.make_env(), agent.start(seed=3)
    frames, actions, policies, values = [env.reset(seed=0)[0]], [], [], []
    for _ in range(steps):
        judged = agent.judge(frames[-1], memory)
        action, memory = agent.act(frames[-1], memory)
        policies.append(judged.policy[0])
        values.append(judged.values[0])
        actions.append(action)
        frames.append(env.step(action)[0])
    return np.stack(frames[:-1]), actions, policies, values


def test_it_acts_as_the_controller_that_sees_the_whole_game_at_once(agent: LoadedAgent) -> None:
    frames, actions, policies, values = play(agent, 5)
    networks = agent.networks
    seen = networks.show(networks.tokenizer.encode(torch.from_numpy(frames)))[None]
    with torch.no_grad():
        logits, critic = networks.controller.judge(
            seen, torch.tensor([actions]), networks.controller.initial_carry(1)
        )
    np.testing.assert_allclose(np.stack(policies), logits[0].softmax(-1), atol=1e-5)
    np.testing.assert_allclose(values, networks.controller.values(critic)[0], atol=1e-5)
    assert actions == play(agent, 5)[1]


def test_games_side_by_side_are_as_each_alone(agent: LoadedAgent) -> None:
    frames = agent.starts.frames[:3, -1]
    together, memory = agent.act(frames, agent.start(3), temperature=0)
    alone = [agent.act(frame, agent.start(1), temperature=0) for frame in frames]
    assert together.tolist() == [action for action, _ in alone]
    again = agent.judge(frames, memory).policy
    for row, (frame, (_, own)) in enumerate(zip(frames, alone, strict=True)):
        np.testing.assert_allclose(again[row], agent.judge(frame, own).policy[0], atol=1e-5)
        np.testing.assert_allclose(again[row], agent.judge(frame, memory.select(row)).policy[0], atol=1e-5)
    fresh = agent.judge(frames, memory.restart([True, False, True])).policy
    blank = agent.judge(frames, agent.start(3)).policy
    np.testing.assert_allclose(fresh[[0, 2]], blank[[0, 2]], atol=1e-5)
    np.testing.assert_allclose(fresh[1], again[1], atol=1e-5)


def test_it_remembers_real_steps_as_if_it_had_taken_them(agent: LoadedAgent) -> None:
    whole = np.flatnonzero(agent.starts.mask.all(axis=1))[:1]
    start = agent.starts.select(whole)
    memory = agent.start()
    for frame, action in zip(start.frames[0, :-1], start.actions[0, :-1], strict=True):
        memory = agent.observe_action(int(action), agent.judge(frame, memory).memory)
    remembered = agent.remember(start)
    for found, wanted in zip(remembered.carry, memory.carry, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_tokens_are_those_of_the_tokenizer(agent: LoadedAgent) -> None:
    frames = agent.starts.frames[:4, -1]
    tokens = agent.encode(frames)
    assert tokens.shape == (4, agent.networks.tokenizer.num_tokens)
    assert agent.encode(frames[1]).tolist() == tokens[1].tolist()
    shown = agent.networks.tokenizer.decode(torch.from_numpy(tokens)).numpy()
    assert np.array_equal(agent.decode(tokens), shown)
    assert np.array_equal(agent.decode(tokens[2].tolist()), shown[2])


def test_a_dream_says_what_the_world_model_makes_of_the_whole_sequence(agent: LoadedAgent) -> None:
    start = agent.starts.select(np.flatnonzero(agent.starts.mask.all(axis=1))[:2])
    dreams, actions = [agent.dream(start, seed=5)], [[0, 1], [2, 2], [1, 0]]
    for action in actions:
        dreams.append(agent.imagine(dreams[-1], action))
    networks = agent.networks
    before = agent.config.controller.context_frames
    past = networks.tokenizer.encode(torch.from_numpy(start.frames[:, -1 - before : -1]))
    tokens = torch.cat([past, torch.from_numpy(np.stack([dream.tokens for dream in dreams[:-1]], 1))], 1)
    taken = torch.cat([torch.from_numpy(start.actions[:, -1 - before : -1]), torch.tensor(actions).T], 1)
    with torch.no_grad():
        logits = networks.world_model(tokens, taken, networks.tokenizer.codes, skip_blocks=before)
    chances = np.stack([dream.reward_chances for dream in dreams[1:]], 1)
    np.testing.assert_allclose(chances, logits.rewards.softmax(-1), atol=1e-5)
    ends = np.stack([dream.end_chances for dream in dreams[1:]], 1)
    np.testing.assert_allclose(ends, logits.ends.softmax(-1)[..., 1], atol=1e-5)
    assert [dream.steps for dream in dreams] == [0, 1, 2, 3]


def test_a_dream_can_be_rewound_and_branches(dreamer: LoadedAgent) -> None:
    start = dreamer.dream(dreamer.starts.select([0]), seed=1)
    kept = start.tokens.copy()
    paths = {}
    for name, begin in (("first", start), ("again", start), ("other", start.with_seed(2))):
        dream = begin
        frames = [dream := dreamer.imagine(dream, 1) for _ in range(4)]
        paths[name] = [each.tokens.tolist() for each in frames]
    assert paths["first"] == paths["again"] != paths["other"]
    assert np.array_equal(start.tokens, kept)


def test_a_most_likely_dream_is_the_same_whatever_the_seed_and_the_company(dreamer: LoadedAgent) -> None:
    starts = dreamer.starts.select([0, 1, 2])
    together, branched = dreamer.dream(starts), dreamer.dream(starts, seed=9).select([2, 0, 2])
    alone = [dreamer.dream(starts.select([row]), seed=row) for row in range(3)]
    for action in (0, 2, 1):
        together = dreamer.imagine(together, action, temperature=0)
        branched = dreamer.imagine(branched, [action] * 3, temperature=0)
        alone = [dreamer.imagine(dream, action, temperature=0) for dream in alone]
    joined = type(together).cat(alone)
    assert np.array_equal(together.tokens, joined.tokens)
    assert np.array_equal(together.tokens[[2, 0, 2]], branched.tokens)
    np.testing.assert_allclose(together.expected_rewards, joined.expected_rewards, atol=1e-5)
    assert np.array_equal(together.ended, together.end_chances > 0.5)


def test_it_acts_in_its_dream(agent: LoadedAgent) -> None:
    starts = agent.starts.select([0, 1])
    dream, memory = agent.dream(starts), agent.remember(starts)
    for _ in range(3):
        action, memory = agent.act(dream, memory)
        dream = agent.imagine(dream, action)
    assert dream.steps == memory.steps == 3
    assert agent.imagine(starts.frames[0, -1], 1).steps == 1, "a dream may begin at a frame"


def test_wrong_arguments_are_named(agent: LoadedAgent) -> None:
    frame, memory = agent.starts.frames[0, -1], agent.start()
    for call, words in (
        (lambda: agent.act(frame[:8], memory), r"frame is uint8 \(8, 24, 3\); wanted uint8 \(24, 24, 3\)"),
        (lambda: agent.encode(frame / 255), r"encode\(\): the frame is float64"),
        (lambda: agent.act(agent.starts.frames[:2, -1], memory), "2 observations for a memory of 1 games"),
        (lambda: agent.act(frame, memory, temperature=-1), "temperature is -1"),
        (lambda: agent.act(frame, replace(memory, owner="")), r"judge\(\): memory is another agent's"),
        (lambda: agent.observe_action(0, replace(memory, owner="")), r"observe_action\(\): memory is anoth"),
        (lambda: agent.imagine(frame, 0, temperature=float("nan")), "temperature is nan"),
        (
            lambda: agent.imagine(replace(agent.dream(frame), tokens=np.zeros((1, 4), int)), 0),
            "another agent's",
        ),
        (lambda: agent.dream(frame).select([True]), r"indices is \[True\]"),
        (lambda: agent.starts.select([True]), r"indices is \[True\]"),
        (lambda: memory.select(0.5), "indices is 0.5"),
        (lambda: agent.start(1.5), "n is 1.5"),
        (lambda: agent.start(0), "n is 0"),
        (lambda: agent.start(seed=-1), "seed is -1"),
        (lambda: agent.decode([1, 2]), r"tokens is int64 \(2,\)"),
        (lambda: agent.decode([99] * 9), "wanted integers from 0 to 15"),
        (lambda: agent.imagine(agent.dream(frame), 3), "action is 3; wanted an integer from 0 to 2"),
        (lambda: agent.imagine(agent.dream(frame), [0, 1]), r"action is \[0, 1\]"),
        (lambda: agent.dream(frame, seed=0.5), "seed is 0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="memory is a NoneType; wanted a Memory"):
        agent.act(frame, None)
    with pytest.raises(TypeError, match="starts is a ndarray; wanted Starts"):
        agent.remember(frame)


def test_starts_are_moments_of_the_replay(run: RunFolder, agent: LoadedAgent) -> None:
    replay = Replay.load(run.replay)
    moments = replay.segments_at(replay.segment_ends(1), agent.config.controller.burn_in + 1)
    stored = {frames.tobytes() for frames in moments.frames.numpy()}
    found = [frames.tobytes() for frames in agent.starts.frames]
    assert len(found) == len(moments.mask)
    assert set(found) == stored
    assert len(load_starts(read_trained(run.path, step="newest", device=None, say=print), 7)) == 7
    assert agent.starts.mask[:, -1].all()


def test_an_agent_is_found_by_run_and_by_checkpoint(run: RunFolder, agent: LoadedAgent) -> None:
    single = rem_atari.load_agent(str(run.checkpoints / "step-00000042"))
    for name, tensor in agent.networks.state_dict().items():
        assert torch.equal(tensor, single.networks.state_dict()[name]), name
    assert single.config == agent.config
    assert agent.action_names == single.action_names == ("left", "stay", "right")
    with pytest.raises(UsageError, match="no checkpoint 7"):
        rem_atari.load_agent(run.path, checkpoint=7)
    with pytest.raises(ValueError, match="there is no agent 'nonsense'"):
        rem_atari.load_agent("nonsense")
    with pytest.raises(TypeError, match="source is 3"):
        rem_atari.load_agent(3)
    with pytest.raises(ValueError, match="holds no replay"):
        _ = single.starts


def test_the_package_names_what_a_user_needs_and_imports_it_late() -> None:
    program = "import json, sys, rem_atari; print(json.dumps([rem_atari.__version__, list(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    version, loaded = json.loads(done.stdout)
    assert version == rem_atari.__version__
    assert not {"torch", "numpy", "gymnasium", "retpop"} & set(loaded)
    assert all(getattr(rem_atari, name) is not None for name in rem_atari.__all__)
    assert set(rem_atari.__all__) <= set(dir(rem_atari))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rem_atari.nonsense

"""Generation: greedy text is the model's own in every mode, and sampling draws from what it says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from retpop import RetNetConfig
from retpop.models import RetNetLM, RetNetLMConfig
from retpop.models.generation import Sampling

V = 11
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 0, 1, 2]]
MODES = ("parallel", "chunkwise", "recurrent")


@pytest.fixture(scope="module")
def model() -> RetNetLM:
    torch.manual_seed(6)  # a model whose greedy text varies
    decoder = RetNetConfig(embed_dim=16, num_heads=2, num_layers=2, ffn_dim=16, final_norm=True)
    return RetNetLM(RetNetLMConfig(vocab_size=V, decoder=decoder), dtype=torch.float64)


def greedy(model: RetNetLM, prompt: list[int], new: int) -> list[int]:
    """The definition: the whole text is read again for every token."""
    text = list(prompt)
    for _ in range(new):
        text.append(int(model(torch.tensor([text]))[0][0, -1].argmax()))
    return text


def as_lists(rows: list[Tensor] | Tensor) -> list[list[int]]:
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("mode", MODES)
def test_greedy_text_of_ragged_prompts_is_each_prompts_own(model: RetNetLM, mode: str) -> None:
    found = model.generate(PROMPTS, 12, temperature=0, mode=mode)
    assert as_lists(found) == [greedy(model, prompt, 12) for prompt in PROMPTS]


def test_a_tensor_of_prompts_gives_a_tensor(model: RetNetLM) -> None:
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = model.generate(prompts, 12, temperature=0)
    assert isinstance(found, Tensor)
    assert as_lists(found) == as_lists(model.generate(list(prompts), 12, temperature=0))


def test_a_row_ends_with_eos(model: RetNetLM) -> None:
    whole = [greedy(model, prompt, 12)[len(prompt) :] for prompt in PROMPTS]
    eos = next(token for token in whole[0][3:] if token not in whole[0][:3])
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in whole]
    found = as_lists(model.generate(PROMPTS, 12, temperature=0, eos=eos))
    assert [row[len(prompt) :] for row, prompt in zip(found, PROMPTS, strict=True)] == expected

    length = max(map(len, expected))
    padded = [row + [eos] * (length - len(row)) for row in expected]
    steps = list(model.stream(PROMPTS, 12, temperature=0, eos=eos))
    assert torch.stack([step.tokens for step in steps], dim=1).tolist() == padded
    ended = torch.stack([step.ended for step in steps], dim=1)
    assert torch.equal(ended, (torch.tensor(padded) == eos).cummax(dim=1).values)


def test_a_step_holds_the_state_before_its_tokens(model: RetNetLM) -> None:
    steps = list(model.stream(PROMPTS, 6, temperature=0))
    rest = torch.stack([step.tokens for step in steps[2:]], dim=1)
    again = model.generate(steps[2].tokens[:, None], 3, temperature=0, state=steps[2].state)
    assert torch.equal(again, rest)
    for step, following in pairwise(steps):
        assert torch.equal(following.state.position, step.state.position + 1)


def test_prompts_may_continue_a_state(model: RetNetLM) -> None:
    _, state = model(torch.tensor([[1, 2], [3, 4]]))
    found = as_lists(model.generate([[5], [6, 7]], 5, temperature=0, state=state))
    assert found == [greedy(model, [1, 2, 5], 5)[2:], greedy(model, [3, 4, 6, 7], 5)[2:]]


def test_no_gradients_are_kept_and_the_callers_mode_returns(model: RetNetLM) -> None:
    for step in model.stream([[1, 2]], 3):
        assert torch.is_grad_enabled()
        assert not step.state.kv.requires_grad


def test_a_generator_decides(model: RetNetLM) -> None:
    first, second, other = (
        as_lists(model.generate(PROMPTS, 20, generator=torch.Generator().manual_seed(seed)))
        for seed in (0, 0, 1)
    )
    assert first == second != other


def frequencies(draws: int = 20000, **options: float | None) -> Tensor:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    sampling = Sampling(**settings, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return sampling.draw(logits.expand(draws, -1)).bincount(minlength=4) / draws


DRAWS = [
    ({}, [0.4, 0.3, 0.2, 0.1]),
    ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ({"temperature": 0.0}, [1, 0, 0, 0]),
    ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
    ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
    ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
    ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
    ({"top_p": 1e-9}, [1, 0, 0, 0]),
    ({"top_p": 1.0}, [0.4, 0.3, 0.2, 0.1]),
    ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
]


@pytest.mark.parametrize(("options", "expected"), DRAWS)
def test_tokens_are_drawn_from_what_is_left(options: dict[str, float], expected: list[float]) -> None:
    found = frequencies(**options)
    assert found.tolist() == pytest.approx(expected, abs=0.015)  # four standard deviations of 20,000 draws
    assert not found[torch.tensor(expected) == 0].any()


WRONG = [
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"eos": V}, "eos is 11"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"prompts": []}, r"prompts have lengths \[\]"),
    ({"prompts": [[1], []]}, r"prompts have lengths \[1, 0\]"),
    ({"prompts": [torch.zeros(1, 2)]}, r"a prompt has shape \(1, 2\)"),
    ({"prompts": torch.zeros(2, 0, dtype=torch.int64)}, r"prompts has shape \(2, 0\)"),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_wrong_arguments_are_named_at_once(model: RetNetLM, given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.stream(**{"prompts": PROMPTS, "max_new_tokens": 3, **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_new_tokens": 2.0}, r"max_new_tokens is 2\.0 \(float\); it must be an int"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"top_k": 2.0}, r"top_k is 2\.0 \(float\); it must be an int"),
        ({"top_p": True}, "top_p is True; it must be a number"),
        ({"eos": True}, "eos is True"),
        ({"eos": [1, 2]}, r"eos is \[1, 2\]"),
        ({"prompts": None}, "prompts is None; it must be a tensor or a list of prompts"),
        ({"prompts": [1, 2]}, "a prompt is 1; it must hold ints"),
        ({"prompts": "text"}, "a value in a prompt is 't'"),
        ({"prompts": [[1.5]]}, r"a value in a prompt is 1\.5"),
        ({"generator": 3}, "generator is 3"),
    ],
)
def test_wrong_types_are_named(model: RetNetLM, given: dict[str, object], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        model.stream(**{"prompts": PROMPTS, "max_new_tokens": 3, **given})

"""lm-eval judges the language model like any other of transformers: its likelihoods are the model's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from retpop import RetNetConfig
from retpop.models import RetNetLM, RetNetLMConfig

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `interplay`)")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra `interplay`)")

import transformers  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import retpop.integrations.transformers  # noqa: E402, F401

WORDS = "abcdefghijk"
QUESTIONS = [
    {"question": "a b c", "choices": ["d", "e"], "gold": 0},
    {"question": "b c d e", "choices": ["f", "a"], "gold": 1},
]
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a")
    plain = tokenizers.Tokenizer(words)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="a", eos_token="k")


def test_a_task_runs_offline(tmp_path: Path) -> None:
    torch.manual_seed(6)
    decoder = RetNetConfig(embed_dim=16, num_heads=2, num_layers=2, ffn_dim=16, final_norm=True)
    ours = RetNetLM(RetNetLMConfig(vocab_size=len(WORDS), decoder=decoder)).eval()
    ours.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "toy.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))

    model = HFLM(pretrained=theirs, tokenizer=word_tokenizer(), batch_size=2, max_length=64)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(model, tasks=["toy"], task_manager=tasks, bootstrap_iters=0)

    right = 0
    for question, sample in zip(QUESTIONS, results["samples"]["toy"], strict=True):
        tokens = torch.tensor([[WORDS.index(word) for word in question["question"].split()]])
        expected = ours(tokens)[0][0, -1].log_softmax(-1)[[WORDS.index(c) for c in question["choices"]]]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected.tolist(), abs=1e-5)
        right += int(expected.argmax()) == question["gold"]
    assert results["results"]["toy"]["acc,none"] == right / len(QUESTIONS)

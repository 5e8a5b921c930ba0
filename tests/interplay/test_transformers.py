"""Inside transformers the language model stays itself: its logits, texts and weights, trained and adapted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from retpop import RetNetConfig
from retpop.models import RetNetLM, RetNetLMConfig

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `interplay`)")

from retpop.integrations.transformers import RetNetForCausalLM, RetNetForCausalLMConfig  # noqa: E402

V = 11
DECODER = RetNetConfig(
    embed_dim=16, num_heads=2, num_layers=2, ffn_dim=16, final_norm=True, decay=(-0.1, -0.01)
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


def our_model(*, tied: bool = False) -> RetNetLM:
    torch.manual_seed(6)  # a model whose greedy text varies
    return RetNetLM(RetNetLMConfig(vocab_size=V, decoder=DECODER, tie_embeddings=tied)).eval()


@pytest.fixture
def ours() -> RetNetLM:
    return our_model()


@pytest.fixture
def theirs(ours: RetNetLM, tmp_path: Path) -> RetNetForCausalLM:
    ours.save_pretrained(tmp_path)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def padded(*, left: bool) -> dict[str, Tensor]:
    """PROMPTS as a batch with a mask; the padding is token 0."""
    longest = max(map(len, PROMPTS))
    ids, mask = torch.zeros(2, len(PROMPTS), longest, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("tied", [False, True])
def test_folders_of_either_go_to_the_other(tied: bool, tmp_path: Path) -> None:
    ours, ids = our_model(tied=tied), torch.arange(20).reshape(2, 10) % V
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(theirs, RetNetForCausalLM)
    assert torch.equal(theirs(ids).logits, ours(ids)[0])

    theirs.save_pretrained(tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(ids).logits, ours(ids)[0])
    assert (again.model.head.weight is again.model.embedding.weight) == tied
    assert again.model.cfg == ours.cfg
    again.model.save_pretrained(tmp_path / "back")
    assert torch.equal(RetNetLM.from_pretrained(tmp_path / "back")(ids)[0], ours(ids)[0])


def test_a_new_model_starts_as_ours_does() -> None:
    config = RetNetForCausalLMConfig(vocab_size=V)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    ours = RetNetLM(config.language_model())
    for (name, one), other in zip(theirs.model.named_parameters(), ours.parameters(), strict=True):
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.1), name


def test_greedy_text_is_ours(ours: RetNetLM, theirs: RetNetForCausalLM) -> None:
    expected = [row.tolist()[-8:] for row in ours.generate(PROMPTS, 8, temperature=0)]
    found = theirs.generate(**padded(left=True), max_new_tokens=8, do_sample=False)
    assert found[:, -8:].tolist() == expected


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_changes_nothing(theirs: RetNetForCausalLM, left: bool) -> None:
    batch = padded(left=left)
    output = theirs(**batch)
    for row, prompt in enumerate(PROMPTS):
        alone = theirs(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(output.logits[row, batch["attention_mask"][row].bool()], alone)
        assert output.cache.state.position[row] == len(prompt)


def test_vectors_in_place_of_the_embeddings(theirs: RetNetForCausalLM) -> None:
    """What prompt tuning and multimodal models pass."""
    batch = padded(left=True)
    vectors = {**batch, "inputs_embeds": theirs.get_input_embeddings()(batch["input_ids"])}
    del vectors["input_ids"]
    assert torch.equal(theirs(**vectors).logits, theirs(**batch).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(theirs.generate(**vectors, **options), theirs.generate(**batch, **options)[:, -5:])
    for wrong in ({}, {"input_ids": batch["input_ids"], "inputs_embeds": vectors["inputs_embeds"]}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            theirs(**wrong)


def test_a_text_goes_on_from_its_cache(theirs: RetNetForCausalLM) -> None:
    """As a chat does: what was read and written before is not read again."""
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = theirs.generate(torch.tensor([PROMPTS[1]]), **options)
    longer = torch.cat((first.sequences, torch.tensor([PROMPTS[0]])), dim=1)
    read = []
    theirs.model.embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    again = theirs.generate(longer, cache=first.cache, **options)
    assert read[0] == len(PROMPTS[0]) + 1  # the last token written had not been read
    assert torch.equal(again.sequences, theirs.generate(longer, **options).sequences)


def test_beams_take_their_states_along(theirs: RetNetForCausalLM) -> None:
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "num_return_sequences": 2}
    found = theirs.generate(**padded(left=True), **options)
    assert torch.equal(found, theirs.generate(**padded(left=True), **options, use_cache=False))
    assert len(set(map(tuple, found.tolist()))) == 2 * len(PROMPTS)


def test_sampling_draws_from_the_models_own_probabilities(ours: RetNetLM, theirs: RetNetForCausalLM) -> None:
    torch.manual_seed(0)
    prompt = torch.tensor([PROMPTS[0]])
    drawn = theirs.generate(prompt, max_new_tokens=1, do_sample=True, num_return_sequences=4000, top_k=0)
    found = drawn[:, -1].bincount(minlength=V) / 4000
    torch.testing.assert_close(
        found, ours(prompt)[0][0, -1].softmax(-1), atol=0.032, rtol=0
    )  # four deviations


def test_trainer_trains_it(theirs: RetNetForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra `interplay`)")
    rows = [{"input_ids": (torch.arange(9) + n) % V, "labels": (torch.arange(9) + n) % V} for n in range(20)]
    settings = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=10,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(theirs, settings, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert trainer.evaluate()["eval_loss"] < before / 2
    assert losses[0] == pytest.approx(before, rel=0.2)  # a mean over tokens, accumulation or not


def test_activation_checkpointing_changes_no_gradient(theirs: RetNetForCausalLM) -> None:
    ids = torch.arange(2 * 9).view(2, 9) % V
    theirs.train()
    theirs(ids, labels=ids).loss.backward()
    wanted = [weight.grad.clone() for weight in theirs.parameters()]
    theirs.zero_grad()
    theirs.activation_checkpointing_enable()
    assert theirs.model.decoder.checkpoint_activations
    theirs(ids, labels=ids).loss.backward()
    torch.testing.assert_close([weight.grad for weight in theirs.parameters()], wanted)
    theirs.activation_checkpointing_disable()
    assert not theirs.model.decoder.checkpoint_activations


def test_lora_on_the_projections(theirs: RetNetForCausalLM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `interplay`)")
    config = peft.LoraConfig(r=2, target_modules=["qkvg_proj", "out_proj"], task_type="CAUSAL_LM")
    ids = torch.arange(10)[None]
    expected = theirs(ids).logits
    model = peft.get_peft_model(theirs, config)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model(input_ids=ids, labels=ids).loss.backward()
    moved = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert all("lora" in name for name in moved)
    assert len(moved) == 2 * 3 * DECODER.num_layers  # A and B of qkvg_proj and of two out_proj a layer
    model.save_pretrained(tmp_path)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 13)


def test_a_pipeline_writes_text(theirs: RetNetForCausalLM) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra `interplay`)")
    words = {word: number for number, word in enumerate("abcdefghijk")}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="a", padding_side="left"
    )
    write = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer)
    (one,), (other,) = write(["b c d", "e f g h i"], batch_size=2, max_new_tokens=4, do_sample=False)
    new = theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert one["generated_text"].replace(" ", "") == tokenizer.decode(new[0]).replace(" ", "")
    assert other["generated_text"].startswith("e f g h i")


def test_the_loss_is_of_the_next_token(ours: RetNetLM, theirs: RetNetForCausalLM) -> None:
    ids = torch.arange(20).reshape(2, 10) % V
    labels = ids.masked_fill(torch.arange(10) < 3, -100)
    expected, _ = ours(ids[:, :-1], targets=labels[:, 1:])
    torch.testing.assert_close(theirs(ids, labels=labels).loss, expected)
    loss, logits, _ = theirs(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, theirs(ids, labels=labels).loss)
    assert logits.shape == (2, 10, V)
    assert theirs(ids, use_cache=False).cache is None
    with pytest.raises(ValueError, match="output_hidden_states"):
        theirs(ids, output_hidden_states=True)
    torch.testing.assert_close(theirs(ids, logits_to_keep=3).logits, theirs(ids).logits[:, -3:])

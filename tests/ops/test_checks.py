"""Bad input raises at once; the message names the function, the argument, what came and what was wanted."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from retention_cases import PopCase, RetentionCase

import retpop
from retpop.ops.checks import check_cu_seqlens

ERRORS = (TypeError, ValueError)


def retention_arguments(**changes: Any) -> dict[str, Any]:
    """Good arguments of retention: B = 2, T = 40, H = 3, Dk = 4, Dv = 5; with some of them replaced."""
    case = RetentionCase.make(2, 40, 3, 4, 5, dtype=torch.float32)
    return {**vars(case), **changes}


def pop_arguments(**changes: Any) -> dict[str, Any]:
    """Good arguments of pop_retention: N = 3 blocks of 4, P = 2 predictions of 6 from boundary 1."""
    case = PopCase.make(2, 3, 4, 2, 6, 3, 4, 5, offset=1, dtype=torch.float32, with_reset=True)
    return {**vars(case), **changes}


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


# (what is replaced, words that the message must hold: the argument, what came, what was wanted)
BAD_TENSORS = {
    "q rank 3": ({"q": zeros(40, 3, 4)}, ["q", "(40, 3, 4)"]),
    "q rank 5": ({"q": zeros(1, 2, 40, 3, 4)}, ["q", "(1, 2, 40, 3, 4)"]),
    "v short": ({"v": zeros(2, 39, 3, 5)}, ["v", "39", "40", "(2, 39, 3, 5)", "(2, 40, 3, 4)"]),
    "k short": ({"k": zeros(2, 39, 3, 4)}, ["k", "39", "40", "(2, 39, 3, 4)", "(2, 40, 3, 4)"]),
    "k batch": ({"k": zeros(3, 40, 3, 4)}, ["k", "(3, 40, 3, 4)", "(2, 40, 3, 4)"]),
    "k batch of 1 is not broadcast": ({"k": zeros(1, 40, 3, 4)}, ["k", "(1, 40, 3, 4)", "(2, 40, 3, 4)"]),
    "v batch of 1 is not broadcast": ({"v": zeros(1, 40, 3, 5)}, ["v", "(1, 40, 3, 5)", "(2, 40, 3, 4)"]),
    "k heads": ({"k": zeros(2, 40, 2, 4)}, ["k", "(2, 40, 2, 4)", "(2, 40, 3, 4)"]),
    "v one head is not broadcast": ({"v": zeros(2, 40, 1, 5)}, ["v", "(2, 40, 1, 5)", "(2, 40, 3, 4)"]),
    "k dim": ({"k": zeros(2, 40, 3, 5)}, ["k", "(2, 40, 3, 5)", "(2, 40, 3, 4)"]),
    "no heads": (
        {**{name: zeros(2, 40, 0, 4) for name in "qkv"}, "log_decay": zeros(0)},
        ["q", "(2, 40, 0, 4)", "H"],
    ),
    "no value features": ({"v": zeros(2, 40, 3, 0)}, ["v", "(2, 40, 3, 0)", "D"]),
    "mixed dtypes": ({"v": zeros(2, 40, 3, 5, dtype=torch.float64)}, ["v", "float64", "float32"]),
    "integers": (
        {name: zeros(2, 40, 3, 4, dtype=torch.int64) for name in "qkv"},
        ["q", "int64", "float32"],
    ),
    "complex": ({name: zeros(2, 40, 3, 4, dtype=torch.complex64) for name in "qkv"}, ["q", "complex64"]),
    "mixed devices": ({"k": zeros(2, 40, 3, 4, device="meta")}, ["k", "meta", "cpu"]),
    "not a tensor": ({"v": [1.0]}, ["v", "list"]),
    "None": ({"q": None}, ["q", "None"]),
    "state rank": ({"state": zeros(3, 4, 5)}, ["state", "(3, 4, 5)", "(2, 3, 4, 5)"]),
    "state batch": ({"state": zeros(1, 3, 4, 5)}, ["state", "(1, 3, 4, 5)", "(2, 3, 4, 5)"]),
    "state heads": ({"state": zeros(2, 1, 4, 5)}, ["state", "(2, 1, 4, 5)", "(2, 3, 4, 5)"]),
    "state dims swapped": ({"state": zeros(2, 3, 5, 4)}, ["state", "(2, 3, 5, 4)", "(2, 3, 4, 5)"]),
    "state float64": ({"state": zeros(2, 3, 4, 5, dtype=torch.float64)}, ["state", "float64", "float32"]),
    "state bfloat16": ({"state": zeros(2, 3, 4, 5, dtype=torch.bfloat16)}, ["state", "bfloat16", "float32"]),
    "state device": ({"state": zeros(2, 3, 4, 5, device="meta")}, ["state", "meta", "cpu"]),
    "state not a tensor": ({"state": 0.0}, ["state", "float"]),
    "log_decay length": ({"log_decay": zeros(2)}, ["log_decay", "(2,)", "(3,)"]),
    "log_decay of one is not broadcast": ({"log_decay": zeros(1)}, ["log_decay", "(1,)", "(3,)"]),
    "log_decay rank": ({"log_decay": zeros(3, 1)}, ["log_decay", "(3, 1)", "(3,)"]),
    "log_decay scalar": ({"log_decay": torch.tensor(-0.5)}, ["log_decay", "()", "(3,)"]),
    "log_decay not a tensor": ({"log_decay": [-0.1, -0.1, -0.1]}, ["log_decay", "list"]),
    "log_decay bfloat16": (
        {"log_decay": zeros(3, dtype=torch.bfloat16)},
        ["log_decay", "bfloat16", "float32"],
    ),
    "log_decay integers": ({"log_decay": zeros(3, dtype=torch.int64)}, ["log_decay", "int64", "float32"]),
    "log_decay device": ({"log_decay": zeros(3, device="meta")}, ["log_decay", "meta", "cpu"]),
    "log_decay positive": ({"log_decay": torch.tensor([-0.1, 1e-6, 0.0])}, ["log_decay", "0"]),
    "log_decay NaN": ({"log_decay": torch.tensor([-0.1, torch.nan, 0.0])}, ["log_decay", "nan"]),
    "log_decay +inf": ({"log_decay": torch.tensor([-0.1, torch.inf, 0.0])}, ["log_decay", "inf"]),
    "scale a string": ({"scale": "0.5"}, ["scale", "str", "number"]),
    "scale bool": ({"scale": True}, ["scale", "bool", "number"]),
    "scale NaN": ({"scale": float("nan")}, ["scale", "nan"]),
    "backend unknown": ({"backend": "cuda"}, ["backend", "cuda", "torch", "triton", "reference", "auto"]),
    "backend None": ({"backend": None}, ["backend", "None", "auto"]),
}

BAD_RETENTION = {
    "mode unknown": ({"mode": "chunk"}, ["mode", "chunk", "parallel", "chunkwise", "recurrent"]),
    "mode None": ({"mode": None}, ["mode", "None", "chunkwise"]),
    "chunk_size 48": ({"chunk_size": 48}, ["chunk_size", "48", "power of two"]),
    "chunk_size 8": ({"chunk_size": 8}, ["chunk_size", "8", "16"]),
    "chunk_size 0": ({"chunk_size": 0}, ["chunk_size", "0", "16"]),
    "chunk_size negative": ({"chunk_size": -64}, ["chunk_size", "-64", "16"]),
    "chunk_size float": ({"chunk_size": 64.0}, ["chunk_size", "64.0", "int"]),
    "chunk_size in parallel": ({"chunk_size": 64, "mode": "parallel"}, ["chunk_size", "64", "parallel"]),
    "chunk_size in recurrent": ({"chunk_size": 64, "mode": "recurrent"}, ["chunk_size", "64", "recurrent"]),
    "reset length": ({"reset": zeros(2, 39, dtype=torch.bool)}, ["reset", "(2, 39)", "(B, T) = (2, 40)"]),
    "reset of one row": ({"reset": zeros(1, 40, dtype=torch.bool)}, ["reset", "(1, 40)", "(2, 40)"]),
    "reset of integers": ({"reset": zeros(2, 40, dtype=torch.int64)}, ["reset", "int64", "bool"]),
    "reset device": ({"reset": zeros(2, 40, dtype=torch.bool, device="meta")}, ["reset", "meta", "cpu"]),
    "reset not a tensor": ({"reset": [7, 12]}, ["reset", "list"]),
}

BAD_POP = {
    "q not whole blocks": ({"block_size": 5}, ["block_size", "5", "12"]),
    "block_size 0": ({"block_size": 0}, ["block_size", "0"]),
    "block_size negative": ({"block_size": -4}, ["block_size", "-4"]),
    "block_size float": ({"block_size": 4.0}, ["block_size", "float", "int"]),
    "block_size bool": ({"block_size": True}, ["block_size", "bool", "int"]),
    "offset negative": ({"offset": -1}, ["offset", "-1"]),
    "offset beyond the blocks": ({"offset": 4}, ["offset", "4", "3"]),
    "offset float": ({"offset": 1.0}, ["offset", "float", "int"]),
    "too many predictions": ({"offset": 3}, ["P", "2", "1"]),
    "q_pred rank": ({"q_pred": zeros(2, 6, 3, 4)}, ["q_pred", "(2, 6, 3, 4)"]),
    "q_pred batch": ({"q_pred": zeros(1, 2, 6, 3, 4)}, ["q_pred", "(1, 2, 6, 3, 4)"]),
    "q_pred dim": ({"q_pred": zeros(2, 2, 6, 3, 5)}, ["_pred", "(2, 2, 6, 3, 5)"]),
    "k_pred count": ({"k_pred": zeros(2, 1, 6, 3, 4)}, ["k_pred", "(2, 1, 6, 3, 4)", "(2, 2, 6, 3, 4)"]),
    "k_pred length": ({"k_pred": zeros(2, 2, 5, 3, 4)}, ["k_pred", "(2, 2, 5, 3, 4)", "(2, 2, 6, 3, 4)"]),
    "v_pred heads": ({"v_pred": zeros(2, 2, 6, 1, 5)}, ["v_pred", "(2, 2, 6, 1, 5)", "(2, 2, 6, 3, 4)"]),
    "v_pred dim": ({"v_pred": zeros(2, 2, 6, 3, 4)}, ["v_pred", "(2, 2, 6, 3, 4)", "5"]),
    "v_pred dtype": (
        {"v_pred": zeros(2, 2, 6, 3, 5, dtype=torch.bfloat16)},
        ["v_pred", "bfloat16", "float32"],
    ),
    "all predictions in another dtype": (
        {
            name: zeros(2, 2, 6, 3, dim, dtype=torch.bfloat16)
            for name, dim in [("q_pred", 4), ("k_pred", 4), ("v_pred", 5)]
        },
        ["_pred", "bfloat16", "float32"],
    ),
    "q_pred device": ({"q_pred": zeros(2, 2, 6, 3, 4, device="meta")}, ["q_pred", "meta", "cpu"]),
    "q_pred not a tensor": ({"q_pred": None}, ["q_pred", "None"]),
    "reset shape": ({"reset": zeros(2, 4, dtype=torch.bool)}, ["reset", "(2, 4)", "(2, 3)"]),
    "reset per row": ({"reset": zeros(2, dtype=torch.bool)}, ["reset", "(2,)", "(2, 3)"]),
    "reset batch of 1 is not broadcast": (
        {"reset": zeros(1, 3, dtype=torch.bool)},
        ["reset", "(1, 3)", "(2, 3)"],
    ),
    "reset of integers": ({"reset": zeros(2, 3, dtype=torch.int64)}, ["reset", "int64", "bool"]),
    "reset of floats": ({"reset": zeros(2, 3)}, ["reset", "float32", "bool"]),
    "reset device": ({"reset": zeros(2, 3, dtype=torch.bool, device="meta")}, ["reset", "meta", "cpu"]),
    "reset not a tensor": ({"reset": [[True]]}, ["reset", "list"]),
}


def offsets(*values: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


BAD_PACKING = {
    "not starting at 0": (offsets(1, 10, 40), ["1", "0"]),
    "not ending at T": (offsets(0, 10, 39), ["39", "40"]),
    "ending beyond T": (offsets(0, 10, 41), ["41", "40"]),
    "unsorted": (offsets(0, 30, 20, 40), ["30", "20"]),
    "two-dimensional": (offsets(0, 40).view(1, 2), ["(1, 2)"]),
    "empty": (offsets(), ["(0,)"]),
    "floats": (offsets(0, 40, dtype=torch.float32), ["float32", "int32"]),
    "int16": (offsets(0, 40, dtype=torch.int16), ["int16", "int32"]),
    "bools": (torch.tensor([False, True]), ["bool", "int32"]),
    "a list": ([0, 40], ["list"]),
}


def assert_message(error: BaseException, function: str, words: list[str]) -> None:
    message = str(error)
    assert message.startswith(f"{function}(): "), message
    for word in words:
        assert word in message, (word, message)


@pytest.mark.parametrize("name", [*BAD_TENSORS, *BAD_RETENTION])
def test_retention_refuses(name: str) -> None:
    changes, words = {**BAD_TENSORS, **BAD_RETENTION}[name]
    with pytest.raises(ERRORS) as caught:
        retpop.retention(**retention_arguments(**changes))
    assert_message(caught.value, "retention", words)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "v",
            (1, 40, 2, 16),
            "retention(): v has T=40 but q has T=70 (q (1, 70, 2, 16), v (1, 40, 2, 16)); "
            "q, k and v must share B, T and H.",
        ),
        (
            "k",
            (1, 70, 2, 8),
            "retention(): k has D=8 but q has D=16 (q (1, 70, 2, 16), k (1, 70, 2, 8)); "
            "q and k must have the same shape.",
        ),
    ],
)
def test_a_message_in_full(name: str, shape: tuple[int, ...], message: str) -> None:
    tensors = {other: zeros(1, 70, 2, 16) for other in "qkv"} | {name: zeros(*shape)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        retpop.retention(**tensors, log_decay=zeros(2))


def test_values_that_are_not_at_hand_are_not_read() -> None:
    """On another device a look at a value would wait for it: only shapes are checked there."""
    tokens = zeros(1, 40, 3, 4, device="meta")
    check_cu_seqlens("f()", offsets(0, 40).to("meta"), "q", tokens)
    retpop.retention(tokens, tokens, tokens, zeros(3, device="meta"))


def for_pop(changes: dict[str, Any]) -> dict[str, Any]:
    """The same fault in a call of pop_retention, whose main stream has 12 tokens instead of 40."""

    def shorten(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dims = [{40: 12, 39: 11}.get(size, size) for size in value.shape]
        return value.new_zeros(dims) if dims != list(value.shape) else value

    return {name: shorten(value) for name, value in changes.items()}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_pop_retention_refuses_the_same(name: str) -> None:
    changes, words = BAD_TENSORS[name]
    with pytest.raises(ERRORS) as caught:
        retpop.pop_retention(**pop_arguments(**for_pop(changes)))
    lengths = {"40": "12", "39": "11"}
    words = [re.sub(r"\b(40|39)\b", lambda match: lengths[match[0]], word) for word in words]
    assert_message(caught.value, "pop_retention", words)


@pytest.mark.parametrize("name", BAD_POP)
def test_pop_retention_refuses(name: str) -> None:
    changes, words = BAD_POP[name]
    with pytest.raises(ERRORS) as caught:
        retpop.pop_retention(**pop_arguments(**changes))
    assert_message(caught.value, "pop_retention", words)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", BAD_PACKING)
def test_retention_refuses_bad_offsets(name: str, backend: str) -> None:
    cu_seqlens, words = BAD_PACKING[name]
    case = RetentionCase.make(1, 40, 3, 4, 5, with_state=False)
    with pytest.raises(ERRORS) as caught:
        case.run(cu_seqlens=cu_seqlens, backend=backend)
    assert_message(caught.value, "retention", ["cu_seqlens", *words])


def test_offsets_live_where_the_tokens_do() -> None:
    case = RetentionCase.make(1, 40, 3, 4, 5, with_state=False)
    with pytest.raises(ERRORS) as caught:
        case.run(cu_seqlens=offsets(0, 40).to("meta"))
    assert_message(caught.value, "retention", ["cu_seqlens", "meta", "cpu"])


def test_packed_sequences_need_one_row_and_a_state_for_each_sequence() -> None:
    cu_seqlens = offsets(0, 10, 40)
    with pytest.raises(ERRORS) as caught:
        RetentionCase.make(2, 40, 3, 4, 5, with_state=False).run(cu_seqlens=cu_seqlens)
    assert_message(caught.value, "retention", ["cu_seqlens", "B", "2", "1"])
    with pytest.raises(ERRORS) as caught:
        RetentionCase.make(1, 40, 3, 4, 5).run(cu_seqlens=cu_seqlens)
    assert_message(caught.value, "retention", ["state", "(1, 3, 4, 5)", "(2, 3, 4, 5)"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_float64_inputs_want_a_float64_state(backend: str) -> None:
    case = RetentionCase.make(2, 4, 3, 4, 5)
    with pytest.raises(ERRORS) as caught:
        replace(case, state=case.state.float()).run(backend=backend)
    assert_message(caught.value, "retention", ["state", "float32", "float64"])


@pytest.mark.parametrize("op", ["retention", "pop_retention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_named_backend_that_cannot_run_says_why(
    op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = (RetentionCase.make(2, 4, 3, 4, 5, dtype=dtype), PopCase.make(2, 2, 2, 1, 1, 3, 4, 5, dtype=dtype))
    with pytest.raises((RuntimeError, *ERRORS, NotImplementedError)) as caught:
        case[op == "pop_retention"].run(backend="triton")
    assert_message(caught.value, op, ["backend", "triton"])
    assert len(str(caught.value)) > 40


@pytest.mark.parametrize(
    ("changes", "word"), [({"q": None}, "q"), ({"mode": "fast"}, "fast"), ({"backend": "cuda"}, "cuda")]
)
def test_explain_backend_refuses(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ERRORS) as caught:
        retpop.explain_backend(**{"q": zeros(1, 2, 3, 4), **changes})
    assert_message(caught.value, "explain_backend", [word])


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(retpop.retention, retention_arguments), (retpop.pop_retention, pop_arguments)],
)
def test_unknown_keyword_arguments_raise(function: Any, arguments: Any) -> None:
    with pytest.raises(TypeError, match="chunksize"):
        function(**arguments(chunksize=64))


def test_options_are_keyword_only() -> None:
    case = RetentionCase.make(2, 4, 3, 4, 5)
    with pytest.raises(TypeError):
        retpop.retention(case.q, case.k, case.v, case.log_decay, "parallel")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_minus_infinity_and_zero_are_legal_log_decays(backend: str) -> None:
    case = RetentionCase.make(2, 4, 3, 4, 5, dtype=torch.float32)
    log_decay = torch.tensor([-torch.inf, 0.0, -0.5])
    for result in replace(case, log_decay=log_decay).run(backend=backend):
        assert torch.isfinite(result).all()


def test_numbers_of_numpy_are_taken_as_torch_takes_them() -> None:
    case = RetentionCase.make(1, 20, 2, 4, 4, dtype=torch.float32)
    actual = case.run(scale=numpy.float32(0.5), chunk_size=numpy.int64(16))
    for a, e in zip(actual, case.run(scale=0.5, chunk_size=16), strict=True):
        assert torch.equal(a, e)
    pop = PopCase.make(1, 2, 3, 1, 2, 2, 3, 4, offset=1)
    other = replace(pop, block_size=numpy.int32(3), offset=numpy.uint8(1))
    for a, e in zip(other.run(), pop.run(), strict=True):
        assert torch.equal(a, e)
    with pytest.raises(TypeError, match="scale is bool"):
        case.run(scale=numpy.bool_(True))


def test_under_another_default_device() -> None:
    """No tensor is made where a user's other tensors are made by default."""
    case = RetentionCase.make(1, 40, 2, 4, 4)
    expected = case.run()
    pop = PopCase.make(1, 2, 3, 1, 2, 2, 3, 4, with_reset=True)
    with torch.device("meta"):
        for a, e in zip((*case.run(), *pop.run()), (*expected, *pop.run()), strict=True):
            assert (a.device.type, e.device.type) == ("cpu", "cpu")
        case.run(cu_seqlens=torch.tensor([0, 40], device="cpu"))

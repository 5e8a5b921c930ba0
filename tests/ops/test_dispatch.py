"""Which backend runs, on GPUs that are not here: only the choice is tested, from devices' properties."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import retpop
from retpop.arguments import Inputs
from retpop.kernels import gpus
from retpop.ops import dispatch
from retpop.ops.dispatch import choose_backend

GPU = torch.device("cuda", 0)


def inputs(
    device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16, key_dim: int = 64, value_dim: int = 64
) -> Inputs:
    return Inputs(device, dtype, key_dim, value_dim)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, amd: str | None = None, **properties: object) -> None:
    """Make torch describe a GPU."""
    described = types.SimpleNamespace(gcnArchName=amd, multi_processor_count=132, **properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
    monkeypatch.setattr(torch.version, "hip", None if amd is None else "6.3")
    monkeypatch.setattr(dispatch, "_why_not_on_gpu", dispatch._why_not_on_gpu.__wrapped__)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, major=9, minor=0)


def chosen(backend: str = "auto", given: Inputs | None = None) -> tuple[str, str]:
    """The name of what would run, and why."""
    taken, reason = choose_backend("here", backend, given or inputs())
    return taken.NAME, reason


@pytest.mark.usefixtures("hopper")
def test_auto_takes_the_kernels_on_a_gpu() -> None:
    assert chosen()[0] == chosen("triton")[0] == "triton"
    for name in ("torch", "reference"):
        assert chosen(name) == (name, "it was asked for by name")


def test_a_gpu_that_this_triton_gets_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name with an error that says what, where it is reported and what helps; "auto" takes torch."""
    on_a_gpu(monkeypatch, major=10, minor=0)
    monkeypatch.setattr(gpus.why_wrong, "__defaults__", ("3.7.1",))
    name, reason = chosen()
    assert name == "torch"
    assert "Triton 3.7.1 on sm_100" in reason
    with pytest.raises(
        RuntimeError, match=r"^here: .* come out wrong \(https://.*; Triton 3.9.0 has the repair"
    ):
        choose_backend("here", "triton", inputs())
    monkeypatch.setattr(gpus.why_wrong, "__defaults__", ("3.9.0",))
    assert chosen("triton")[0] == "triton"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, ["float64", "float32"]),
        ({"key_dim": 257}, ["257", "256"]),
        ({"value_dim": 300}, ["300", "256"]),
    ],
    ids=["float64", "key dim", "value dim"],
)
@pytest.mark.usefixtures("hopper")
def test_what_the_kernels_do_not_take(changes: dict[str, object], words: list[str]) -> None:
    name, reason = chosen("auto", inputs(**changes))
    assert name == "torch"
    with pytest.raises(
        RuntimeError, match=r'^here: backend="triton" cannot run: .*"torch" or "auto" can\.$'
    ) as e:
        choose_backend("here", "triton", inputs(**changes))
    for word in words:
        assert word in reason
        assert word in str(e.value)


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({"major": 8, "minor": 0}, None),
        ({"major": 12, "minor": 0}, None),
        ({"major": 7, "minor": 5}, "7.5"),
        ({"amd": "gfx942:sramecc+:xnack-"}, None),
        ({"amd": "gfx950"}, "gfx950"),
        ({"amd": "gfx90a:sramecc+"}, "gfx90a"),
    ],
    ids=str,
)
def test_which_gpus(
    properties: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, **properties)
    name, why = chosen()
    assert name == ("triton" if reason is None else "torch")
    if reason is not None:
        assert reason in why
        with pytest.raises(RuntimeError, match=reason):
            choose_backend("here", "triton", inputs())


@pytest.mark.usefixtures("hopper")
def test_auto_takes_torch_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert "not installed" in chosen()[1]
    with pytest.raises(RuntimeError, match=r"Triton is not installed"):
        choose_backend("here", "triton", inputs())


@pytest.mark.usefixtures("hopper")
def test_auto_takes_torch_under_a_transform() -> None:
    """The kernels' ops have a gradient only; see tests/ops/test_triton_backend.py for who names them."""
    taken = []

    def run(x: torch.Tensor) -> torch.Tensor:
        taken.append(chosen())
        return x

    torch.vmap(run)(torch.zeros(2))
    torch.func.jvp(run, (torch.zeros(2),), (torch.zeros(2),))
    with forward_ad.dual_level():
        run(torch.zeros(2))
    assert [name for name, _ in taken] == ["torch"] * 3
    assert "torch.func" in taken[0][1]
    assert "forward-mode AD" in taken[2][1]
    assert chosen()[0] == "triton"


def test_elsewhere() -> None:
    for device in ("cpu", "meta", "mps"):
        assert chosen("auto", inputs(torch.device(device)))[0] == "torch"
    assert chosen("triton", inputs(torch.device("cpu")))[0] == "triton"  # interpreted
    with pytest.raises(RuntimeError, match="mps"):
        choose_backend("here", "triton", inputs(torch.device("mps")))


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1"):
        choose_backend("here", "triton", inputs(torch.device("cpu")))


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((8, 4096, 16, 64), {}, ["retention_fwd", "in one sweep"]),
        ((1, 65536, 2, 64), {"mode": "parallel"}, ["retention_fwd", "stretches"]),
        ((8, 1, 16, 64), {"mode": "recurrent"}, ["retention_step"]),
        ((64, 650, 4, 64), {"mode": "pop"}, ["pop_fwd"]),
        ((64, 650, 4, 64), {"mode": "pop", "block_size": 65}, ["pop_fwd", "in one pass"]),
        ((1, 650, 2, 64), {"mode": "pop", "block_size": 65}, ["pop_fwd", "block states first"]),
    ],
    ids=str,
)
def test_explain_backend_names_kernel_and_schedule(
    shape: tuple[int, ...], options: dict[str, object], words: list[str]
) -> None:
    q = torch.zeros(shape, device="meta", dtype=torch.bfloat16)
    text = retpop.explain_backend(q, backend="triton", **options)
    for word in ("triton backend", "by name", *words):
        assert word in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 5}, r"block_size is 5 but mode is 'chunkwise'"),
        ({"block_size": 5, "mode": "pop"}, r"T=12 is not a whole number of blocks of block_size 5"),
    ],
    ids=str,
)
def test_explain_backend_refuses_blocks_that_do_not_fit(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^explain_backend\(\): {words}"):
        retpop.explain_backend(torch.zeros(1, 12, 2, 4), **options)


def test_explain_backend_of_other_value_dims() -> None:
    q, v = torch.zeros(1, 4, 2, 64, device="meta"), torch.zeros(1, 4, 2, 300, device="meta")
    retpop.explain_backend(q, backend="triton")
    with pytest.raises(RuntimeError, match="300"):
        retpop.explain_backend(q, v, backend="triton")


@pytest.mark.parametrize("v", [torch.zeros(1, 3, 2, 4), torch.zeros(1, 4, 2, 4).double()], ids=["T", "dtype"])
def test_explain_backend_refuses_values_that_the_op_would_refuse(v: torch.Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^explain_backend\(\): v (has T=3|is torch.float64)"):
        retpop.explain_backend(torch.zeros(1, 4, 2, 4), v)


WITHOUT_THE_INTERPRETER = """
import sys
import torch
import retpop

q = torch.randn(1, 20, 2, 4)
log_decay = retpop.retnet_decay(2)
try:
    retpop.retention(q, q, q, log_decay, backend="triton")
except RuntimeError as error:
    print(error)
print("triton" in sys.modules)
out, state = torch.ops.retpop.retention_fwd(q, q, q, log_decay, None, None, None, 0.5)
expected, expected_state = retpop.retention(q, q, q, log_decay)
assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(state, expected_state, atol=1e-5)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="says so, and no more, where Triton is missing")
def test_a_process_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is refused, which takes no Triton; an op that stands in a program computes."""
    monkeypatch.delenv("TRITON_INTERPRET")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_INTERPRETER],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refusal, loaded = done.stdout.splitlines()
    assert refusal.startswith('retention(): backend="triton" cannot run: ')
    assert "TRITON_INTERPRET=1" in refusal
    assert loaded == "False"

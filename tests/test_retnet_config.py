"""RetNetConfig: what it refuses, that it is a value, and that every field shapes the model."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from dataclasses import MISSING, FrozenInstanceError, asdict, fields, replace

import numpy
import pytest
import torch
from retention_cases import normal

from retpop import RetNetConfig, RetNetDecoder

REQUIRED = {"embed_dim": 8, "num_heads": 2}

SMALL = {**REQUIRED, "num_layers": 2, "ffn_dim": 12}

DEFAULTS = {
    "num_layers": 1,
    "ffn_dim": None,
    "key_dim": None,
    "value_dim": None,
    "decay": "retnet",
    "learn_decay": False,
    "position": "retnet",
    "scale": None,
    "head_norm": "groupnorm",
    "head_norm_eps": 1e-6,
    "head_norm_affine": False,
    "gate_activation": "silu",
    "norm": "layernorm",
    "norm_eps": 1e-6,
    "ffn": "mlp",
    "activation": "silu",
    "bias": True,
    "dropout": 0.0,
    "norm_first": True,
    "final_norm": False,
    "chunk_size": 64,
}

# Every field with values that must each build another model than the default.
OTHER_VALUES = {
    "embed_dim": [16],
    "num_heads": [4],
    "num_layers": [3],
    "ffn_dim": [16],
    "key_dim": [16, 4],
    "value_dim": [16, 4],
    "decay": ["log_spaced", (-0.5, -math.inf), ((-0.5, -0.1), (-0.5, -math.inf))],
    "learn_decay": [True],
    "position": ["rope", None],
    "scale": [1.0],
    "head_norm": ["rmsnorm"],
    "head_norm_eps": [0.1],
    "head_norm_affine": [True],
    "gate_activation": ["gelu", "relu"],
    "norm": ["rmsnorm"],
    "norm_eps": [0.1],
    "ffn": ["glu"],
    "activation": ["gelu", "relu"],
    "bias": [False],
    "dropout": [0.5],
    "norm_first": [False],
    "final_norm": [True],
    "chunk_size": [16],
}

BAD_VALUES = {
    "embed_dim": [0, -8, 8.0, "8", None, True],
    "num_heads": [0, -2, 2.0, 3, None, False],
    "num_layers": [0, -1, 1.5, None, True],
    "ffn_dim": [0, -1, 12.0, "12"],
    "key_dim": [0, -8, 7, 6, 8.0, True],
    "value_dim": [0, -8, 7, 8.0, "8"],
    "decay": [
        "",
        "exponential",
        None,
        0.5,
        (),
        (-0.1,),
        ((-0.1, -0.2),),
        ((-0.1, -0.2), (-0.1,)),
        ((-0.1, -0.2), -0.1),
        ((-0.1, -0.2), (-0.1, 0.2)),
        (0.1, -0.1),
        (math.nan, -0.1),
        ("a", "b"),
        (True, -1),
    ],
    "learn_decay": [0, None, "no"],
    "position": ["xpos", "", False, 0],
    "scale": ["1", math.nan, math.inf, True],
    "head_norm": ["layernorm", None, ""],
    "head_norm_eps": [-1e-6, math.nan, math.inf, None, "0"],
    "head_norm_affine": [1, None, "yes"],
    "gate_activation": ["swish", None],
    "norm": ["groupnorm", None],
    "norm_eps": [-1.0, math.nan, None],
    "ffn": ["swiglu", None],
    "activation": ["tanh", None],
    "bias": [0, None, "no"],
    "dropout": [-0.1, 1.0, 1.5, math.nan, None, "0"],
    "norm_first": [1, None],
    "final_norm": [0, None],
    "chunk_size": [0, 8, 24, 63, -64, 64.0, None, True],
}


def make(**changes: object) -> RetNetConfig:
    return RetNetConfig(**{**SMALL, **changes})


def other_cases() -> list[tuple[str, object]]:
    return [(name, value) for name, values in OTHER_VALUES.items() for value in values]


def build(cfg: RetNetConfig) -> RetNetDecoder:
    """A decoder whose weights are drawn from one seed, made large enough that every part is felt."""
    torch.manual_seed(0)
    decoder = RetNetDecoder(cfg)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.3 * normal(*parameter.shape, seed=1, dtype=torch.float32)
    return decoder


def test_fields_and_defaults_are_the_contract_s() -> None:
    found = {field.name: field.default for field in fields(RetNetConfig)}
    assert found == {**dict.fromkeys(REQUIRED, MISSING), **DEFAULTS}


def test_the_tables_of_this_file_cover_every_field() -> None:
    names = {field.name for field in fields(RetNetConfig)}
    assert set(OTHER_VALUES) == names
    assert set(BAD_VALUES) == names


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_VALUES.items() for v in values])
def test_bad_values_raise_and_the_message_names_the_field(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^RetNetConfig.*{name}"):
        make(**{name: value})


def test_messages_show_what_came_and_what_was_wanted() -> None:
    with pytest.raises(ValueError, match=r"norm is 'batchnorm'.*layernorm.*rmsnorm"):
        make(norm="batchnorm")
    with pytest.raises(ValueError, match=r"key_dim is 9.*num_heads 2"):
        make(key_dim=9)
    with pytest.raises(ValueError, match=r"decay has 3 log-decays.*num_heads is 2"):
        make(decay=(-1.0, -1.0, -1.0))


def test_an_odd_head_dim_is_refused_only_with_rotary_positions() -> None:
    with pytest.raises(ValueError, match="key_dim"):
        make(key_dim=6, position="rope")
    assert make(key_dim=6, position=None).head_key_dim == 3
    assert make(value_dim=6).head_value_dim == 3


def test_the_embedding_need_not_be_divisible_where_both_dims_are_given() -> None:
    cfg = make(embed_dim=7, key_dim=8, value_dim=6)
    out, state = RetNetDecoder(cfg)(torch.zeros(1, 3, 7))
    assert out.shape == (1, 3, 7)
    assert state.kv.shape == (2, 1, 2, 4, 3)


def test_dims_default_to_the_embedding() -> None:
    assert (make().head_key_dim, make().head_value_dim) == (4, 4)
    assert (make(key_dim=12).head_key_dim, make(value_dim=10).head_value_dim) == (6, 5)


def test_two_fields_make_a_layer() -> None:
    assert (RetNetConfig(**REQUIRED).num_layers, RetNetConfig(**REQUIRED).ffn_dim) == (1, 32)


@pytest.mark.parametrize("decay", ["retnet", (-0.1, -math.inf), ((-0.1, -0.2), (-0.3, -math.inf))])
def test_it_goes_through_json_and_torch_load(decay: object) -> None:
    cfg = make(decay=decay, scale=0.5)
    assert RetNetConfig(**json.loads(json.dumps(asdict(cfg)))) == cfg
    assert RetNetConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    file = io.BytesIO()
    torch.save({"cfg": cfg}, file)
    file.seek(0)
    assert torch.load(file)["cfg"] == cfg


def test_a_dict_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from_dict\(\): version is 2; it must be 1"):
        RetNetConfig.from_dict({**make().to_dict(), "version": 2})
    with pytest.raises(TypeError, match="embed_dims"):
        RetNetConfig.from_dict({"embed_dims": 8})
    with pytest.raises(TypeError, match="saved is list; it must map names to values"):
        RetNetConfig.from_dict([8])  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    cfg = make(
        embed_dim=numpy.int64(8),
        dropout=numpy.float32(0.5),
        chunk_size=numpy.int32(32),
        decay=(numpy.float32(-0.5), numpy.int64(-1)),
    )
    assert cfg == make(embed_dim=8, dropout=0.5, chunk_size=32, decay=(-0.5, -1.0))
    assert {type(cfg.embed_dim), type(cfg.chunk_size)} == {int}
    assert json.loads(json.dumps(asdict(cfg)))["dropout"] == 0.5


def test_it_is_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        make().embed_dim = 16
    with pytest.raises(TypeError):
        RetNetConfig(8, 2, 2, 12)
    with pytest.raises(TypeError, match="embed_dims"):
        make(embed_dims=8)
    with pytest.raises(TypeError, match="num_heads"):
        RetNetConfig(embed_dim=8)


def test_it_is_a_value() -> None:
    assert make() == make()
    assert make() != make(bias=False)
    assert hash(make()) == hash(make())
    assert copy.deepcopy(make()) == make()
    assert pickle.loads(pickle.dumps(make(decay=(-0.1, -0.2)))) == make(decay=(-0.1, -0.2))
    assert replace(make(), scale=0.5).scale == 0.5
    with pytest.raises(ValueError, match="scale"):
        replace(make(), scale=math.nan)


@pytest.mark.parametrize(("name", "value"), other_cases())
def test_every_field_is_read(name: str, value: object) -> None:
    """Another value of a field gives another structure, or other numbers from the same weights."""
    base, other = build(make()), build(make(**{name: value}))
    shapes = [{key: tensor.shape for key, tensor in d.state_dict().items()} for d in (base, other)]
    if shapes[0] == shapes[1]:
        x = normal(2, 40, 8, seed=2, dtype=torch.float32)
        results = [decoder.train()(x)[0] for decoder in (base, other)]
        assert not torch.equal(*results)
    else:
        x = normal(2, 40, other.cfg.embed_dim, seed=2, dtype=torch.float32)
        assert torch.isfinite(other(x)[0]).all()


def test_parameter_counts_follow_from_the_fields() -> None:
    """Counted by hand: projections E x (2 Dk + 2 Dv) H with biases, out, two norms, feed-forward."""
    E, K, V, F, layers = 8, 12, 20, 24, 3
    sizes = {"embed_dim": E, "key_dim": K, "value_dim": V, "ffn_dim": F, "num_layers": layers}

    def count(**changes: object) -> int:
        return sum(p.numel() for p in RetNetDecoder(make(**sizes, **changes)).parameters())

    projections = E * (2 * K + 2 * V) + V * E
    projection_biases = 2 * K + 2 * V + E
    mlp, mlp_biases = 2 * E * F, F + E
    weights = projections + mlp + 2 * E
    biases = projection_biases + mlp_biases + 2 * E
    assert count() == layers * (weights + biases)
    assert count(bias=False) == layers * weights
    assert count(norm="rmsnorm") == layers * (weights + biases - 2 * E)
    assert count(ffn="glu") == layers * (weights + biases + E * F + F)
    assert count(final_norm=True) == count() + 2 * E
    assert count(final_norm=True, norm="rmsnorm") == count(norm="rmsnorm") + E
    assert count(head_norm_affine=True) == count() + layers * 2 * V
    assert count(head_norm_affine=True, head_norm="rmsnorm") == count() + layers * V
    assert count(position=None, decay="log_spaced", dropout=0.5, norm_first=False) == count()


def test_the_published_world_model_s_decoder() -> None:
    """REM's decoder: d 256, 5 layers, FFN 1024: and its parameters by hand."""
    cfg = RetNetConfig(embed_dim=256, num_heads=4, num_layers=5, ffn_dim=1024)
    one_layer = 5 * (256 * 256 + 256) + 2 * 256 * 1024 + 1024 + 256 + 2 * 2 * 256
    assert sum(p.numel() for p in RetNetDecoder(cfg, device="meta").parameters()) == 5 * one_layer


def test_describe_shows_what_differs_from_the_defaults() -> None:
    text = make(dropout=0.25).describe()
    assert "embed_dim=8" in text
    assert "dropout=0.25" in text
    assert "norm_first" not in text

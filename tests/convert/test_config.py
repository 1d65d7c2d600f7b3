"""The official config.json <-> ModelConfig."""

import json
import math

import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.convert import Origin, from_official, to_official
from tests.helpers import GOLDEN

NAMES = ["lm_siso_mlp", "lm_mimo_nomlp", "lm_hybrid_attn"]
PURE = {"d_model": 64, "n_layer": 2, "vocab_size": 93, "ssm_cfg": {"layer": "Mamba3"}}
ATTENTION = {"num_heads": 4, "causal": True}
# The keys of the released siso-187m (its config.json in PAPER 2.3), with plausible values.
RELEASED = {
    "d_model": 768,
    "n_layer": 24,
    "d_intermediate": 1500,
    "vocab_size": 128256,
    "rms_norm": True,
    "residual_in_fp32": True,
    "tie_embeddings": True,
    "pad_vocab_size_multiple": 16,
    "ssm_cfg": {
        "layer": "Mamba3",
        "d_state": 128,
        "expand": 2,
        "headdim": 64,
        "ngroups": 1,
        "rope_fraction": 0.5,
        "A_floor": 1e-4,
        "is_mimo": False,
        "mimo_rank": 4,
        "chunk_size": 64,
        "is_outproj_norm": False,
    },
}


def golden_config(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def test_sizes_of_the_recorded_models():
    siso, mimo, hybrid = (from_official(golden_config(name)) for name in NAMES)
    assert (siso.pattern, siso.d_ff, siso.mimo_rank, siso.rope_fraction) == ("MM", 128, 0, 0.5)
    assert (mimo.pattern, mimo.d_ff, mimo.mimo_rank) == ("MMM", 0, 4)
    assert (hybrid.pattern, hybrid.rope_fraction, hybrid.attn_bias) == ("MA", 1.0, True)
    assert (hybrid.attn_heads, hybrid.attn_kv_heads, hybrid.attn_head_dim) == (4, 2, 8)


def test_released_keys():
    model = from_official(RELEASED)
    assert (model.mimo_rank, model.d_ff, model.pad_vocab_to, model.pattern) == (0, 1536, 16, "M" * 24)
    assert from_official(RELEASED | {"ssm_cfg": RELEASED["ssm_cfg"] | {"is_mimo": True}}).mimo_rank == 4


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    model = from_official(golden_config(name))
    assert from_official(to_official(model)) == model


def test_every_field_goes_there_and_back():
    model = ModelConfig(
        vocab_size=101,
        pad_vocab_to=16,
        d_model=128,
        pattern="MAMMA",
        d_ff=384,
        tie_embeddings=False,
        norm="layer",
        residual_in_fp32=False,
        d_state=32,
        expand=3,
        head_dim=16,
        n_groups=4,
        mimo_rank=1,
        rope_fraction=1.0,
        out_norm=True,
        a_floor=1e-3,
        dt_min=0.01,
        dt_max=0.2,
        dt_init_floor=1e-3,
        attn_heads=6,
        attn_kv_heads=2,
        attn_head_dim=24,
        attn_bias=True,
    )
    assert from_official(to_official(model)) == model


def hybrid(**attention):
    return PURE | {"attn_layer_idx": [1], "attn_cfg": ATTENTION | attention}


def pure(**ssm):
    return PURE | {"ssm_cfg": PURE["ssm_cfg"] | ssm}


@pytest.mark.parametrize(
    ("official", "named"),
    [
        (PURE | {"d_modl": 3}, "d_modl"),
        (pure(d_conv=4), "ssm_cfg has unknown keys .'d_conv'"),
        (PURE | {"ssm_cfg": {}}, "ssm_cfg.layer, the default, is 'Mamba1', wanted 'Mamba3' or 'Mamba2'"),
        (pure(layer="Mamba1", d_conv=4, dt_rank="auto"), "ssm_cfg.layer is 'Mamba1', wanted 'Mamba3' or 'Mamba2'"),
        (pure(layer=["Mamba2"]), "ssm_cfg.layer is .'Mamba2'., wanted"),
        ({"d_model": 64, "n_layer": 2, "vocab_size": 93, "ssm_cfg": {"d_conv": 4}}, "the default, is 'Mamba1'"),
        (
            {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]},
            "Hugging Face .*'Mamba2ForCausalLM'.*ssm_cfg",
        ),
        (PURE | {"model_type": "mamba3"}, "config.json is of Hugging Face transformers .*'mamba3'"),
        (PURE | {f"key_{number}": 0 for number in range(50)}, "unknown keys .*'key_17' and 40 more"),
        (pure(rope_fraction=0.25), "0.25"),
        (pure(expand=1.5), "expand is 1.5"),
        (pure(headdim=48), "headdim 48"),
        (pure(is_mimo=True, mimo_rank=0), "mimo_rank is 0"),
        (PURE | {"attn_layer_idx": [2]}, "layers 0 to 1"),
        (hybrid(causal=False), "causal is False; only True"),
        (PURE | {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4}}, "causal is False"),
        (hybrid(d_conv=4), "d_conv is 4"),
        (hybrid(mlp_dim=256), "mlp_dim is 256"),
        (hybrid(rotary_emb_dim=32), "rotary_emb_dim is 32"),
        (hybrid(softmax_scale=1.0), "softmax_scale is 1.0"),
        (hybrid(qkv_proj_bias=False), "qkv_proj_bias and out_proj_bias differ"),
        (hybrid(window=9), "window"),
        (hybrid(num_heads=None), "num_heads is missing"),
        (hybrid(num_heads=5), "multiple of attn_cfg.num_heads 5"),
        (PURE | {"ssm_cfg": "Mamba3"}, "wanted an object"),
        (pure(headdim=0), "ssm_cfg: headdim is 0, wanted a positive whole number"),
        (pure(expand=None), "expand is None, wanted a positive number"),
        (pure(ngroups=3), "ngroups is 3, wanted a divisor of the 2 heads"),
        (pure(is_mimo=1), "is_mimo is 1, wanted true or false"),
        (pure(d_state=7), "d_state=7"),
        (pure(A_floor=math.nan), "A_floor is nan"),
        (PURE | {"n_layer": 10**12}, "n_layer is 1000000000000, wanted at most 1024"),
        (PURE | {"vocab_size": 10**12}, "vocab_size=1000000000000 is not in 1"),
        (PURE | {"n_layer": "2"}, "n_layer is '2', wanted a positive whole number"),
        (PURE | {"d_model": None}, "d_model is None"),
        (PURE | {"d_intermediate": -1}, "d_intermediate is -1, wanted a whole number from 0 up"),
        (PURE | {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
        (PURE | {"attn_layer_idx": 1}, "attn_layer_idx is 1, wanted a list"),
        (hybrid(num_heads_kv=3), "num_heads_kv is 3, wanted a divisor of num_heads 4"),
        (hybrid(num_heads_kv=0), "num_heads_kv is 0"),
    ],
)
def test_what_is_not_supported_says_so(official, named):
    with pytest.raises(ValueError, match=named):
        from_official(official)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("discretization", "exponential_euler"),
        ("angles", "rope"),
        ("angles", "quaternion"),
        ("bc_bias", "c"),
        ("bc_norm", False),
        ("conv", 4),
        ("a_form", "softplus"),
        ("pairing", "half"),
        ("d_ff", 100),
        ("attn_rope_theta", 1e4),
    ],
)
def test_what_the_official_code_lacks_says_so(field, value):
    with pytest.raises(ValueError, match=field):
        to_official(ModelConfig(pattern="MA", **{field: value}))


GOOD = {"config": PURE, "dtypes": {"a": "float32"}, "files": ["pytorch_model.bin"], "peeled": ["joined 2 shards"]}


@pytest.mark.parametrize(
    "damage",
    [
        {"more": 1},
        {"config": None},
        {"files": "pytorch_model.bin"},
        {"files": [[]]},
        {"peeled": "x"},
        {"peeled": [3]},
        {"dtypes": {"a": "int3"}},
    ],
)
def test_a_damaged_record_says_so(damage, tmp_path):
    (tmp_path / "official.json").write_text(json.dumps(GOOD))
    assert Origin.load(tmp_path)._asdict() == GOOD
    (tmp_path / "official.json").write_text(json.dumps(GOOD | damage))
    with pytest.raises(ValueError, match=r"official\.json is damaged"):
        Origin.load(tmp_path)


def test_a_record_of_before_peeling_is_read(tmp_path):
    (tmp_path / "official.json").write_text(json.dumps({key: GOOD[key] for key in ("config", "dtypes", "files")}))
    assert Origin.load(tmp_path)._asdict() == GOOD | {"peeled": []}


def test_how_biases_begin_and_whether_they_move_is_no_concern_of_the_official_code():
    model = ModelConfig(bc_bias_initial=0.5, bc_bias_frozen=True)
    assert to_official(model) == to_official(ModelConfig())


def test_attention_defaults():
    model = from_official(hybrid())
    assert (model.attn_heads, model.attn_kv_heads, model.attn_head_dim, model.attn_bias) == (4, 4, 16, True)

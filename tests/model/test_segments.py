"""Which layers are scanned, and which models are refused."""

import dataclasses

import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel, mixer_names, segments, validate

SMALL = ModelConfig(vocab_size=10, d_model=32, d_state=16, head_dim=16, attn_head_dim=8, pattern="MA")


@pytest.mark.parametrize(
    ("pattern", "cut"),
    [
        ("M", [("M", 1)]),
        ("M" * 48, [("M", 48)]),
        ("MMMMMA" * 4, [("MMMMMA", 4)]),
        ("MMMAMMM", [("M", 3), ("A", 1), ("M", 3)]),
        ("MMAMMAM", [("MMA", 2), ("M", 1)]),
        ("MAM", [("MAM", 1)]),
        (("mamba3", "attention") * 3, [(("mamba3", "attention"), 3)]),
    ],
)
def test_segments_repeat_the_shortest_units(pattern, cut):
    assert segments(pattern) == cut
    whole = pattern[:0]
    for unit, repeats in cut:
        whole += unit * repeats
    assert whole == pattern


def test_letters_and_names_are_the_same_layers():
    assert mixer_names("MAM") == mixer_names(("mamba3", "attention", "mamba3")) == ["mamba3", "attention", "mamba3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "MXM"}, "'X' at layer 1, wanted one of .*'1', '2', 'A', 'G', 'M'"),
        (
            {"pattern": ("mamba3", "rnn")},
            "'rnn' at layer 1, wanted one of .*'attention', 'gated_deltanet', 'mamba1', 'mamba2', 'mamba3'",
        ),
        ({"pattern": ""}, "pattern='' has 0 layers, wanted 1 .. 1024"),
        ({"vocab_size": 0}, "vocab_size=0 is not in 1 .. 16777216"),
        ({"pad_vocab_to": -8}, "pad_vocab_to=-8"),
        ({"d_ff": -1}, "d_ff=-1"),
        ({"norm": "batch"}, "norm='batch' is not one of"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16' is not one of"),
        ({"remat": "all"}, "remat='all' is not one of"),
        ({"head_dim": 24}, "d_inner=64 .*multiple of config.head_dim=24"),
        ({"n_groups": 3}, "heads=4 is not a multiple of config.n_groups=3"),
        ({"rope_fraction": 0.25}, "rope_fraction=0.25 is neither 0.5 nor 1.0"),
        ({"d_state": 15}, "d_state=15"),
        ({"d_state": 2}, "d_state=2 is too small"),
        ({"mimo_rank": -1}, "mimo_rank=-1"),
        ({"dt_min": 0.2}, "dt_min=0.2"),
        ({"a_floor": 0.0}, "a_floor=0.0"),
        ({"discretization": "zoh"}, "discretization='zoh' is not one of"),
        ({"angles": "random"}, "angles='random' is not one of"),
        ({"bc_bias": "q"}, "bc_bias='q' is not one of .'b', 'both', 'c', 'none'.$"),
        ({"bc_bias": True}, "bc_bias=True is not of type str"),
        ({"bc_bias_initial": float("inf")}, "bc_bias_initial=inf is not a float32 number"),
        ({"implementation": "fast"}, "implementation='fast' is not"),
        ({"chunk": -1}, "chunk=-1"),
        ({"attn_head_dim": 0}, "attn_head_dim=0"),
        ({"attn_heads": 4, "attn_kv_heads": 3}, "heads=4 is not a positive multiple of kv_heads=3"),
        ({"attn_rope_theta": 100.0, "attn_head_dim": 5}, "attn_head_dim=5 is odd"),
        ({"attn_rope_theta": -1.0}, "attn_rope_theta=-1.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_no_model_is_named_and_refused(change, message):
    config = dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match=message):
        validate(config)
    with pytest.raises(ValueError, match=message):
        LanguageModel(config).empty_state(1, 1)

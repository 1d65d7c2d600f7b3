"""The paper's sizes, to the last parameter where it is known and to the printed digit elsewhere (PAPER section 2.2)."""

import dataclasses

import pytest

from mamba3_jax.model import validate
from mamba3_jax.presets import PRESETS, parameter_count

EXACT = {"siso-180m": 186_849_600, "mimo-180m": 187_291_968}
MILLIONS = {
    "siso-440m": "443.02",
    "mimo-440m": "444.20",
    "siso-880m": "892.78",
    "mimo-880m": "894.55",
    "siso-1.5b": "1494.7",
    "mimo-1.5b": "1497.1",
}


@pytest.mark.parametrize("name", [*EXACT, *MILLIONS])
def test_parameters_are_those_of_the_paper(name):
    count = parameter_count(PRESETS[name])
    if name in EXACT:
        assert count == EXACT[name]
    else:
        digits = len(MILLIONS[name].partition(".")[2])
        assert f"{count / 1e6:.{digits}f}" == MILLIONS[name]


@pytest.mark.parametrize("name", sorted({*PRESETS} - {*EXACT, *MILLIONS}))
def test_baselines_have_as_many_parameters(name):
    assert abs(parameter_count(PRESETS[name]) / EXACT["siso-180m"] - 1) < 5e-3


def test_hybrids_attend_in_every_sixth_layer_and_know_no_positions():
    plain, norm = PRESETS["hybrid-180m"], PRESETS["hybrid-180m-norm"]
    assert [place for place, letter in enumerate(plain.pattern) if letter == "A"] == [5, 11]
    assert set(plain.pattern) == {"M", "A"}
    assert (plain.attn_rope_theta, plain.out_norm, norm.out_norm) == (0.0, False, True)
    assert parameter_count(norm) - parameter_count(plain) == 10 * 2 * 768  # a weight a channel of Mamba-3
    mixers = 10 * (768 * 3432 + 1536 * 768 + 2 * 24 * 128 + 2 * 128 + 2 * 24) + 2 * 4 * 768**2
    assert parameter_count(plain) == 128256 * 768 + mixers + 12 * (3 * 768 * 1664 + 2 * 768) + 768


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be(name):
    validate(PRESETS[name])


def test_one_more_column_of_feed_forward_is_seen():
    preset = PRESETS["siso-440m"]
    wider = dataclasses.replace(preset, d_ff=preset.d_ff + 1)
    assert parameter_count(wider) == parameter_count(preset) + 24 * 3 * preset.d_model
    assert f"{parameter_count(wider) / 1e6:.2f}" != MILLIONS["siso-440m"]


def test_an_untied_head_counts():
    preset = PRESETS["siso-180m"]
    untied = dataclasses.replace(preset, tie_embeddings=False)
    assert parameter_count(untied) == EXACT["siso-180m"] + 128256 * 768

"""Where a model is predicted to fail: angle errors that were planted are seen, and memory moves as the op moves it."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.analysis import half_step, horizon, pictures
from mamba3_jax.analysis.horizon import Change
from mamba3_jax.config import DataConfig, ModelConfig
from mamba3_jax.finite import or_null
from mamba3_jax.model import LanguageModel, init_params
from mamba3_jax.ops.rotary import rotate
from tests.helpers import rel_rms

SMALL = ModelConfig(vocab_size=6, pad_vocab_to=2, d_model=16, pattern="MM", d_state=8, head_dim=8, rope_fraction=1.0)
WORDS = DataConfig(source="Z6", length=16, batch=8, task_lengths=(16,), task_steps=(0,), valid_rows=64)


def words(rows: int = 200, length: int = 33) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 6, (rows, length))


def test_planted_angle_errors_are_found():
    """Multiples 1, 2, 3 of a sixth of a turn, each 0.001 radians off a token: half a step is reached at 1000 pi / 6."""
    tokens_BL, multiple_S = words(), np.array([1, 2, 3])
    rotation_BLHS = (2 * np.pi / 6 * tokens_BL[..., None] * multiple_S + 1e-3)[:, :, None]
    errors = half_step.angle_errors(half_step.within_half(rotation_BLHS), tokens_BL, 6)
    assert errors.multiple_HS.tolist() == [[1, 2, 3]]
    for plane, products in enumerate((6, 3, 2)):
        found = errors.of_plane(0, plane)
        assert found["products"] == products
        assert found["drift"] == pytest.approx(1e-3)
        assert found["fails"] == pytest.approx(1e3 * np.pi / products, rel=1e-6)
        assert found["worst"] == pytest.approx(1e-3)
    right = half_step.angle_errors(half_step.within_half(rotation_BLHS - 1e-3), tokens_BL, 6).of_plane(0, 0)
    assert right["fails"] > 1e12


def test_errors_that_do_not_drift_add_up_as_their_root():
    """0.1 radians to either side, drawn anew: sqrt(L) 0.1 = pi / 6 at 27 tokens; of errors that take turns never."""
    tokens_BL = words(2000)
    right = 2 * np.pi / 6 * tokens_BL
    drawn = np.random.default_rng(2).choice([-0.1, 0.1], tokens_BL.shape)
    found = half_step.angle_errors((right + drawn)[..., None, None], tokens_BL, 6)
    assert found.spread_HS[0, 0] == pytest.approx(0.1, rel=0.05)
    assert half_step.adds_up(0.0, 0.1, np.pi / 6) == pytest.approx((np.pi / 0.6) ** 2)
    in_turn = 0.1 * (-1.0) ** np.arange(tokens_BL.shape[1])
    assert half_step.angle_errors((right + in_turn)[..., None, None], tokens_BL, 6).spread_HS[0, 0] < 1e-6


@pytest.mark.parametrize(
    ("drift", "spread", "length"), [(0.1, 0.0, 10.0), (0.0, 0.1, 100.0), (0.1, 0.3, 4.2), (0.0, 0.0, math.inf)]
)
def test_where_errors_add_up_to_one(drift, spread, length):
    got = half_step.adds_up(drift, spread, 1.0)
    assert got == pytest.approx(length, rel=0.05)
    if math.isfinite(got):
        assert drift * got + spread * math.sqrt(got) == pytest.approx(1.0)


def test_planes_that_carry_a_sum():
    """The most memory first, as many as tell 6 apart; one that misses half a step tells nothing."""
    planes = [
        {"memory": 0.9, "products": 6, "worst": 0.6},
        {"memory": 0.8, "products": 1, "worst": 0.0},
        {"memory": 0.5, "products": 3, "worst": 0.1},
        {"memory": 0.4, "products": 3, "worst": 0.1},
        {"memory": 0.3, "products": 2, "worst": 0.1},
    ]
    assert half_step.carriers(planes, 6) == [planes[2], planes[4]]
    assert half_step.carriers(planes[:4], 6) == []


@pytest.mark.parametrize(
    ("points", "length"),
    [([(8, 1.0), (16, 0.75), (32, 0.25)], 24.0), ([(8, 0.4), (16, 0.9)], 8.0), ([(8, 1.0), (16, 0.9)], math.inf)],
)
def test_where_accuracies_fall_under_half(points, length):
    assert horizon.crossing(points) == length


def test_memory_decays_and_turns_as_the_op_does():
    """Rows that are alike are all memory: k tokens more scale it by exp(k log_a) and turn it by -k angles."""
    model, tokens_BL = LanguageModel(SMALL), jnp.array([[3, 1, 2, 5]] * 2)
    params = init_params(SMALL, jax.random.key(0))
    state = jax.jit(lambda tokens_BL: model.apply({"params": params}, tokens_BL)[1])(tokens_BL)
    draw = np.random.default_rng(0)
    changes = [
        Change(-jnp.asarray(draw.random(4), jnp.float32), jnp.asarray(draw.random((4, 4)), jnp.float32)) for _ in "MM"
    ]
    moved = jax.jit(lambda *k: horizon.with_memory_moved(model, state, changes, *k, tokens_BL[:, 0]))
    h, after = (part["segment_0"]["block_0"].ssm_BHPN for part in (state, moved(3.0, 2.0)))
    for layer, (log_a_H, angle_HS) in enumerate(changes):
        want = rotate(jnp.exp(3 * log_a_H)[:, None, None] * h[layer], -2 * angle_HS[:, None], "adjacent")
        assert rel_rms(after[layer], want) < 1e-6
        assert rel_rms(after[layer], rotate(want, 0.002 * angle_HS[:, None], "adjacent")) > 1e-4
    assert rel_rms(moved(0.0, 0.0)["segment_0"]["block_0"].ssm_BHPN, h) < 1e-6


def test_memory_is_what_rows_that_begin_alike_share():
    h = jnp.asarray(np.random.default_rng(0).random((4, 1, 2, 2)), jnp.float32)
    got = horizon.beginning(h, jnp.array([0, 1, 0, 1]))
    assert rel_rms(got[1], (h[1] + h[3]) / 2) < 1e-6


@pytest.mark.parametrize(
    ("source", "change", "absent"),
    [
        ("Z6", {}, None),
        ("S3", {}, "the group is not cyclic"),
        pytest.param("Z6", {"angles": "quaternion"}, "no layer rotates", marks=pytest.mark.full),
        pytest.param("Z6", {"pattern": "2"}, "no layer rotates", marks=pytest.mark.full),
        pytest.param("Z6", {"pattern": "MA"}, "the memory of attention", marks=pytest.mark.full),
        pytest.param("Z6", {"pattern": "G", "delta_head_dim": 8}, "the memory of gated", marks=pytest.mark.full),
    ],
)
def test_a_model_that_follows_nothing(source, change, absent):
    """Untrained: at the first length it is at chance, and what cannot be predicted says why."""
    config = dataclasses.replace(SMALL, attn_head_dim=8, **change)
    params = init_params(config, jax.random.key(0))
    data = dataclasses.replace(WORDS, source=source)
    found = horizon.horizon(LanguageModel(config), params, data, lengths=(16, 24))
    assert found["fails"] == 16
    assert json.loads(json.dumps(or_null(found), allow_nan=False))["trained"] == 16
    predicted = found["predicted"]
    if "A" in config.pattern or "G" in config.pattern:
        assert predicted["forgetting"]["absent"] == found["restored"][0]["absent"]
        assert predicted["forgetting"]["absent"].startswith(absent)
    else:
        assert predicted["forgetting"]["points"][0][1] == pytest.approx(found["measured"][0]["scaled_last"], abs=0.1)
        assert [part["length"] for part in found["restored"]] == [24, 32]
        assert found["restored"][0]["as_it_is"] == pytest.approx(found["measured"][1]["scaled_last"], abs=0.1)
    if absent:
        assert predicted["half_step"]["absent"].startswith(absent)
    assert pictures.horizons({"a": found}).startswith(b"\x89PNG")


def test_other_data_has_no_horizon():
    assert horizon.horizon(None, None, DataConfig()) is None
    assert horizon.horizon(None, None, DataConfig(source="flip_flop")) is None
    assert horizon.group_of("parity") == "Z2"
    assert horizon.group_of("S5_generators") == "S5"

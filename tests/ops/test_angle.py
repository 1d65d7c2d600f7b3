"""The cumulative angle after 1,048,576 tokens, on the parallel paths, is good to 1e-4 rad.

Compiled as users do: what is at stake is the rounding of single float32 operations. The reference sums the products of
the very same float32 numbers in float64 (good to 1e-9 rad here), modulo one turn.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops import angle as angles
from mamba3_jax.ops.ssm import Heads, Tokens, ssm
from tests.helpers import AS_USERS
from tests.ops.cases import FLOAT32

LENGTH = 2**20
PARALLEL = sorted({*FLOAT32} - {"recurrent"})
LIMIT = 1e-4

# name: (angle, dt), each (L, S) and (L,): a head each. Constant inputs round the same way at every token.
INPUTS = {
    "random": (
        np.random.default_rng(0).uniform(-np.pi, np.pi, (LENGTH, 2)),
        np.random.default_rng(1).uniform(0.001, 1, LENGTH),
    ),
    "constant": (np.full((LENGTH, 2), [np.pi * np.tanh(0.7), -2.9999]), np.full(LENGTH, 0.1)),
    "largest": (np.full((LENGTH, 2), [np.pi, -np.pi]), np.full(LENGTH, 1 - 2**-12)),
    "small": (np.full((LENGTH, 2), [1e-3, -3.3e-5]), np.full(LENGTH, 1e-3)),
    "unit steps": (np.full((LENGTH, 2), [3.1, -1.1]), np.ones(LENGTH)),
    "long steps": (np.full((LENGTH, 2), [3.1, -0.7]), np.full(LENGTH, 37.77)),
}
ANGLE_LHS, DT_LH = (np.stack(arrays, axis=1) for arrays in zip(*INPUTS.values(), strict=True))


def tokens_of(angle_LHS, dt_LH, start_L=None) -> tuple[Tokens, Heads]:
    length, n_heads = dt_LH.shape

    def fill(value, *sizes):
        return np.full(sizes, value, np.float32)

    tokens = Tokens(
        q_BLRGN=fill(1, 1, length, 1, 1, 4),
        k_BLRGN=fill(1, 1, length, 1, 1, 4),
        v_BLHP=fill(1, 1, length, n_heads, 1),
        dt_BLH=dt_LH.astype(np.float32)[None],
        log_a_BLH=fill(-1, 1, length, n_heads),
        gamma_BLH=fill(0.5, 1, length, n_heads),
        beta_BLH=fill(0.5, 1, length, n_heads),
        angle_BLHS=angle_LHS.astype(np.float32)[None],
        start_BL=None if start_L is None else start_L[None],
    )
    return tokens, Heads(q_bias_HRN=fill(0, n_heads, 1, 4), k_bias_HRN=fill(0, n_heads, 1, 4))


def exact(tokens: Tokens) -> np.ndarray:
    """The sum of angle * dt in float64, modulo a turn, (H, S); fsum, for a running sum would be off by 6e-5 rad."""
    turns_LHS = tokens.angle_BLHS[0].astype(np.float64) * tokens.dt_BLH[0, ..., None].astype(np.float64) / (2 * np.pi)
    return 2 * np.pi * np.apply_along_axis(math.fsum, 0, turns_LHS - np.round(turns_LHS))


def gap(got, want):
    """The largest difference on the circle, radians, of every head."""
    turns = (np.asarray(got, np.float64) - want) / (2 * np.pi)
    return 2 * np.pi * np.abs(turns - np.round(turns)).max(axis=-1)


def final_angle(implementation):
    def call(tokens, heads):
        return ssm(tokens, heads, implementation=implementation)[1].angle_BHS[0]

    return jax.jit(call, compiler_options=AS_USERS)


@pytest.mark.parametrize("implementation", PARALLEL)
def test_a_million_tokens(implementation):
    tokens, heads = tokens_of(ANGLE_LHS, DT_LH)
    run = final_angle(implementation)
    if implementation == "triton":  # whose interpreter is slow where heads do not share the angle: a row each
        rows = [tokens_of(ANGLE_LHS[:, [i]], DT_LH[:, [i]]) for i in range(len(INPUTS))]
        got = np.concatenate([run(*row) for row in rows])
    else:
        got = run(tokens, heads)
    assert np.all((got >= 0) & (got < 2 * np.pi))
    gaps = gap(got, exact(tokens))
    assert np.all(gaps < LIMIT), dict(zip(INPUTS, gaps, strict=True))


@pytest.mark.parametrize("implementation", PARALLEL)
def test_the_angle_restarts_with_a_document(implementation):
    """The sum is over the last document only, and bit for bit the same whatever came before it."""
    length, begin = 2**17, 2**17 - 5000
    start_L = np.zeros(length, bool)
    start_L[[0, 77, begin]] = True
    # Two heads with the same last document, and others before it.
    angle_LS, before_L = ANGLE_LHS[:length, 0], np.arange(length) < begin
    angle_LHS = np.stack([angle_LS, np.where(before_L[:, None], 1.234, angle_LS)], axis=1)
    dt_LH = np.stack([DT_LH[:length, 0]] * 2, axis=1)
    run = final_angle(implementation)
    got = np.concatenate([run(*tokens_of(angle_LHS[:, [i]], dt_LH[:, [i]], start_L)) for i in range(2)])
    last, _ = tokens_of(angle_LHS[begin:], dt_LH[begin:])
    assert np.all(gap(got, exact(last)) < 1e-5)
    np.testing.assert_array_equal(got[0], got[1])


def test_planted_error_is_caught():
    """Not good enough: a float32 sum, an exact sum of float32 products, one token off by a part in a thousand."""
    tokens, _ = tokens_of(*(array[:, [list(INPUTS).index("constant")]] for array in (ANGLE_LHS, DT_LH)))
    want = exact(tokens)
    products_LHS = tokens.angle_BLHS[0] * tokens.dt_BLH[0, ..., None]
    assert gap(np.cumsum(products_LHS, axis=0, dtype=np.float32)[-1], want) > LIMIT
    assert gap(np.apply_along_axis(math.fsum, 0, products_LHS), want) > LIMIT
    assert gap(want + 1e-3 * products_LHS[5], want) > LIMIT


def test_increments_split_the_product():
    """exact + rest = angle dt / (2 pi) modulo 1; exact is a multiple of the grid; the gradient is the product's."""
    random = np.random.default_rng(2)
    angle = random.uniform(-np.pi, np.pi, 100_000).astype(np.float32)
    dt = random.lognormal(-2, 2, 100_000).astype(np.float32).clip(max=10)
    step = angles.grid(64)
    grid_part, rest = jax.jit(angles.increments, static_argnums=2)(angle, dt, step)
    assert np.all(np.asarray(grid_part) % step == 0)
    assert np.all(np.abs(rest) <= step)
    turns = np.float64(grid_part) + np.float64(rest) - np.float64(angle) * np.float64(dt) / (2 * np.pi)
    assert np.abs(turns - np.round(turns)).max() < 2**-39  # five rests of half a step, rounded

    both = jax.grad(lambda angle, dt: jnp.sum(sum(angles.increments(angle, dt, step))), argnums=(0, 1))(angle, dt)
    np.testing.assert_allclose(both[0], dt / (2 * np.pi), rtol=1e-6)
    np.testing.assert_allclose(both[1], angle / (2 * np.pi), rtol=1e-6)

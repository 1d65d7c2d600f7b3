"""Running products of quaternions: against float64, at their limits, over long rows, and what they tell apart."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops import quaternion
from mamba3_jax.ops.quaternion import Axis, Quaternion
from tests.helpers import rel_rms


def drawn(*sizes, seed=0):
    """Unit quaternions of any direction."""
    parts = np.random.default_rng(seed).standard_normal((4, *sizes))
    return Quaternion(*np.float32(parts / np.sqrt((parts**2).sum(axis=0))))


def matrix(p: Quaternion):
    """The product by p from the left, from the rules ij = k, jk = i, ki = j alone."""
    w, x, y, z = (np.asarray(part, np.float64)[..., None, None] for part in p)
    i, j = np.zeros((2, 4, 4))
    i[[1, 0, 3, 2], [0, 1, 2, 3]] = 1, -1, 1, -1
    j[[2, 3, 0, 1], [0, 1, 2, 3]] = 1, -1, -1, 1
    assert (i @ i == -np.eye(4)).all()
    assert (i @ j == -j @ i).all()
    return w * np.eye(4) + x * i + y * j + z * (i @ j)


def test_products_and_rotations_are_those_of_matrices():
    p, q = drawn(5), drawn(5, seed=1)
    assert rel_rms(matrix(quaternion.product(p, q)), matrix(p) @ matrix(q)) < 1e-6
    x_N = np.random.default_rng(2).standard_normal((3, 23)).astype(np.float32)
    want_N = x_N.astype(np.float64)
    want_N[:, :20] = np.einsum("sij,bsj->bsi", matrix(p), want_N[:, :20].reshape(3, 5, 4)).reshape(3, 20)
    got_N = quaternion.rotate(x_N, p)
    assert rel_rms(got_N, want_N) < 1e-6
    np.testing.assert_array_equal(got_N[:, 20:], x_N[:, 20:])
    assert rel_rms(quaternion.rotate(x_N, quaternion.product(p, p)), want_N) > 1e-3


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-3, 9.9e-3, 1.01e-2, 0.3, 3.0, 40.0])
def test_exponentials_are_smooth_in_theta(size):
    """Values and slopes against float64's series, by which exp(V) = 1 + V + V^2 / 2 + ...; 0 included."""
    theta = np.float32(size * np.array([0.6, -0.48, 0.64]))
    dt = np.float32(0.7)

    def run(theta):
        step = quaternion.exponential(quaternion.axis(theta[None, None]), jnp.full((1, 1, 1), dt))
        return jnp.stack(step)[:, 0, 0, 0, 0]

    def series(theta):
        length = np.sqrt((theta**2).sum())
        scale = np.pi * dt * (np.tanh(length) / length if length else 1.0)
        v, term, total = scale * matrix(Quaternion(0.0, *theta))[..., :, :], np.eye(4), np.eye(4)
        for power in range(1, 60):
            term = term @ v / power
            total = total + term
        return total[:, 0]

    theta = np.float64(theta)
    assert np.abs(run(jnp.float32(theta)) - series(theta)).max() < 1e-6
    slope = jax.jacobian(run)(jnp.float32(theta))
    h = 1e-5
    want = np.stack([(series(theta + h * e) - series(theta - h * e)) / (2 * h) for e in np.eye(3)], axis=1)
    assert np.abs(slope - want).max() < 1e-5
    assert np.abs(slope * 1.001 - want).max() > 1e-5 or size > 10  # where tanh is flat


@functools.cache
def constant_and_random(length: int):
    """Steps of two heads: a rotation of no period, the same at every token; and any."""
    axis = Axis(*(jnp.full((1, length, 1), value) for value in (0.3, -0.2, 0.5)))
    same = quaternion.exponential(axis, jnp.full((1, length, 1), jnp.float32(0.9)))
    other = drawn(1, length, 1, 1)
    return Quaternion(*(np.concatenate(pair, axis=2) for pair in zip(same, other, strict=True)))


def test_a_long_row_stays_a_rotation_and_its_tokens_see_each_other_exactly():
    """131,072 tokens: lengths are 1, and what a query sees of a key is the product of the steps between, by float64."""
    step, length = constant_and_random(2**17), 2**17
    running, _ = jax.jit(quaternion.running)(step, None, None)
    p = np.stack([np.asarray(part, np.float64)[0, :, :, 0] for part in running], axis=-1)  # L, H, 4
    assert np.abs((p**2).sum(axis=-1) - 1).max() < 1e-6
    u = np.stack([np.asarray(part, np.float64)[0, :, :, 0] for part in step], axis=-1)
    u /= np.sqrt((u**2).sum(axis=-1, keepdims=True))
    for last in (length // 2, length - 1):
        between = np.eye(4)
        for t in range(last - 63, last + 1):
            between = between @ matrix(Quaternion(*np.moveaxis(u[t], -1, 0)))
        far, near = (matrix(Quaternion(*np.moveaxis(p[t], -1, 0))) for t in (last - 64, last))
        assert np.abs(np.swapaxes(far, 1, 2) @ near - between).max() < 5e-6


def test_documents_begin_anew_and_pieces_are_the_row():
    step, start_BL = drawn(2, 11, 3, 2), np.zeros((2, 11), bool)
    start_BL[0, [0, 4, 5]] = start_BL[1, 7] = True
    before = drawn(2, 3, 2, seed=1)
    run = jax.jit(quaternion.running)
    whole, _ = run(step, before, start_BL)
    want = np.zeros((4, 2, 11, 3, 2))
    for row in range(2):
        p = [np.float64(part[row]) for part in before]
        for t in range(11):
            u = [np.float64(part[row, t]) for part in step]
            p = u if start_BL[row, t] else quaternion.product(Quaternion(*p), Quaternion(*u))
            want[:, row, t] = np.stack(p)
    assert rel_rms(np.stack(whole), want) < 1e-6
    assert rel_rms(np.stack(run(step, None, start_BL)[0])[:, 0], want[:, 0]) < 1e-6
    cut = lambda x, begin, end: jax.tree.map(lambda part: part[:, begin:end], x)  # noqa: E731
    pieces, state = [], before
    for begin, end in itertools.pairwise((0, 1, 5, 11)):
        piece, state = run(cut(step, begin, end), state, start_BL[:, begin:end])
        pieces.append(piece)
    assert rel_rms(np.concatenate([np.stack(piece) for piece in pieces], axis=2), np.stack(whole)) < 1e-6


def test_products_tell_the_permutations_of_three_apart():
    """A turn by a third and a flip: the running product is, up to its sign, the permutation so far."""
    third, flip = np.pi / 3, np.pi / 2  # of 2 pi / 3 and pi in space
    generators = Axis(x=jnp.array([0, flip]), y=jnp.zeros(2), z=jnp.array([third, 0]))
    permutations = [(1, 2, 0), (0, 2, 1)]
    word = np.random.default_rng(0).integers(2, size=4096)
    axis = Axis(*(part[word][None, :, None] for part in generators))

    @jax.jit
    def run(axis):
        # Computed once: two programs' roundings of a step would differ, and lead apart in 4,096 of them.
        step = jax.lax.optimization_barrier(quaternion.exponential(axis, jnp.ones((1, 4096, 1))))
        return step, quaternion.running(step, None, None)[0]

    step, p = (np.stack(parts)[:, 0, :, 0, 0].T for parts in run(axis))
    rounding = 4 * np.sqrt(4096) * 2.0**-24  # of 4,095 products, which add up as a random walk
    exact, seen, now = np.array([1.0, 0, 0, 0]), collections.defaultdict(list), (0, 1, 2)
    for letter, place, one in zip(word, p, step.astype(np.float64), strict=True):
        exact = matrix(Quaternion(*exact)) @ one
        assert np.abs(place - exact / np.linalg.norm(exact)).max() < rounding
        now = tuple(now[i] for i in permutations[letter])
        seen[now].append(place * np.sign(place[np.abs(place).argmax()]))
    assert len(seen) == 6
    means = {now: np.mean(places, axis=0) for now, places in seen.items()}
    between = min(np.abs(a - b).max() for a, b in itertools.combinations(means.values(), 2))
    within = max(np.abs(np.stack(places) - means[now]).max() for now, places in seen.items())
    # As far as the angles of the steps, rounded to float32, lead in 4,096 tokens: no two come near one another.
    assert within < 4096 * 2.0**-24
    assert between > 0.3

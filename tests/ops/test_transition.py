"""What a run does to a state: the transitions of any cut compose to that of the whole, and with a state to `ssm`'s.

In float64, where nothing but rounding is left (1e-12); values and gradients, documents that start anywhere, and errors
of one part in a thousand planted in every part.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.ssm import PLAIN, Heads, Transition, compose, ssm, transition
from pallas_kernels.ssm.cases import MIMO, SISO, SSD
from tests.helpers import first, rel_rms
from tests.ops import cases
from tests.ops.cases import draw

EXACT = 1e-12
LENGTH, CUT = 20, (1, 9, 16)
SHAPES = {
    "siso": SISO._replace(length=LENGTH),
    "mimo": MIMO._replace(length=LENGTH, rank=2),
    "no_rotation": SISO._replace(length=LENGTH, turns=False),
    "first_order": MIMO._replace(length=LENGTH, rank=2, looks_back=False),
    "ssd": SSD._replace(length=LENGTH),
}
# Documents that start with the row, with a piece, inside one and twice in one; and a row of one document.
STARTS = np.zeros((2, LENGTH), bool)
STARTS[0, [0, 9, 12, 14]] = True


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def drawn(shape, starts=STARTS):
    tokens, heads, state = draw(shape, dtype=np.float64)
    return tokens._replace(start_BL=starts), heads, state


def pieces(tokens):
    return [cases.rows(tokens, *ends) for ends in itertools.pairwise((0, *CUT, LENGTH))]


def run(shape, tokens, heads, implementation=None):
    return transition(tokens, heads, rotation=shape.rotation, implementation=implementation, chunk=4)


@functools.cache
def everything(shape):
    """(tokens, heads, state) -> the same thing in several ways; compiled once."""

    def call(tokens, heads, state):
        join = functools.partial(compose, heads=heads, rotation=shape.rotation)
        bare = tokens._replace(q_BLRGN=None, gate_BLHP=None)
        whole = {implementation: run(shape, bare, heads, implementation) for implementation in PLAIN}
        parts = [run(shape, piece, heads) for piece in pieces(tokens)]
        transitions = whole | {
            "from the left": functools.reduce(join, parts),
            "from the right": functools.reduce(lambda right, left: join(left, right), parts[::-1]),
        }
        op = functools.partial(ssm, rotation=shape.rotation, implementation="recurrent")
        states = {
            "ssm": op(tokens, heads, state)[1],
            "whole": join(state, whole["chunked"]),
            "pieces": functools.reduce(join, parts, state),
        }
        return transitions, states, op(tokens, heads)[1]

    return jax.jit(call)


def on_circle(tree):
    """The angle as a point of the circle."""
    state = tree.state if isinstance(tree, Transition) else tree
    if state.angle_BHS is None:
        return tree
    state = state._replace(angle_BHS=np.stack([np.cos(state.angle_BHS), np.sin(state.angle_BHS)]))
    return tree._replace(state=state) if isinstance(tree, Transition) else state


def check(got, want, tolerance=EXACT):
    got, want = cases.named(on_circle(got)), cases.named(on_circle(want))
    assert got.keys() == want.keys()
    for name, value in got.items():
        if value.dtype == bool:
            np.testing.assert_array_equal(value, want[name], name)
        else:
            assert rel_rms(value, want[name]) < tolerance, f"{name}: {rel_rms(value, want[name]):.1e}"


@pytest.mark.parametrize("shape", first(SHAPES.values()), ids=SHAPES)
def test_pieces_compose_to_the_whole_and_with_a_state_to_the_state_after(shape):
    """By every plain implementation, from both ends; without queries or gate."""
    transitions, states, from_nothing = everything(shape)(*drawn(shape))
    whole = transitions["recurrent"]
    assert whole.carried_B.tolist() == [False, True]
    assert (whole.first_BH is None) != shape.looks_back
    for got in transitions.values():
        check(got, whole)
    for got in states.values():
        check(got, states["ssm"])
    check(whole.state, from_nothing)


@pytest.mark.parametrize("name", first(["ssd", "mimo"]))
def test_gradients(name):
    """Of everything through pieces composed with a state, as `ssm` gives them."""
    shape = SHAPES[name]
    (tokens, heads, state), after = drawn(shape, None), draw(shape, seed=1, dtype=np.float64)[2]

    def by_pieces(tokens, heads, state):
        for piece in pieces(tokens):
            state = compose(state, run(shape, piece, heads), heads, rotation=shape.rotation)
        return state

    def by_ssm(tokens, heads, state):
        return ssm(tokens, heads, state, rotation=shape.rotation, implementation="recurrent")[1]

    @jax.jit
    def gradients(*inputs):
        def loss(inputs, function):
            state = function(inputs[0]._replace(start_BL=STARTS), *inputs[1:])
            return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), state, after)))

        return [jax.grad(loss)(inputs, function) for function in (by_pieces, by_ssm)]

    cases.check_gradients(*gradients(tokens, heads, state), EXACT)


def test_no_number_crosses_a_start():
    """What was before a start is gone to the last bit, even what is not a number."""
    tokens, heads, state = drawn(SHAPES["siso"])
    starts_B = STARTS.any(axis=1)
    poisoned = jax.tree.map(lambda x: np.where(starts_B.reshape(-1, *[1] * (x.ndim - 1)), np.nan, x), state)
    (_, got, _), (_, want, _) = (everything(SHAPES["siso"])(tokens, heads, before) for before in (poisoned, state))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@functools.cache
def two_pieces():
    """Two transitions, `compose` of them, compiled, and what it should be."""
    shape = SHAPES["mimo"]
    tokens, heads, _ = drawn(shape, None)
    both = jax.jit(lambda *rows: [run(shape, piece, heads) for piece in rows])
    join = jax.jit(functools.partial(compose, heads=heads, rotation=shape.rotation))
    left, right = both(cases.rows(tokens, 0, 11), cases.rows(tokens, 11, None))
    return left, right, join, jax.jit(functools.partial(run, shape))(tokens, heads)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("part", ["log_a_BH", "first_BH", "angle_BHS", "ssm_BHPN", "k_BRHN", "v_BHP"])
def test_planted_error_is_caught(part, side):
    """One part in a thousand of either transition."""
    left, right, join, want = two_pieces()
    check(join(left, right), want)

    def spoilt(of):
        if part in of._fields:
            return of._replace(**{part: getattr(of, part) * 1.001})
        return of._replace(state=of.state._replace(**{part: getattr(of.state, part) * 1.001}))

    both = (spoilt(left), right) if side == "left" else (left, spoilt(right))
    with pytest.raises(AssertionError):
        check(join(*both), want, 1e-5)


@pytest.mark.full
def test_float32_keeps_its_digits():
    inputs = drawn(SHAPES["siso"])
    narrow = jax.tree.map(lambda x: x if x.dtype == bool else np.float32(x), inputs)
    (got, _, _), (want, _, _) = (everything(SHAPES["siso"])(*given) for given in (narrow, inputs))
    assert got["from the left"].state.ssm_BHPN.dtype == jnp.float32
    check(got["from the left"], want["recurrent"], 1e-5)


def test_it_computes_no_queries():
    """Of five matrix products of a chunk it has one, that of the state, beside those of the angle and the decay."""
    tokens, heads, _ = drawn(SHAPES["siso"], None)

    def products(function):
        return str(jax.make_jaxpr(function)(tokens, heads)).count("dot_general")

    of_ssm = products(functools.partial(ssm, implementation="chunked", chunk=4))
    assert products(functools.partial(transition, implementation="chunked", chunk=4)) == of_ssm - 3


def test_what_it_cannot_run():
    tokens, heads, state = drawn(SHAPES["siso"])
    with pytest.raises(ValueError, match="implementation='triton' has no pass over states alone, it is not one of"):
        transition(tokens, heads, implementation="triton")
    with pytest.raises(ValueError, match="k has shape"):
        transition(tokens._replace(k_BLRGN=tokens.k_BLRGN[0]), heads)
    done, still = jax.eval_shape(transition, tokens, heads), state._replace(angle_BHS=None)
    with pytest.raises(ValueError, match=r"state\.angle: left_has=False, right_has=True, wanted the same"):
        compose(still, done, heads)
    with pytest.raises(ValueError, match="rotation='quarter' is not one of"):
        compose(state, done, heads, rotation="quarter")


def test_runs_of_other_rows_are_not_composed():
    """Batches of 1 and 2 would be broadcast, ranks without their weights summed: a wrong state and no error."""
    tokens, heads, _ = drawn(SHAPES["siso"])
    run = jax.eval_shape(transition, tokens, heads)
    one = jax.eval_shape(transition, jax.tree.map(lambda array: array[:1], tokens), heads)
    ranks = drawn(SHAPES["mimo"])
    of_ranks = jax.eval_shape(functools.partial(transition, rotation="half"), *ranks[:2])
    for left, right, weights, wanted in (
        (one, run, heads, r"left\.log_a has shape \(1, 4\), wanted \(2, 4\)"),
        (run, one, heads, r"left\.log_a has shape \(2, 4\), wanted \(1, 4\)"),
        (one.state, run, heads, r"left\.state\.angle has shape \(1, 4, 2\), wanted \(2, 4, 2\)"),
        (run._replace(first_BH=None), run, heads, r"left\.first and left\.state\.k: one of them is None"),
        (run, run._replace(first_BH=None), heads, r"right\.first and right\.state\.k: one of them is None"),
        (run, run.state, heads, "right is State, wanted a tuple Transition of ops.ssm"),
        (None, run, heads, "left is NoneType, wanted a tuple Transition or State of ops.ssm"),
        (run, run, None, "heads is NoneType, wanted a tuple Heads of ops.ssm"),
        (run, run, ranks[1], r"v_rank has shape \(2, 2, 4\), wanted \(4, 1, 4\)"),
        (of_ranks, of_ranks, ranks[1]._replace(v_rank_HRP=None), "rank=2 needs v_rank"),
    ):
        with pytest.raises(ValueError, match=wanted):
            jax.eval_shape(compose, left, right, weights)
    keys_alone = Heads(k_bias_HRN=ranks[1].k_bias_HRN, v_rank_HRP=ranks[1].v_rank_HRP)
    want = jax.eval_shape(functools.partial(transition, rotation="half"), *ranks[:2])
    assert jax.eval_shape(functools.partial(transition, rotation="half"), ranks[0], keys_alone) == want

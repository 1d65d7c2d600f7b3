"""What a run does to a state: the transitions of any cut compose to that of the whole, and with a state to `ssm`'s.

In float64, where nothing but rounding is left (1e-12), by every plain implementation; values and gradients, documents
that start anywhere, and errors of one part in a thousand planted in every part.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.ssm import PLAIN, Transition, compose, empty_state, ssm, transition
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import MIMO, SISO, SSD, draw
from tests.ops.quick import quick_jit

EXACT = 1e-12
LENGTH = 24
SHAPES = {
    "siso": SISO._replace(length=LENGTH),
    "mimo": MIMO._replace(length=LENGTH, rank=2),
    "no_rotation": SISO._replace(length=LENGTH, turns=False),
    "first_order": MIMO._replace(length=LENGTH, rank=2, looks_back=False),
    "ssd": SSD._replace(length=LENGTH),
}
CUTS = ((1, 9, 10, 17), (8, 16))
# Documents that start where a piece does, inside one, twice in one, and at the row's first token; a row without any.
STARTS = np.zeros((2, LENGTH), bool)
STARTS[0, [0, 9, 12, 14]] = True
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def drawn(shape, starts=STARTS):
    tokens, heads, state = draw(shape, dtype=np.float64)
    return tokens._replace(start_BL=starts), heads, state


def pieces(tokens, cut):
    return [cases.rows(tokens, *ends) for ends in itertools.pairwise((0, *cut, LENGTH))]


def run(shape, implementation=None, chunk=None):
    how = {"rotation": shape.rotation, "implementation": implementation, "chunk": chunk}
    return functools.partial(transition, **how)


@functools.cache
def folded(shape, cut, implementation=None):
    """(tokens, heads) -> the transition of the whole from its pieces, from the left and from the right; compiled."""

    def call(tokens, heads):
        join = functools.partial(compose, heads=heads, rotation=shape.rotation)
        parts = [run(shape, implementation, 4)(piece, heads) for piece in pieces(tokens, cut)]
        return functools.reduce(join, parts), functools.reduce(lambda right, left: join(left, right), parts[::-1])

    return quick_jit(call)


def on_circle(tree):
    """The angle as a point of the circle."""
    state = tree.state if isinstance(tree, Transition) else tree
    if state.angle_BHS is None:
        return tree
    state = state._replace(angle_BHS=jnp.stack([jnp.cos(state.angle_BHS), jnp.sin(state.angle_BHS)]))
    return tree._replace(state=state) if isinstance(tree, Transition) else state


def check(got, want, tolerance=EXACT):
    got, want = cases.named(on_circle(got)), cases.named(on_circle(want))
    assert got.keys() == want.keys()
    for name, value in got.items():
        if value.dtype == bool:
            np.testing.assert_array_equal(value, want[name], name)
        else:
            assert rel_rms(value, want[name]) < tolerance, f"{name}: {rel_rms(value, want[name]):.1e}"


@every_shape
def test_pieces_compose_to_the_whole(shape):
    tokens, heads, _ = drawn(shape)
    whole = quick_jit(run(shape, "recurrent"))(tokens, heads)
    assert whole.carried_B.tolist() == [False, True]
    for cut in CUTS:
        for got in folded(shape, cut)(tokens, heads):
            check(got, whole)


@every_shape
@pytest.mark.parametrize("implementation", [*PLAIN, None])
def test_with_a_state_it_is_the_state_after(shape, implementation):
    """That of `ssm`, from a carried state and from none, without queries or gate."""
    tokens, heads, state = drawn(shape)
    bare = tokens._replace(q_BLRGN=None, gate_BLHP=None)
    done = quick_jit(run(shape, implementation, 5))(bare, heads)
    op = functools.partial(ssm, rotation=shape.rotation, implementation="recurrent")
    for before in (state, empty_state(tokens)):
        _, after = quick_jit(op)(tokens, heads, before)
        check(compose(before, done, heads, rotation=shape.rotation), after)
    check(done.state, after)


@every_shape
def test_gradients(shape):
    """Of everything through pieces composed with a state, as `ssm` gives them."""
    inputs, after = drawn(shape), draw(shape, seed=1, dtype=np.float64)[2]

    def by_pieces(tokens, heads, state):
        for piece in pieces(tokens, CUTS[0]):
            state = compose(state, run(shape, "chunked", 4)(piece, heads), heads, rotation=shape.rotation)
        return state

    def whole(tokens, heads, state):
        return ssm(tokens, heads, state, rotation=shape.rotation, implementation="recurrent")[1]

    def gradients(function):
        def loss(floats):
            state = function(floats[0]._replace(start_BL=STARTS), *floats[1:])
            return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), state, after)))

        return quick_jit(jax.grad(loss))((inputs[0]._replace(start_BL=None), *inputs[1:]))

    cases.check_gradients(gradients(by_pieces), gradients(whole), EXACT)


@pytest.mark.parametrize("starts", [STARTS, STARTS[:, ::-1]], ids=["one", "other"])
def test_no_number_crosses_a_start(starts):
    """What was before a start is gone to the last bit, even what is not a number."""
    tokens, heads, state = drawn(SHAPES["siso"], starts)
    done = run(SHAPES["siso"])(tokens, heads)
    poisoned = jax.tree.map(lambda x: np.where(starts.any(1).reshape(-1, *[1] * (x.ndim - 1)), np.nan, x), state)
    got, want = (compose(before, done, heads) for before in (poisoned, state))
    jax.tree.map(np.testing.assert_array_equal, got, want)


PARTS = ("log_a_BH", "first_BH", "angle_BHS", "ssm_BHPN", "k_BRHN", "v_BHP")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("part", PARTS)
def test_planted_error_is_caught(part, side):
    """One part in a thousand of either transition, but for what the other one's documents or its last token hide."""
    shape = SHAPES["mimo"]
    tokens, heads, _ = drawn(shape, None)
    both = [run(shape)(piece, heads) for piece in pieces(tokens, (11,))]
    want = run(shape)(tokens, heads)
    check(compose(*both, heads, rotation=shape.rotation), want)
    spoilt = both[side == "right"]
    if part in spoilt._fields:
        spoilt = spoilt._replace(**{part: getattr(spoilt, part) * 1.001})
    else:
        spoilt = spoilt._replace(state=spoilt.state._replace(**{part: getattr(spoilt.state, part) * 1.001}))
    both[side == "right"] = spoilt
    with pytest.raises(AssertionError):
        check(compose(*both, heads, rotation=shape.rotation), want, 1e-4)


def test_float32_keeps_its_digits():
    shape = SHAPES["siso"]
    tokens, heads, _ = drawn(shape)
    narrow = jax.tree.map(lambda x: x if x.dtype == bool else np.float32(x), (tokens, heads))
    (got, _), want = folded(shape, CUTS[0])(*narrow), run(shape, "recurrent")(tokens, heads)
    assert got.state.ssm_BHPN.dtype == jnp.float32
    check(got, want, 1e-5)


def test_it_computes_no_queries():
    """Neither the products of queries with keys nor those with states: fewer operations than `ssm`'s state."""
    shape = SHAPES["siso"]
    tokens, heads, _ = drawn(shape, None)
    text = str(jax.make_jaxpr(run(shape, "chunked"))(tokens, heads))
    op = functools.partial(ssm, implementation="chunked")
    assert text.count("dot_general") == str(jax.make_jaxpr(op)(tokens, heads)).count("dot_general") - 3


def test_what_it_cannot_run():
    tokens, heads, state = drawn(SHAPES["siso"])
    with pytest.raises(ValueError, match="implementation='triton' has no pass over states alone, it is not one of"):
        transition(tokens, heads, implementation="triton")
    with pytest.raises(ValueError, match="k has shape"):
        transition(tokens._replace(k_BLRGN=tokens.k_BLRGN[0]), heads)
    done, still = transition(tokens, heads), state._replace(angle_BHS=None)
    with pytest.raises(ValueError, match=r"state\.angle: left_has=False, right_has=True, wanted the same"):
        compose(still, done, heads)
    with pytest.raises(ValueError, match="rotation='quarter' is not one of"):
        compose(state, done, heads, rotation="quarter")

"""What must hold of the op for any input, by every implementation; hypothesis draws shapes, splits and documents.

Errors are RMS of the difference over RMS of the reference, which is `recurrent` in float64 where there is one. float32
leaves about 1e-6 after a few hundred terms: outputs to 1e-5, gradients to 1e-4 (an angle's gradient sums over all later
tokens). Beside them an error of one part in a thousand is planted and caught.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from mamba3_jax.ops.ssm import State, empty_state, ssm
from pallas_kernels.ssm.cases import LEFT_OUT, MIMO, SISO, SSD, Case
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import CHUNK, FLOAT32, check_gradients, check_results, cotangents, draw, forward, pulled, rows

FORWARD, GRADIENT = 1e-5, 1e-4
BFLOAT16 = 1e-2  # eps 4e-3, rounded on the way in, once or twice inside, and on the way out

# What fails is reported as it was drawn: to shrink it would compile for minutes.
PHASES = (Phase.explicit, Phase.generate)
repeatable = functools.partial(settings, deadline=None, derandomize=True, database=None, phases=PHASES)
every_implementation = pytest.mark.parametrize("implementation", FLOAT32)
LEFT_OUT_OF = [
    pytest.param(name, implementation, id=f"{name}-{implementation}") for name in LEFT_OUT for implementation in FLOAT32
]
siso_and_mimo = pytest.mark.parametrize("shape", [SISO, MIMO], ids=["siso", "mimo"])


@st.composite
def shapes(draw):
    rank = draw(st.sampled_from([1, 2, 4, 8]))
    groups = draw(st.sampled_from([1, 2, 3]))
    d_state = draw(st.sampled_from([4, 8, 12, 16]))
    flags = {name: draw(st.booleans()) for name in ("shared_angle", "skip", "gate", "norm", "ranked", "gate_ranked")}
    width = draw(st.sampled_from([1, 3, 8]))
    flags["norm"] &= width > 1  # see test_a_norm_over_one_channel
    return Case(
        batch=draw(st.integers(1, 2)),
        length=draw(st.sampled_from([1, 2, 5, 13, 17, 31])),
        heads=groups * draw(st.integers(1, 2)),
        groups=groups,
        rank=rank,
        d_state=d_state,
        width=width,
        planes=d_state // draw(st.sampled_from([2, 4])),
        rotation=draw(st.sampled_from(["adjacent", "half"])),
        **flags,
    )


@every_implementation
@repeatable(max_examples=4)
@given(shape=shapes(), seed=st.integers(0, 99), with_start=st.booleans())
@example(shape=SISO._replace(d_state=2, planes=1, length=17, gate=False, skip=False), seed=0, with_start=False)
@example(shape=MIMO._replace(rank=8, heads=6, groups=3, length=19, batch=1), seed=1, with_start=True)
def test_agrees_with_the_definition(shape, seed, with_start, implementation):
    """Values and every gradient, states in and out included, as `recurrent` gives them in float64."""
    inputs, cotangent = draw(shape, seed), cases.cotangents(shape)
    start_BL = None
    if with_start:
        start_BL = np.random.default_rng(seed).random((shape.batch, shape.length)) < 0.2
    want = cases.reference(inputs, start_BL, cotangent, shape.rotation)
    results, gradients = pulled(implementation, shape.rotation)(inputs, start_BL, cotangent)
    check_results(results, want[0], FORWARD)
    check_gradients(gradients, want[1], GRADIENT)


@every_implementation
def test_a_norm_over_one_channel(implementation):
    """Its gradient is what `1 - y^2 / (y^2 + eps)` leaves, so the definition loses digits in float32 too.

    The worst of eight draws (one loses ten times what another does) beside the worst of the definition's. They differ
    by how many roundings are magnified: Triton's gradient has four times the error.
    """
    shape = Case(batch=1, length=2, heads=2, rank=4, width=1, planes=4, shared_angle=False, gate=False, norm=True)
    cotangent, worst = cases.cotangents(shape), {"recurrent": 0.0, implementation: 0.0}
    for seed in range(8):
        inputs = draw(shape, seed)
        want = cases.reference(inputs, None, cotangent, shape.rotation)
        for name in worst:
            results, gradients = pulled(name, shape.rotation)(inputs, None, cotangent)
            check_results(results, want[0], FORWARD)
            worst[name] = max(worst[name], *cases.gradient_errors(gradients, want[1]).values())
    assert worst[implementation] < max(8 * worst["recurrent"], GRADIENT), worst


@pytest.mark.parametrize(("name", "implementation"), LEFT_OUT_OF)
def test_what_is_left_out_is_as_if_it_were_nothing(name, implementation):
    """Values and gradients without angle, beta, biases, or all that can be None; packed, with a carried state."""
    shape = LEFT_OUT[name]
    inputs, cotangent = draw(shape), cases.cotangents(shape)
    start_BL = np.random.default_rng(0).random((shape.batch, shape.length)) < 0.2
    want = cases.reference(inputs, start_BL, cotangent, shape.rotation)
    results, gradients = pulled(implementation, shape.rotation)(inputs, start_BL, cotangent)
    assert jax.tree.structure((results, gradients)) == jax.tree.structure(want)
    check_results(results, want[0], FORWARD)
    check_gradients(gradients, want[1], GRADIENT)

    full = with_nothing(shape)  # the same numbers, with zeros and ones for what is not there
    results, _ = cases.reference(full, start_BL, cases.cotangents(cases.whole(shape)), shape.rotation)
    assert rel_rms(results[0], want[0][0]) < 1e-12
    assert rel_rms(results[1].ssm_BHPN, want[0][1].ssm_BHPN) < 1e-12


def with_nothing(shape):
    """`draw(shape)`, zeros in the place of angle, beta, biases and their parts of the state."""
    drawn, whole = draw(shape), draw(cases.whole(shape))
    fill = lambda x, like: np.zeros_like(like) if x is None and like is not None else x  # noqa: E731
    return tuple(type(part)(*map(fill, part, like)) for part, like in zip(drawn, whole, strict=True))


@every_implementation
@siso_and_mimo
def test_bfloat16(shape, implementation):
    """bfloat16 q, k, v and gate, everything else float32; judged by float64 on the rounded numbers."""
    shape = shape._replace(length=37, width=16)  # a norm over fewer would cancel most of v_rank's gradient
    tokens, heads, state = draw(shape)
    tokens = cases.bfloat16(tokens)
    y, after = cases.cotangents(shape)
    state, after = (
        part._replace(k_BRHN=part.k_BRHN.astype(jnp.bfloat16), v_BHP=part.v_BHP.astype(jnp.bfloat16))
        for part in (state, after)
    )
    inputs, cotangent = (tokens, heads, state), (y.astype(jnp.bfloat16), after)
    want = cases.reference(inputs, None, cotangent, shape.rotation)

    results, gradients = pulled(implementation, shape.rotation)(inputs, None, cotangent)
    assert results[0].dtype == results[1].k_BRHN.dtype == results[1].v_BHP.dtype == jnp.bfloat16
    assert results[1].ssm_BHPN.dtype == results[1].angle_BHS.dtype == gradients[0].dt_BLH.dtype == jnp.float32
    check_results(results, want[0], BFLOAT16)
    check_gradients(gradients, want[1], 2 * BFLOAT16)


def compiled_text(shape, implementation: str) -> str:
    """Forward and backward as jax hands it to XLA, with the functions that it calls."""
    tokens, heads, state = draw(shape._replace(length=21))

    def both(*inputs):
        results, pull = jax.vjp(functools.partial(ssm, rotation=shape.rotation, implementation=implementation), *inputs)
        return results, pull(results)

    return str(jax.make_jaxpr(both)(tokens, heads, state))


@every_implementation
def test_what_is_left_out_is_not_computed(implementation):
    """No sine without an angle, no keys and values of the token before without a beta: not even in a kernel."""
    sines = re.compile(r"= (sin|cos)\b|59\.22")  # by name, or a coefficient of the polynomial for turns
    assert sines.search(compiled_text(SISO, implementation))
    assert not sines.search(compiled_text(SISO._replace(turns=False), implementation))
    whole, first_order = (compiled_text(SISO._replace(looks_back=looks_back), implementation) for looks_back in (1, 0))
    assert len(first_order.splitlines()) < len(whole.splitlines())
    ssd = compiled_text(SSD, implementation)
    assert len(ssd.splitlines()) < 0.8 * len(first_order.splitlines())


PIECES = st.lists(st.sampled_from([1, 3, 8]), min_size=2, max_size=9).filter(lambda lengths: sum(lengths) <= 24)


@every_implementation
@siso_and_mimo
@repeatable(max_examples=8)
@given(lengths=PIECES)
@example(lengths=[8, 8, 8])
@example(lengths=[1] * 9)
def test_pieces_with_the_state_carried_are_the_whole(lengths, shape, implementation):
    tokens, heads, state = draw(shape._replace(length=24))
    op = forward(implementation, shape.rotation)
    last = sum(lengths)
    whole, _ = op(tokens._replace(start_BL=start_row(())), heads, state)
    ys, begin = [], 0
    for length in lengths:
        y, state = op(rows(tokens, begin, begin + length), heads, state)
        ys.append(y)
        begin += length
    assert rel_rms(np.concatenate(ys, axis=1), whole[:, :last]) < FORWARD


@pytest.mark.parametrize("implementation", cases.NAMES)
@pytest.mark.parametrize("shape", [SISO._replace(length=21), MIMO._replace(length=1)], ids=["siso", "mimo_step"])
def test_no_state_is_the_empty_state(shape, implementation):
    """The same bits, of values and of gradients."""
    tokens, heads, _ = draw(shape)
    tokens = cases.bfloat16(tokens)  # mosaic_gpu has no others
    op = functools.partial(ssm, rotation=shape.rotation, implementation=implementation, chunk=8)
    used = {"both": lambda *both: both}
    if implementation == "mosaic_tpu":  # the one that does less where the state after the row is not used either
        used["y"] = lambda y, _: y

    @functools.partial(jax.jit, static_argnums=2)
    def run(tokens, heads, empty):
        def pulled(pick):
            state = empty_state(tokens) if empty else None
            results, pull = jax.vjp(lambda *inputs: pick(*op(*inputs, state)), tokens, heads)
            return results, pull(results)

        return {name: pulled(pick) for name, pick in used.items()}

    got, want = (run(tokens, heads, empty) for empty in (False, True))
    # An interpreted TPU kernel is XLA's program, which fuses a product with its sum here and not there: two units in
    # the last place of one bias's gradient, and none under XLA_FLAGS=--xla_cpu_max_isa=AVX, where nothing is fused.
    interpreted = implementation == "mosaic_tpu" and jax.default_backend() == "cpu"
    for (name, leaf), other in zip(cases.named(got).items(), jax.tree.leaves(want), strict=True):
        if interpreted and name.endswith("bias_HRN"):
            np.testing.assert_array_max_ulp(np.asarray(leaf), np.asarray(other), maxulp=2)
        else:
            np.testing.assert_array_equal(leaf, other, name)


@every_implementation
@siso_and_mimo
def test_gradients_through_a_carried_state(shape, implementation):
    """Two halves, the state carried on and its gradient carried back: the last state and all gradients of the whole."""
    shape = shape._replace(length=2 * LENGTH)
    inputs, cotangent = draw(shape), cases.cotangents(shape)
    (tokens, heads, state), (y, last) = inputs, cotangent
    begin, end = rows((tokens, y), 0, LENGTH), rows((tokens, y), LENGTH, None)
    call = pulled(implementation, shape.rotation)

    def half(piece, state, cotangent):
        return call((piece[0], heads, state), start_row(()), (piece[1], cotangent))

    (_, middle), _ = half(begin, state, last)
    (end_y, last), (of_end, end_heads, of_middle) = half(end, middle, last)
    (begin_y, _), (of_begin, begin_heads, of_state) = half(begin, state, of_middle)
    of_tokens = jax.tree.map(lambda *halves: np.concatenate(halves, axis=1), of_begin, of_end)
    gradients = of_tokens, jax.tree.map(np.add, begin_heads, end_heads), of_state
    want = cases.reference(inputs, None, cotangent, shape.rotation)
    check_results((np.concatenate([begin_y, end_y], axis=1), last), want[0], FORWARD)
    check_gradients(gradients, want[1], GRADIENT)


LENGTH = 24
# Document starts of a row of 24 tokens in chunks of 8: none, the first token, chunk edges, several in one chunk, every
# token, the last token.
STARTS = [(), (0,), (8, 16), (0, 9, 10, 13), (7, 15, 23), tuple(range(LENGTH))]
drawn_starts = st.sets(st.integers(0, LENGTH - 1), max_size=5).map(lambda found: tuple(sorted(found)))


def start_row(starts) -> np.ndarray:
    """start_BL of two rows, the second one without a start."""
    start_BL = np.zeros((2, LENGTH), bool)
    start_BL[0, list(starts)] = True
    return start_BL


def documents(starts) -> list[tuple[int, int]]:
    edges = sorted({0, *starts, LENGTH})
    return list(itertools.pairwise(edges))


def with_starts(test):
    for starts in STARTS:
        test = example(starts=starts)(test)
    return test


def first_row(tree):
    """Zeros in every row but the first."""
    return jax.tree.map(lambda array: np.concatenate([array[:1], np.zeros_like(array[1:])]), tree)


def check_isolation(pull, shape, starts, start_BL):
    """The loss of one document has gradients of exactly 0.0 elsewhere: before, after, the other row, the state."""
    shape = shape._replace(length=LENGTH)
    inputs, (y_cotangent, state_cotangent) = draw(shape), cases.cotangents(shape)
    last_cotangent = first_row(state_cotangent)
    no_cotangent = jax.tree.map(np.zeros_like, state_cotangent)
    for begin, end in documents(starts):
        inside_BL = np.zeros((2, LENGTH), bool)
        inside_BL[0, begin:end] = True
        cotangent = (y_cotangent * inside_BL[..., None, None], last_cotangent if end == LENGTH else no_cotangent)
        _, (tokens, _, state) = pull(inputs, start_BL, cotangent)
        assert np.any(tokens.v_BLHP[0, begin:end]), "the loss has no gradient at all"
        for name, gradient in cases.named(tokens).items():
            assert not np.any(np.asarray(gradient)[~inside_BL]), f"{name}: the loss of {begin}:{end} reaches past it"
        for name, gradient in cases.named(state).items():
            unreached = gradient if begin in starts else gradient[1:]
            assert not np.any(unreached), f"state{name}: the loss of {begin}:{end} reaches the incoming state"


@every_implementation
@siso_and_mimo
@with_starts
@repeatable(max_examples=6)
@given(starts=drawn_starts)
def test_no_gradient_crosses_a_boundary(starts, shape, implementation):
    check_isolation(pulled(implementation, shape.rotation), shape, starts, start_row(starts))


@pytest.mark.parametrize("late", [(9, 10, 14), (9, 14), (17,)])
def test_a_boundary_off_by_one_is_caught(late):
    """The check fails where the op is told that a document starts a token late, or not at all."""
    starts = (9, 10, 13) if 9 in late else (16,)
    with pytest.raises(AssertionError, match="reaches past it"):
        check_isolation(pulled("chunked", SISO.rotation), SISO, starts, start_row(late))


@every_implementation
@siso_and_mimo
@with_starts
@repeatable(max_examples=6)
@given(starts=drawn_starts)
def test_no_value_crosses_a_boundary(starts, shape, implementation):
    """Other documents, the other row and the state before a start may change as they like: not one bit differs."""
    shape = shape._replace(length=LENGTH)
    op, start_BL = forward(implementation, shape.rotation), start_row(starts)
    tokens, heads, state = draw(shape)
    others, _, other_state = draw(shape, seed=2)
    want, want_state = op(tokens._replace(start_BL=start_BL), heads, state)
    for begin, end in documents(starts):
        mask_BL = np.zeros((2, LENGTH), bool)
        mask_BL[0, begin:end] = True
        mixed = jax.tree.map(
            lambda array, other: np.where(mask_BL.reshape(2, LENGTH, *[1] * (array.ndim - 2)), array, 3 * other),  # noqa: B023
            tokens,
            others,
        )
        before = other_state if begin in starts else state
        got, got_state = op(mixed._replace(start_BL=start_BL), heads, before)
        np.testing.assert_array_equal(got[0, begin:end], want[0, begin:end])
        if end == LENGTH:
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), got_state, want_state)


XLA = ("recurrent", "associative", "chunked")


@pytest.mark.parametrize("implementation", XLA)
@siso_and_mimo
@pytest.mark.parametrize("part", [None, "dt_BLH", "v_BLHP", "k_BLRGN"])
def test_a_nan_stays_in_its_document_or_its_chunk(part, shape, implementation):
    """One token that is not a number: what it spoils, and that all the rest has the very same bits.

    Its document is NaN from there on, always. Only `recurrent` leaves all else alone. `chunked`, whose products mix the
    tokens of a chunk, may lose the rest of the chunk, and the state until a document starts in a later one;
    `associative`, whose products with 0 keep NaN, all from the chunk on.
    """
    shape, starts = shape._replace(length=LENGTH), (0, 5, 12, 14, 17)
    op, start_BL = forward(implementation, shape.rotation), start_row(starts)
    clean, heads, state = draw(shape)
    clean = clean._replace(start_BL=start_BL)
    want, want_state = op(clean, heads, state)
    for place in (3, 4, 8, 12, 15, 16, 23):
        at_BL = np.zeros((2, LENGTH), bool)
        at_BL[0, place] = True
        poison = lambda array: np.where(at_BL.reshape(2, LENGTH, *[1] * (array.ndim - 2)), np.nan, array)  # noqa: B023, E731
        floats = {
            name: poison(getattr(clean, name)).astype(np.float32)
            for name in ([part] if part else clean._fields[:-1])
            if getattr(clean, name) is not None
        }
        got, got_state = op(clean._replace(**floats), heads, state)
        end = next((start for start in starts if start > place), LENGTH)
        assert np.isnan(got[0, place:end]).any(axis=(1, 2)).all(), "the rest of its document counts"
        begin, until = place, end
        if implementation != "recurrent":
            begin, later = place // CHUNK * CHUNK, place // CHUNK * CHUNK + CHUNK
            until = next((start for start in starts if start >= max(end, later)), LENGTH)
        if implementation == "associative":
            until = LENGTH
        kept_BL = np.ones((2, LENGTH), bool)
        kept_BL[0, begin:until] = False
        np.testing.assert_array_equal(np.asarray(got)[kept_BL], np.asarray(want)[kept_BL], f"{place=}")
        rows_kept = slice(0 if until < LENGTH or (end < LENGTH and implementation == "recurrent") else 1, None)
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a[rows_kept], b[rows_kept]),  # noqa: B023
            got_state,
            want_state,
        )


@pytest.mark.parametrize("implementation", [name for name in XLA if name != "associative"])
@siso_and_mimo
def test_a_nan_in_the_incoming_state_ends_with_the_first_start(shape, implementation):
    """In the row that has it: in the middle of a chunk, at a chunk's edge, and where the row starts."""
    shape = shape._replace(length=LENGTH)
    op = forward(implementation, shape.rotation)
    tokens, heads, state = draw(shape)
    broken = jax.tree.map(lambda array: np.concatenate([np.full_like(array[:1], np.nan), array[1:]]), state)
    for first in (0, 8, 11, 23):
        tokens = tokens._replace(start_BL=start_row((first,)))
        want, want_state = op(tokens, heads, state)
        got, got_state = op(tokens, heads, broken)
        assert np.isnan(got[0, :first]).any(axis=(1, 2)).all()
        np.testing.assert_array_equal(got[0, first:], want[0, first:])
        np.testing.assert_array_equal(got[1], want[1])
        jax.tree.map(np.testing.assert_array_equal, got_state, want_state)


@every_implementation
@siso_and_mimo
@repeatable(max_examples=5)
@given(lengths=PIECES)
@example(lengths=[8, 3, 1, 1, 3, 8])
def test_packed_documents_are_separate_documents(lengths, shape, implementation):
    """A packed row gives each document what it gets alone; the incoming state reaches only the first."""
    tokens, heads, state = draw(shape._replace(length=LENGTH))
    edges = np.cumsum([0, *lengths])
    start_BL = np.zeros((2, LENGTH), bool)
    start_BL[:, edges[edges < LENGTH][1:]] = True
    packed, last = forward(implementation, shape.rotation)(tokens._replace(start_BL=start_BL), heads, state)
    alone = forward("recurrent", shape.rotation)
    for begin, end in itertools.pairwise(edges):
        before = state if begin == 0 else jax.tree.map(np.zeros_like, state)
        y, after = alone(rows(tokens, begin, end), heads, before)
        assert rel_rms(packed[:, begin:end], y) < FORWARD
        if end == LENGTH:
            check_results((y, last), (y, after), FORWARD)


@every_implementation
def test_rank_one_with_unit_weights_is_siso(implementation):
    tokens, heads, state = draw(SISO)
    ones_HRP = np.ones((SISO.heads, 1, SISO.width), np.float32)
    op = forward(implementation, "half")
    ranked = heads._replace(v_rank_HRP=ones_HRP, gate_rank_HRP=ones_HRP, out_rank_HRP=ones_HRP)
    check_results(op(tokens, ranked, state), op(tokens, heads, state), 1e-6)


def mamba2(c_BLGN, b_BLGN, x_BLHP, dt_BLH, log_a_BLH, skip_H):
    """h_t = exp(log_a_t) h_{t-1} + dt_t x_t b_t^T,  y_t = h_t c_t + D x_t, in float64 loops."""
    batch, length, heads, width = x_BLHP.shape
    groups, d_state = b_BLGN.shape[2:]
    y_BLHP = np.zeros((batch, length, heads, width))
    for row in range(batch):
        for head in range(heads):
            group = head // (heads // groups)
            h_PN = np.zeros((width, d_state))
            for t in range(length):
                x_P = x_BLHP[row, t, head].astype(np.float64)
                h_PN = np.exp(log_a_BLH[row, t, head], dtype=np.float64) * h_PN
                h_PN += dt_BLH[row, t, head] * np.outer(x_P, b_BLGN[row, t, group])
                y_BLHP[row, t, head] = h_PN @ c_BLGN[row, t, group] + skip_H[head] * x_P
    return y_BLHP


@every_implementation
def test_with_all_left_out_it_is_mamba2(implementation):
    tokens, heads, _ = draw(SSD._replace(skip=True, length=23))
    assert all(x is None for x in (tokens.dt_BLH, tokens.beta_BLH, tokens.angle_BLHS, *heads[:2], *heads[3:]))
    q, k = tokens.q_BLRGN[:, :, 0], tokens.k_BLRGN[:, :, 0]
    want = mamba2(q, k, tokens.v_BLHP, tokens.gamma_BLH, tokens.log_a_BLH, heads.skip_H)
    assert rel_rms(forward(implementation, "adjacent")(tokens, heads)[0], want) < FORWARD


@pytest.mark.parametrize("implementation", sorted({*FLOAT32} - {"recurrent"}))
def test_a_gentle_decay_after_steep_ones_keeps_its_digits(implementation):
    """Differences of float32 sums that have grown to thousands would be off by 1e-3."""
    shape = SISO._replace(length=67)
    tokens, heads, state = draw(shape)
    tokens = tokens._replace(log_a_BLH=np.where(np.arange(67)[:, None] < 30, -300, tokens.log_a_BLH))
    inputs, cotangent = (tokens, heads, state), cases.cotangents(shape)
    want = cases.reference(inputs, None, cotangent, shape.rotation)
    results, gradients = pulled(implementation, shape.rotation, 64)(inputs, None, cotangent)
    check_results(results, want[0], FORWARD)
    check_gradients(gradients, want[1], GRADIENT)


@pytest.mark.parametrize("implementation", sorted({*FLOAT32} - {"recurrent"}))
def test_chunk_size_does_not_matter(implementation):
    shape = MIMO._replace(length=67, rank=2)
    inputs, cotangent = draw(shape), cases.cotangents(shape)
    want = cases.reference(inputs, None, cotangent, shape.rotation)
    for chunk in (1, 16, 64, 1000):
        check_results(forward(implementation, shape.rotation, chunk)(*inputs), want[0], FORWARD)
    results, gradients = pulled(implementation, shape.rotation, 3)(inputs, None, cotangent)
    check_results(results, want[0], FORWARD)
    check_gradients(gradients, want[1], GRADIENT)


@every_implementation
@siso_and_mimo
def test_permuting_heads_permutes_outputs(shape, implementation):
    shape = shape._replace(length=LENGTH, groups=1, shared_angle=False)
    tokens, heads, state = draw(shape)
    tokens = tokens._replace(start_BL=start_row((9, 16)))
    order = np.random.default_rng(0).permutation(shape.heads)
    swapped = tokens._replace(
        **{
            name: getattr(tokens, name)[:, :, order]
            for name in ("v_BLHP", "dt_BLH", "log_a_BLH", "gamma_BLH", "beta_BLH", "angle_BLHS", "gate_BLHP")
            if getattr(tokens, name) is not None
        }
    )
    moved_state = State(*(array[:, order] for array in state[:2]), state.k_BRHN[:, :, order], state.v_BHP[:, order])
    op = forward(implementation, shape.rotation)
    y, after = op(tokens, heads, state)
    got, got_after = op(swapped, jax.tree.map(lambda array: array[order], heads), moved_state)
    want = State(*(array[:, order] for array in after[:2]), after.k_BRHN[:, :, order], after.v_BHP[:, order])
    check_results((got, got_after), (y[:, :, order], want), 1e-6)


@pytest.mark.parametrize("implementation", sorted({*FLOAT32} - {"triton", "mosaic_tpu"}))  # which have no float64
@siso_and_mimo
def test_gradients_are_finite_differences(shape, implementation):
    """Along a random direction of each input, in float64: (f(x + e d) - f(x - e d)) / 2e is the gradient times d."""
    shape = shape._replace(length=7)
    with jax.enable_x64(True):
        inputs, cotangent = draw(shape, dtype=np.float64), cases.cotangents(shape, dtype=np.float64)
        direction = draw(shape, seed=3, dtype=np.float64)
        leaves, structure = jax.tree.flatten(inputs)
        start_BL = np.arange(7)[None] == np.array([[4], [9]])

        @jax.jit
        def loss(inputs):
            tokens, heads, state = inputs
            op = functools.partial(ssm, rotation=shape.rotation, implementation=implementation, chunk=3)
            results = op(tokens._replace(start_BL=start_BL), heads, state)
            return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), results, cotangent)))

        results, gradients = pulled(implementation, shape.rotation, 3)(inputs, start_BL, cotangent)
        assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype(np.float64)}
        step = 1e-6
        for index, (name, gradient) in enumerate(cases.named(gradients).items()):
            along = jax.tree.leaves(direction)[index]
            moved = [
                float(loss(jax.tree.unflatten(structure, [*leaves[:index], at, *leaves[index + 1 :]])))
                for at in (leaves[index] + step * along, leaves[index] - step * along)
            ]
            numeric, exact = (moved[0] - moved[1]) / (2 * step), np.sum(gradient * along)
            size = np.sqrt(np.sum(np.square(gradient * along)))
            assert abs(numeric - exact) < 1e-6 * max(size, abs(exact), 1), f"{name}: {numeric} is not {exact}"


@every_implementation
def test_vmap_and_checkpoint(implementation):
    shape = MIMO._replace(batch=1, length=9)
    pairs = [(draw(shape, seed), cases.cotangents(shape, seed + 1)) for seed in (0, 4)]
    inputs, cotangent = jax.tree.map(lambda *arrays: np.stack(arrays), *pairs)
    op = functools.partial(ssm, rotation=shape.rotation, implementation=implementation, chunk=4)

    def call(inputs, cotangent):
        results, pull = jax.vjp(jax.checkpoint(op), *inputs)
        return results, pull(cotangent)

    results, gradients = jax.jit(jax.vmap(call))(inputs, cotangent)
    for index, (one, one_cotangent) in enumerate(pairs):
        want = cases.reference(one, None, one_cotangent, shape.rotation)
        pick = functools.partial(jax.tree.map, lambda array: array[index])  # noqa: B023
        check_results(pick(results), want[0], FORWARD)
        check_gradients(pick(gradients), want[1], GRADIENT)


@pytest.mark.parametrize(
    "part", ["dt_BLH", "log_a_BLH", "gamma_BLH", "beta_BLH", "angle_BLHS", "q_BLRGN", "v_BLHP", "gate_BLHP"]
)
def test_planted_error_is_caught(part):
    """One input of one head or rank off by one part in a thousand: neither outputs nor gradients pass."""
    (tokens, heads, state), cotangent = draw(MIMO), cases.cotangents(MIMO)
    want = cases.reference((tokens, heads, state), None, cotangent, MIMO.rotation)
    spoilt = getattr(tokens, part).copy()
    spoilt[:, :, 0] *= np.float32(1.001)
    inputs = (tokens._replace(**{part: spoilt}), heads, state)
    results, gradients = pulled("chunked", MIMO.rotation)(inputs, None, cotangent)
    with pytest.raises(AssertionError, match="is not below"):
        check_results(results, want[0], FORWARD)
    with pytest.raises(AssertionError, match="is not below"):
        check_gradients(gradients, want[1], GRADIENT)


@pytest.mark.parametrize("part", ["angle_BHS", "ssm_BHPN", "k_BRHN", "v_BHP"])
def test_planted_error_in_the_carried_state_is_caught(part):
    tokens, heads, state = draw(SISO)
    op = forward("chunked", SISO.rotation)
    whole, _ = op(tokens, heads, state)
    _, middle = op(rows(tokens, 0, 6), heads, state)
    y, _ = op(rows(tokens, 6, None), heads, middle._replace(**{part: getattr(middle, part) * 1.001}))
    assert rel_rms(y, whole[:, 6:]) > FORWARD


@pytest.mark.parametrize("implementation", FLOAT32)
@pytest.mark.parametrize("shape", [SISO, MIMO], ids=["siso", "mimo"])
def test_the_same_call_gives_the_same_bits(shape, implementation):
    """Values and gradients: no sum depends on the order in which programs end."""
    shape, start_BL = shape._replace(length=LENGTH), start_row((9, 10, 16))
    inputs, cotangent = draw(shape), cotangents(shape)
    call = pulled(implementation, shape.rotation)
    for first, second in zip(*(jax.tree.leaves(call(inputs, start_BL, cotangent)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, second)

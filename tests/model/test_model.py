"""The whole model, a hybrid: pieces are the whole, documents are alone, and how it is run does not matter."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.model import LanguageModel, init_params
from tests.helpers import rel_rms

FORWARD, GRADIENT = 1e-5, 2e-4
HYBRID = ModelConfig(
    vocab_size=29,
    d_model=16,
    pattern="M2AG1" * 2,
    d_ff=24,
    tie_embeddings=False,
    d_state=8,
    head_dim=8,
    mimo_rank=2,
    attn_heads=2,
    attn_head_dim=8,
    attn_rope_theta=100.0,
    delta_heads=2,
    delta_head_dim=4,
    mamba1_state=4,
    chunk=4,
)
ONCE = {"pattern": "M2AG1"}  # every mixer, in as few layers as there are: rounding adds up over layers
SMALL = ModelConfig(vocab_size=256, d_model=16, pattern="M", d_state=8, head_dim=8)
LENGTHS = (6, 1, 6)  # documents of a row of 13 tokens; also the pieces that are compiled
BATCH, LENGTH = 2, sum(LENGTHS)
STARTS = np.cumsum((0, *LENGTHS))[:-1]


@functools.cache
def params(**changes):
    return init_params(dataclasses.replace(HYBRID, **changes), jax.random.key(0))


def apply(config, params, tokens_BL, state=None, start_BL=None):
    return LanguageModel(config).apply({"params": params}, tokens_BL, state, start_BL)


@functools.cache
def compiled(**changes):
    return jax.jit(functools.partial(apply, dataclasses.replace(HYBRID, **changes)))


@functools.cache
def gradients(**changes):
    """The logits, and gradients of params with respect to a fixed random functional of them.

    Its value is no test: it is a small difference of large numbers.
    """
    config = dataclasses.replace(HYBRID, **changes)

    def loss(params):
        logits_BLV, _ = apply(config, params, tokens())
        return jnp.mean(logits_BLV * jax.random.normal(jax.random.key(2), logits_BLV.shape)), logits_BLV

    gradient, logits_BLV = jax.jit(jax.grad(loss, has_aux=True))(params(pattern=config.pattern))
    return logits_BLV, gradient


def tokens():
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, HYBRID.vocab_size)


def starts():
    return jnp.zeros((BATCH, LENGTH), bool).at[:, STARTS].set(True)


def run_on(begin, end, state, start_BL):
    """The tokens from begin to end after `state`, None for none: always with a state and starts, to compile once."""
    if state is None:
        state = LanguageModel(HYBRID).empty_state(BATCH, LENGTH)
    return compiled()(params(), tokens()[:, begin:end], state, start_BL[:, begin:end])


def worst(got, want):
    return max(jax.tree.leaves(jax.tree.map(rel_rms, got, want)))


@pytest.mark.full
def test_logits_are_float32_and_as_wide_as_the_padded_vocabulary():
    logits_BLV, state = compiled()(params(), tokens())
    assert logits_BLV.shape == (BATCH, LENGTH, 32)
    assert logits_BLV.dtype == jnp.float32
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    empty = LanguageModel(HYBRID).empty_state(BATCH, LENGTH)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), empty)


@pytest.mark.full
@pytest.mark.parametrize("documents", [False, True])
def test_prefill_in_pieces_and_decoding_are_the_whole(documents):
    start_BL = starts() if documents else jnp.zeros((BATCH, LENGTH), bool)
    whole_BLV, whole_state = run_on(0, LENGTH, None, start_BL)
    for cuts in [(0, 6, 12, 13), (0, 1, 7, 13), range(LENGTH + 1)]:
        state, pieces = None, []
        for begin, end in itertools.pairwise(cuts):
            logits_BLV, state = run_on(begin, end, state, start_BL)
            pieces.append(logits_BLV)
        assert rel_rms(jnp.concatenate(pieces, axis=1), whole_BLV) < FORWARD
        assert worst(turned(state), turned(whole_state)) < FORWARD
    pieces[0] *= 1 + 1e-3  # a planted error in one token
    assert rel_rms(jnp.concatenate(pieces, axis=1), whole_BLV) > 10 * FORWARD


def turned(state):
    """Angles are compared as points of the circle."""

    def turn(path, x):
        return jnp.stack([jnp.cos(x), jnp.sin(x)]) if "angle" in jax.tree_util.keystr(path) else x

    return jax.tree_util.tree_map_with_path(turn, state)


@pytest.mark.full
def test_packed_documents_are_the_documents_alone():
    packed_BLV, _ = run_on(0, LENGTH, None, starts())
    nothing_BL = jnp.zeros((BATCH, LENGTH), bool)
    for begin, length in zip(STARTS, LENGTHS, strict=True):
        alone_BLV, _ = run_on(begin, begin + length, None, nothing_BL)
        assert rel_rms(packed_BLV[:, begin : begin + length], alone_BLV) < FORWARD
    unpacked_BLV, _ = run_on(0, LENGTH, None, nothing_BL)
    assert rel_rms(unpacked_BLV, packed_BLV) > 1e-3  # the boundaries do something


@pytest.mark.full
def test_no_gradient_crosses_a_boundary():
    """Exactly zero, through the embedding of another document's tokens and through the incoming state."""
    row_BL = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))  # every token its own embedding, and the head is not tied
    empty = LanguageModel(HYBRID).empty_state(BATCH, LENGTH + 6)
    _, state = jax.jit(functools.partial(apply, HYBRID))(params(), row_BL[:, :6], empty)
    start_BL = starts().at[:, 0].set(False)  # the first document continues the state

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), allow_int=True)
    def gradient(params, state, counted_L):
        logits_BLV, _ = apply(HYBRID, params, row_BL, state, start_BL)
        return jnp.sum(jnp.sin(logits_BLV) * counted_L[:, None])

    for document, (begin, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        inside = (np.arange(LENGTH) >= begin) & (np.arange(LENGTH) < begin + length)
        of_params, of_state = gradient(params(), state, inside.astype(np.float32))
        per_token = np.abs(of_params["embedding"]["embedding"][:LENGTH]).max(axis=1)
        assert (per_token[inside] > 0).all()
        assert (per_token[~inside] == 0.0).all()
        floats = [x for x in jax.tree.leaves(of_state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert len(floats) == 15
        assert all((np.abs(x).max() > 0) == (document == 0) for x in floats)


@pytest.mark.full
@pytest.mark.parametrize(
    "change", [{"unroll": 2}, {"unroll": 100}, *({"remat": how} for how in ("rotation", "op", "block"))], ids=str
)
def test_how_it_is_run_changes_no_value_and_no_gradient(change):
    logits_BLV, gradient = gradients(**change)
    want_BLV, want_gradient = gradients()
    assert rel_rms(logits_BLV, want_BLV) < FORWARD
    assert worst(gradient, want_gradient) < FORWARD


@pytest.mark.full  # as what would see it
def test_a_planted_error_in_one_layer_is_seen():
    wrong = jax.tree.map(lambda x: x, params())
    layer = wrong["segment_0"]["block_0"]["mixer"]
    layer["in_zx"] = layer["in_zx"].at[1].multiply(1.001)
    logits_BLV, _ = compiled()(wrong, tokens())
    assert rel_rms(logits_BLV, compiled()(params(), tokens())[0]) > FORWARD


@pytest.mark.full
def test_bfloat16_is_close():
    want_BLV, _ = compiled(**ONCE)(params(**ONCE), tokens())
    got_BLV, state = compiled(**ONCE, compute_dtype="bfloat16")(params(**ONCE), tokens())
    assert got_BLV.dtype == jnp.float32
    assert 1e-4 < rel_rms(got_BLV, want_BLV) < 2e-2  # eps 4e-3, three roundings in each of five layers
    recurrent, cache = (state["segment_0"][f"block_{j}"] for j in (0, 2))
    assert cache.k_BTKE.dtype == recurrent.k_BRHN.dtype == jnp.bfloat16
    assert recurrent.ssm_BHPN.dtype == recurrent.angle_BHS.dtype == jnp.float32
    gradient, want = gradients(**ONCE, compute_dtype="bfloat16")[1], gradients(**ONCE)[1]
    assert worst(jax.tree.map(jnp.ravel, gradient["head"]), jax.tree.map(jnp.ravel, want["head"])) < 2e-2
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.full
def test_a_bfloat16_residual_is_the_other_choice():
    narrow = ONCE | {"compute_dtype": "bfloat16"}
    want_BLV, _ = compiled(**narrow)(params(**ONCE), tokens())
    got_BLV, _ = compiled(**narrow, residual_in_fp32=False)(params(**ONCE), tokens())
    assert 1e-4 < rel_rms(got_BLV, want_BLV) < 2e-2


OUTSIDE = (-(2**31), -1, 29, 31, 32, 2**31 - 1)  # of 29 ids in an embedding of 32 rows


@pytest.mark.parametrize("wrong", OUTSIDE)
def test_an_id_out_of_range_gives_nan_and_not_another_token(wrong):
    logits_BLV, _ = compiled()(params(), tokens().at[0, 3].set(wrong))
    assert np.isnan(logits_BLV[0, 3:]).all()
    assert np.isfinite(logits_BLV[1]).all()


@pytest.mark.full
def test_ids_are_the_same_of_any_integer_dtype():
    model, row_BL = LanguageModel(SMALL), np.array([[0, 255]])
    small = init_params(SMALL, jax.random.key(0))
    want_BLV, _ = jax.jit(model.apply)({"params": small}, row_BL)
    assert np.isfinite(want_BLV).all()
    for dtype in (np.uint8, np.uint16, np.int16, np.uint32):
        got_BLV, _ = jax.jit(model.apply)({"params": small}, row_BL.astype(dtype))
        np.testing.assert_array_equal(got_BLV, want_BLV)
    got_BLV, _ = jax.jit(model.apply)({"params": small}, np.array([[2**32 - 1]], np.uint32))
    assert np.isnan(got_BLV).all()


@pytest.mark.parametrize("wrong", [*OUTSIDE, 2**32 + 5])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_an_id_out_of_range_is_an_error_where_it_is_known(kind, wrong):
    if kind is jnp.asarray and wrong >= 2**31:
        return  # no int32 can be that
    row_BL = kind(np.array([[1, wrong, 2]], np.int64))
    message = f"token id {wrong} is out of range: the vocabulary is 29"
    with pytest.raises(ValueError, match=message):
        apply(HYBRID, params(), row_BL)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda params: apply(HYBRID, params, row_BL))(params())


@pytest.mark.parametrize(
    ("ids_BL", "named"),
    [
        (np.ones((1, 2)), r"tokens are float\d\d, wanted an array of integers"),
        (np.ones((1, 2), bool), "tokens are bool, wanted"),
        (np.ones(2, int), r"tokens have shape \(2,\), wanted \(B, L\)"),
        (np.ones((2, 0), int), r"tokens have shape \(2, 0\), .* at least one row and one token"),
        (np.ones((0, 2), int), r"tokens have shape \(0, 2\), .* at least one row and one token"),
    ],
    ids=["float", "bool", "row", "no_token", "no_row"],
)
def test_ids_are_rows_of_integers(ids_BL, named):
    for run in (functools.partial(apply, HYBRID), compiled()):
        with pytest.raises(ValueError, match=named):
            run(params(), ids_BL)
    with pytest.raises(ValueError, match="tokens are list, wanted"):
        apply(HYBRID, params(), ids_BL.tolist())


@pytest.mark.parametrize("letter", "M2AG1")
def test_starts_are_a_bool_a_token(letter):
    """Of every mixer: what attention and others can broadcast would part documents elsewhere."""
    model = LanguageModel(dataclasses.replace(HYBRID, pattern=letter))
    for start, wanted in (
        (np.zeros((BATCH, 1), bool), r"start has shape \(2, 1\), wanted \(2, 13\)"),
        (np.zeros((1, LENGTH), bool), r"start has shape \(1, 13\), wanted \(2, 13\)"),
        (np.zeros(LENGTH, bool), r"start has shape \(13,\), wanted \(2, 13\)"),
        (np.zeros((BATCH, LENGTH)), "start is float64, wanted an array of bool"),
        ([[False] * LENGTH] * BATCH, "start is list, wanted an array of bool"),
    ):
        with pytest.raises(ValueError, match=wanted):
            model.apply({"params": {}}, tokens(), None, start)


@pytest.mark.parametrize("letter", "M2AG1")
def test_a_state_is_of_the_model_and_of_as_many_rows(letter):
    """Of every mixer: attention would broadcast one row's cache over all."""
    model = LanguageModel(dataclasses.replace(HYBRID, pattern=letter))
    for rows in (1, 3):
        with pytest.raises(ValueError, match=rf"state\['segment_0'\]\['block_0'\].* \(1, {rows}, .*wanted \(1, 2, "):
            model.apply({"params": {}}, tokens(), model.empty_state(rows, 20))
    state = model.empty_state(BATCH, 20)
    other = LanguageModel(dataclasses.replace(HYBRID, pattern=letter * 2)).empty_state(BATCH, 20)
    for wrong in ({}, (tokens(), state), np.zeros((BATCH, LENGTH), bool), state["segment_0"]):
        with pytest.raises(ValueError, match=r"the state is .*, wanted one of this model.*segment_0"):
            model.apply({"params": {}}, tokens(), wrong)
    with pytest.raises(ValueError, match=r"state.* has shape \(2, 2, .*, wanted \(1, 2, "):
        model.apply({"params": {}}, tokens(), other)


@pytest.mark.full
def test_two_calls_with_room_for_both_are_the_whole():
    """As written down: logits, state = apply(tokens, capacity=...); apply(next, state)."""
    whole_BLV, _ = compiled()(params(), tokens())
    model, variables = LanguageModel(HYBRID), {"params": params()}
    for run in (model.apply, jax.jit(model.apply, static_argnames="capacity")):
        first_BLV, state = run(variables, tokens()[:, :12], capacity=LENGTH)
        last_BLV, state = run(variables, tokens()[:, 12:], state)
        assert rel_rms(jnp.concatenate([first_BLV, last_BLV], axis=1), whole_BLV) < FORWARD
        shapes = jax.tree.map(jnp.shape, model.empty_state(BATCH, LENGTH))
        assert jax.tree.map(jnp.shape, state) == shapes


@pytest.mark.full
def test_a_full_cache_is_an_error_where_it_is_known_and_nan_where_not():
    model, variables, next_BL = LanguageModel(HYBRID), {"params": params()}, tokens()[:, :1]
    _, state = compiled()(params(), tokens()[:, :12])
    with pytest.raises(ValueError, match=r"1 more tokens do not fit .* 12 of 12.* capacity=13 or more"):
        model.apply(variables, next_BL, state)
    logits_BLV, state = jax.jit(model.apply)(variables, next_BL, state)
    assert np.isnan(logits_BLV).all()
    with pytest.raises(ValueError, match="13 of 12"):
        model.apply(variables, next_BL, state)


@pytest.mark.full
def test_no_attention_needs_no_room():
    run, variables = jax.jit(LanguageModel(SMALL).apply), {"params": init_params(SMALL, jax.random.key(0))}
    _, state = run(variables, np.array([[1, 2]]))
    want_BLV, _ = run(variables, np.array([[1, 2, 3]]))
    got_BLV, _ = run(variables, np.array([[3]]), state)
    assert rel_rms(got_BLV[:, 0], want_BLV[:, 2]) < FORWARD


def test_the_config_is_of_a_model():
    """A `Config` is around that of its model, and what `launch` has at hand."""
    with pytest.raises(ValueError, match=r"config is Config, wanted ModelConfig, which is `Config\.model`"):
        init_params(Config(), jax.random.key(0))
    with pytest.raises(ValueError, match="config is Config, wanted ModelConfig"):
        LanguageModel(Config()).apply({"params": {}}, tokens())


def test_a_capacity_that_means_nothing_is_named():
    model, variables = LanguageModel(HYBRID), {"params": params()}
    with pytest.raises(ValueError, match="capacity=12 is less than the 13 tokens of this call"):
        model.apply(variables, tokens(), capacity=12)
    state = model.empty_state(BATCH, 20)
    with pytest.raises(ValueError, match=r"capacity=20 .* state"):
        model.apply(variables, tokens(), state, capacity=20)
    for wrong in (20.0, "20"):
        with pytest.raises(ValueError, match=rf"capacity={wrong!r} is (float|str), wanted a whole number"):
            model.apply(variables, tokens(), capacity=wrong)
    with pytest.raises(ValueError, match="capacity=-1 is less than 0"):
        model.empty_state(BATCH, -1)
    with pytest.raises(ValueError, match="batch=0 is less than 1"):
        model.empty_state(0, 20)


@pytest.mark.full
def test_a_tied_head_is_the_embedding_and_layer_norm_has_biases():
    config = dataclasses.replace(HYBRID, pattern="M", d_ff=0, tie_embeddings=True, norm="layer")
    tied = init_params(config, jax.random.key(0))
    assert "head" not in tied
    assert tied["norm"].keys() == {"scale", "bias"}
    untied = tied | {"head": {"kernel": tied["embedding"]["embedding"].T}}
    got_BLV, _ = apply(config, tied, tokens())
    want_BLV, _ = apply(dataclasses.replace(config, tie_embeddings=False), untied, tokens())
    assert rel_rms(got_BLV, want_BLV) == 0

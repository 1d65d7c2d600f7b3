"""A mixer by itself: parameters and inputs of random numbers, and what each with a recurrent state has to pass."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import rel_rms

BATCH, LENGTH, STARTS = 2, 13, (0, 2, 3, 9)
FORWARD = 1e-5


def start_row():
    """The second row is one document."""
    start_BL = np.zeros((BATCH, LENGTH), bool)
    start_BL[0, list(STARTS)] = True
    return start_BL


class Alone:
    """A mixer of a config."""

    def __init__(self, mixer, config):
        self.mixer, self.config = mixer, config
        self.compiled = functools.cache(self._compiled)

    def params(self):
        """Parameters of the layer's shapes, none of them at a value that hides it."""
        random, like = np.random.default_rng(0), jnp.zeros((1, 1, self.config.d_model))
        shapes = jax.tree.map(
            lambda box: box.value.shape,
            jax.eval_shape(self.mixer(self.config).init, jax.random.key(0), like)["params"],
            is_leaf=lambda x: hasattr(x, "value"),
        )
        return {name: 0.5 * random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def inputs(self):
        return np.random.default_rng(1).standard_normal((BATCH, LENGTH, self.config.d_model)).astype(np.float32)

    def _compiled(self, **changes):
        mixer = self.mixer(dataclasses.replace(self.config, **changes))
        return jax.jit(lambda params, x_BLD, state, start_BL: mixer.apply({"params": params}, x_BLD, state, start_BL))

    def check_pieces(self):
        """Pieces are the whole: shorter than the convolution's window, a token, a start inside a window."""
        params, x_BLD, start_BL, run = self.params(), self.inputs(), start_row(), self.compiled()
        empty = self.mixer.empty_state(self.config, BATCH, 0)
        whole_BLD, last = run(params, x_BLD, empty, start_BL)
        for cuts in ((0, 1, 3, 4, 7, 13), range(LENGTH + 1)):
            state, pieces = empty, []
            for begin, end in itertools.pairwise(cuts):
                y_BLD, state = run(params, x_BLD[:, begin:end], state, start_BL[:, begin:end])
                pieces.append(y_BLD)
            assert rel_rms(np.concatenate(pieces, axis=1), whole_BLD) < FORWARD
            for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
                assert rel_rms(got, want) < FORWARD

    def check_bfloat16(self, want_BLD):
        """The equations of `params` and `inputs` to a few roundings; the state has the dtypes of `empty_state`."""
        run, narrow = self.compiled(compute_dtype="bfloat16"), jnp.bfloat16(self.inputs())
        y_BLD, state = run(self.params(), narrow, None, None)
        assert 1e-4 < rel_rms(np.asarray(y_BLD, np.float64), want_BLD) < 3e-2
        empty = self.mixer.empty_state(dataclasses.replace(self.config, compute_dtype="bfloat16"), BATCH, 0)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), empty)

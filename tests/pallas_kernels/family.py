"""What all kernels are held to: a backend's file says what is its own, and has more where it has more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mamba3_jax.ops.kernels import kernels
from mamba3_jax.ops.recurrent import recurrent
from pallas_kernels.ssm.cases import LEFT_OUT, MIMO, SISO, Case
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import bfloat16, draw

# One token in all that may be there, and in all that may be left out.
TOKENS = {
    "siso": SISO._replace(length=1),  # groups, an angle that heads share
    "mimo4": MIMO._replace(length=1),
    **{name: shape._replace(length=1) for name, shape in LEFT_OUT.items()},
}


def mesh_of(kind: str, platform: str, cores: int | None = None, devices: int = 1) -> AbstractMesh:
    """Devices that this process does not have: programs are lowered for them."""
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return AbstractMesh((devices,), ("device",), axis_types=(AxisType.Auto,), abstract_device=device)


GPU = mesh_of("NVIDIA H200", "gpu")
TPU = mesh_of("TPU v5 lite", "tpu", cores=1)


def start_of(shape: Case, places) -> np.ndarray | None:
    """A document starts at every one of `places` in the first row; None: no starts at all."""
    if not places:
        return None
    return np.isin(np.arange(shape.length), places)[None] & (np.arange(shape.batch) == 0)[:, None]


@functools.cache
def wanted(shape: Case, starts, narrow: bool):
    """(y, state), gradients of `recurrent` in float64 on a row as drawn."""
    tokens, *others = draw(shape)
    inputs = bfloat16(tokens) if narrow else tokens, *others
    return cases.reference(inputs, start_of(shape, starts), cases.cotangents(shape), shape.rotation)


def narrow_state(state):
    """With keys and values as tokens of bfloat16 leave them."""
    left = {"k_BRHN": state.k_BRHN, "v_BHP": state.v_BHP}
    return state._replace(**jax.tree.map(lambda array: array.astype(jnp.bfloat16), left))


class Decoding:
    """A backend's decoding step is `recurrent` in float64, on the very same numbers, to a few roundings of float32.

    Tests of a subclass, `Test...`, run over its shapes. `pair` are two of them, of one rank and of several, in which
    everything is there.
    """

    backend: str
    shapes: dict[str, Case] = TOKENS
    pair = ("siso", "mimo4")
    differentiated = pair
    starts = (False, True)  # whether every other row starts; a row that does not is seen beside one that does, too
    interpret: object = True

    def pytest_generate_tests(self, metafunc):
        ids = {"start": lambda start: "start" if start else "goes_on"}
        for argument, values in {
            "name": self.shapes,
            "one_of_pair": self.pair,
            "start": self.starts,
            "differentiated": self.differentiated,
        }.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, list(values), ids=ids.get(argument))

    def how_of(self, name: str) -> dict:
        """What the kernel is told for a shape beside its inputs."""
        return {}

    def step(self, shape: Case, **how):
        """(tokens, heads, state) -> y, state."""
        return functools.partial(
            kernels, backend=self.backend, rotation=shape.rotation, **{"interpret": self.interpret} | how
        )

    def run(self, name: str, inputs):
        return compiled(type(self), name)(*inputs)

    def test_is_recurrent(self, name, start):
        """Of what was before a start nothing is seen, not even what is not a number."""
        inputs = drawn(self.shapes[name], start=start)
        cases.check_results(self.run(name, inputs), double(inputs, self.shapes[name]), 1e-6)

    def test_a_start_forgets_exactly(self, one_of_pair):
        check_forgets(functools.partial(self.run, one_of_pair), self.shapes[one_of_pair])

    def test_gradients(self, differentiated):
        """Those of `recurrent`, the state's included, packed or not."""
        shape = self.shapes[differentiated]
        inputs, cotangent = draw(shape), cases.cotangents(shape)
        run = cases.with_gradients(self.step(shape))
        for start_BL in (None, start_rows(shape)):
            _, gradients = run(inputs, start_BL, cotangent)
            cases.check_gradients(gradients, cases.reference(inputs, start_BL, cotangent, shape.rotation)[1], 1e-5)

    def test_three_steps_are_a_row(self, one_of_pair):
        shape, outputs = self.shapes[one_of_pair]._replace(length=3), []
        tokens, heads, state = draw(shape)
        want = double((tokens, heads, state), shape)
        for token in range(3):
            y_BLHP, state = self.run(one_of_pair, (cases.rows(tokens, token, token + 1), heads, state))
            outputs.append(y_BLHP)
        cases.check_results((np.concatenate(outputs, axis=1), state), want, 2e-6)

    @pytest.mark.parametrize("unroll", [1, 3])
    def test_layers_in_a_scan(self, one_of_pair, unroll):
        """Each with a state of its own, which XLA for GPUs would cut out inside the kernel that writes over it."""
        shape = self.shapes[one_of_pair]
        tokens, heads, state = draw(shape)
        states = jax.tree.map(lambda array: jnp.stack([array, array / 2, -array]), state)

        def layer(v_BLHP, state):
            y_BLHP, state = self.step(shape)(tokens._replace(v_BLHP=v_BLHP), heads, state)
            return y_BLHP, (y_BLHP, state)

        run = jax.jit(lambda v_BLHP, states: jax.lax.scan(layer, v_BLHP, states, unroll=unroll)[1])
        ys, after = run(tokens.v_BLHP, states)
        v_BLHP = tokens.v_BLHP
        for index in range(3):
            given = tokens._replace(v_BLHP=v_BLHP), heads, jax.tree.map(lambda array: array[index], states)  # noqa: B023
            got = ys[index], jax.tree.map(lambda array: array[index], after)  # noqa: B023
            cases.check_results(got, double(given, shape), 1e-6)
            v_BLHP = ys[index]

    def test_bfloat16(self, one_of_pair):
        """q, k, v and gate of 8 bits: the state is as exact as ever, y and the key left behind are rounded once."""
        tokens, heads, state = drawn(self.shapes[one_of_pair], start=True)
        inputs = bfloat16(tokens), heads, narrow_state(state)
        y_BLHP, after = self.run(one_of_pair, inputs)
        want_y_BLHP, want = double(inputs, self.shapes[one_of_pair])
        assert (y_BLHP.dtype, after.k_BRHN.dtype, after.v_BHP.dtype) == (jnp.bfloat16,) * 3
        assert rel_rms(np.asarray(after.ssm_BHPN, np.float64), want.ssm_BHPN) < 1e-6
        for got, exact in ((y_BLHP, want_y_BLHP), (after.k_BRHN, want.k_BRHN)):
            assert rel_rms(np.asarray(got, np.float64), exact) < 2**-8

    def test_a_planted_error_is_caught(self, one_of_pair):
        """One part in a thousand of any input."""
        inputs = draw(self.shapes[one_of_pair])
        want = double(inputs, self.shapes[one_of_pair])
        cases.check_results(self.run(one_of_pair, inputs), want, 1e-6)
        leaves, tree = jax.tree.flatten(inputs)
        for i, leaf in enumerate(leaves):
            wrong = jax.tree.unflatten(tree, [*leaves[:i], leaf * np.float32(1.001), *leaves[i + 1 :]])
            with pytest.raises(AssertionError, match="is not below"):
                cases.check_results(self.run(one_of_pair, wrong), want, 1e-6)


@functools.cache
def compiled(family: type[Decoding], name: str):
    """One program of a shape for all tests."""
    return jax.jit(family().step(family.shapes[name], **family().how_of(name)))


def start_rows(shape: Case) -> np.ndarray:
    """Every other row a start."""
    return np.arange(shape.batch)[:, None] % 2 == 0


def drawn(shape: Case, *, start: bool):
    """Arguments of a step; the past of rows that start is not a number."""
    tokens, heads, state = draw(shape)
    if not start:
        return tokens, heads, state
    start_BL = start_rows(shape)
    poison = lambda array: np.where(start_BL.reshape(-1, *[1] * (array.ndim - 1)), np.float32(np.nan), array)  # noqa: E731
    return tokens._replace(start_BL=start_BL), heads, jax.tree.map(poison, state)


def double(inputs, shape: Case):
    """`recurrent` in float64, on the very same numbers."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, x.dtype if x.dtype == bool else np.float64), inputs)
        return jax.tree.map(np.asarray, exactly(shape.rotation)(*exact))


@functools.cache
def exactly(rotation: str):
    return jax.jit(functools.partial(recurrent, rotation=rotation))


def check_forgets(run, shape: Case):
    """Nothing of the state reaches the results of rows that start: the same bits after zeros and after NaN."""
    tokens, heads, state = draw(shape)
    tokens = tokens._replace(start_BL=np.ones((shape.batch, 1), bool))
    poisoned = jax.tree.map(lambda array: np.full_like(array, np.nan), state)
    want = run((tokens, heads, jax.tree.map(np.zeros_like, state)))
    jax.tree.map(np.testing.assert_array_equal, run((tokens, heads, poisoned)), want)

"""Random inputs of the op of any shape, and the compiled calls and comparisons that the property tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.ops.ssm import IMPLEMENTATIONS, Heads, State, Tokens, ssm
from pallas_kernels.ssm.cases import Case
from tests.helpers import rel_rms

NAMES = sorted(IMPLEMENTATIONS)
# Without mosaic_gpu, which is bfloat16 alone: what is float32 in these tests is bfloat16 in test_bfloat16.
FLOAT32 = sorted({*NAMES} - {"mosaic_gpu"})


CHUNK = 8  # tokens, where a test does not say


def whole(shape: Case) -> Case:
    """With all that `LEFT_OUT` may lack but what changes the result."""
    return shape._replace(bias=True, biased="kq", looks_back=True, turns=True)


def draw(shape: Case, seed: int = 0, dtype=np.float32) -> tuple[Tokens, Heads, State]:
    """Random inputs without `start`; decays, steps and turns large enough that everything matters to the result."""
    random, all_of_it = np.random.default_rng(seed), whole(shape)

    def normal(name):
        sizes = all_of_it.shape_of(name)
        return None if sizes is None else random.standard_normal(sizes).astype(dtype)

    def uniform(low, high, name):
        return random.uniform(low, high, all_of_it.shape_of(name)).astype(dtype)

    def left_out(arrays):
        """The same numbers, whatever is left out."""
        return arrays._replace(**{name: None for name in arrays._fields if shape.shape_of(name) is None})

    dt_BLH = uniform(0.1, 1, "dt_BLH")
    tokens = Tokens(
        q_BLRGN=normal("q_BLRGN"),
        k_BLRGN=normal("k_BLRGN"),
        v_BLHP=normal("v_BLHP"),
        dt_BLH=dt_BLH,
        log_a_BLH=-dt_BLH * uniform(0.05, 1, "log_a_BLH"),
        gamma_BLH=(gamma_BLH := dt_BLH * uniform(0, 1, "gamma_BLH")),
        beta_BLH=dt_BLH - gamma_BLH,
        angle_BLHS=uniform(-np.pi, np.pi, "angle_BLHS"),
        gate_BLHP=normal("gate_BLHP"),
    )
    heads = Heads(**{name: normal(name) for name in Heads._fields})
    state = State(uniform(0, 2 * np.pi, "angle_BHS"), normal("ssm_BHPN"), normal("k_BRHN"), normal("v_BHP"))
    return left_out(tokens), left_out(heads), left_out(state)


def cotangents(shape: Case, seed: int = 1, dtype=np.float32) -> tuple[np.ndarray, State]:
    """What multiplies y and the outgoing state in the loss whose gradients are compared."""
    tokens, _, state = draw(shape, seed, dtype)
    return tokens.v_BLHP, state


def compiled(call, **how):
    """`call` as one program that gives NumPy's arrays: each slice of one of jax's would be a program of its own."""
    run = jax.jit(call, **how)
    return lambda *inputs: jax.tree.map(np.asarray, run(*inputs))


@functools.cache
def forward(implementation: str, rotation: str, chunk: int | None = CHUNK):
    """(tokens, heads, state) -> y, state, compiled."""
    return compiled(functools.partial(ssm, rotation=rotation, implementation=implementation, chunk=chunk))


def with_gradients(op):
    """((tokens, heads, state), start, (y's, state's cotangents)) -> (y, state), gradients like the inputs; compiled."""

    def call(inputs, start_BL, cotangent):
        results, pull = jax.vjp(lambda tokens, *others: op(tokens._replace(start_BL=start_BL), *others), *inputs)
        return results, pull(jax.tree.map(lambda x, like: x.astype(like.dtype), cotangent, results))

    return compiled(call)


@functools.cache
def pulled(implementation: str, rotation: str, chunk: int | None = CHUNK):
    """`with_gradients` of an implementation: one program for all tests."""
    return with_gradients(functools.partial(ssm, rotation=rotation, implementation=implementation, chunk=chunk))


def reference(inputs, start_BL, cotangent, rotation: str):
    """`recurrent` in float64, on the very same numbers; one program for rows with and without starts."""
    if start_BL is None:
        start_BL = np.zeros(inputs[0].log_a_BLH.shape[:2], bool)
    with jax.enable_x64(True):
        inputs, cotangent = jax.tree.map(lambda array: np.asarray(array, np.float64), (inputs, cotangent))
        return pulled("recurrent", rotation)(inputs, start_BL, cotangent)


def named(tree) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def rms(array) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))


def check_results(got, want, tolerance: float):
    """y and the state; the angle as a point of the circle."""

    def circle(results):
        y, state = results
        if state.angle_BHS is None:
            return results
        angle_BHS = np.asarray(state.angle_BHS, np.float64)
        return y, state._replace(angle_BHS=np.stack([np.cos(angle_BHS), np.sin(angle_BHS)]))

    want = named(circle(want))
    for name, value in named(circle(got)).items():
        error = rel_rms(np.asarray(value, np.float64), want[name])
        assert error < tolerance, f"{name}: {error:.2e} is not below {tolerance}"


def gradient_errors(got, want) -> dict[str, float]:
    """Every gradient's error. One that cancels out has no relative error: it is measured by the largest, times 1e-4."""
    want = named(want)
    largest = max(rms(value) for value in want.values())
    return {
        name: rms(np.asarray(value, np.float64) - want[name]) / max(rms(want[name]), 1e-4 * largest)
        for name, value in named(got).items()
    }


def check_gradients(got, want, tolerance: float):
    for name, error in gradient_errors(got, want).items():
        assert error < tolerance, f"gradient of {name}: {error:.2e} is not below {tolerance}"


def rows(tree, begin: int, end: int):
    """Tokens begin to end of every array (B, L, ...)."""
    return jax.tree.map(lambda array: array[:, begin:end], tree)


def bfloat16(tokens: Tokens) -> Tokens:
    """Tokens with q, k, v and gate rounded to bfloat16."""
    narrow = {name: getattr(tokens, name) for name in ("q_BLRGN", "k_BLRGN", "v_BLHP", "gate_BLHP")}
    return tokens._replace(**jax.tree.map(lambda array: array.astype(jnp.bfloat16), narrow))

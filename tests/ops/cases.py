"""Random inputs of the op of any shape, and the compiled calls and comparisons that the property tests share."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.ops.ssm import IMPLEMENTATIONS, Heads, State, Tokens, ssm
from tests.helpers import rel_rms

NAMES = sorted(IMPLEMENTATIONS)
# Without mosaic_gpu, which is bfloat16 alone: what is float32 in these tests is bfloat16 in test_bfloat16.
FLOAT32 = sorted({*NAMES} - {"mosaic_gpu"})


CHUNK = 8  # tokens, where a test does not say


class Shape(NamedTuple):
    batch: int = 2
    length: int = 13
    heads: int = 4
    groups: int = 2
    rank: int = 1
    d_state: int = 8
    width: int = 4
    planes: int = 2
    rotation: str = "adjacent"
    shared_angle: bool = True
    skip: bool = True
    gate: bool = True
    norm: bool = False
    ranked: bool = False  # v_rank and out_rank; always where rank > 1
    gate_ranked: bool = False
    bias: bool = True
    looks_back: bool = True  # beta, and the state's k and v
    turns: bool = True  # angle, dt, and the state's angle


SISO = Shape()
MIMO = Shape(
    rank=4, groups=1, rotation="half", shared_angle=False, norm=True, ranked=True, gate_ranked=True, planes=4, heads=2
)
# What is None: with all of it, Mamba-2's SSD.
SSD = SISO._replace(gate=False, skip=False, bias=False, looks_back=False, turns=False)
LEFT_OUT = {
    "ssd": SSD,
    "ssd_in_ranks": SSD._replace(rank=2, ranked=True),
    "no_rotation": SISO._replace(turns=False),
    "first_order": MIMO._replace(rank=2, looks_back=False),
    "no_bias": SISO._replace(bias=False, rotation="half", shared_angle=False),
}


def whole(shape: Shape) -> Shape:
    """With all that `LEFT_OUT` may lack but what changes the result."""
    return shape._replace(bias=True, looks_back=True, turns=True)


def draw(shape: Shape, seed: int = 0, dtype=np.float32) -> tuple[Tokens, Heads, State]:
    """Random inputs without `start`; decays, steps and turns large enough that everything matters to the result."""
    random = np.random.default_rng(seed)
    b, length, h, g, r, n, p, s = shape[:8]
    ranked = shape.ranked or r > 1

    def normal(*sizes, present=True):
        return random.standard_normal(sizes).astype(dtype) if present else None

    def uniform(low, high, *sizes):
        return random.uniform(low, high, sizes).astype(dtype)

    dt_BLH = uniform(0.1, 1, b, length, h)
    there = {
        ("dt_BLH", "angle_BLHS", "angle_BHS"): shape.turns,
        ("beta_BLH", "k_BRHN", "v_BHP"): shape.looks_back,
        ("q_bias_HRN", "k_bias_HRN"): shape.bias,
    }

    def left_out(arrays):
        """The same numbers, whatever is left out."""
        gone = {name for names, present in there.items() if not present for name in names} & {*arrays._fields}
        return arrays._replace(**dict.fromkeys(gone))

    tokens = Tokens(
        q_BLRGN=normal(b, length, r, g, n),
        k_BLRGN=normal(b, length, r, g, n),
        v_BLHP=normal(b, length, h, p),
        dt_BLH=dt_BLH,
        log_a_BLH=-dt_BLH * uniform(0.05, 1, b, length, h),
        gamma_BLH=(gamma_BLH := dt_BLH * uniform(0, 1, b, length, h)),
        beta_BLH=dt_BLH - gamma_BLH,
        angle_BLHS=uniform(-np.pi, np.pi, b, length, 1 if shape.shared_angle else h, s),
        gate_BLHP=normal(b, length, h, p, present=shape.gate),
    )
    heads = Heads(
        q_bias_HRN=normal(h, r, n),
        k_bias_HRN=normal(h, r, n),
        skip_H=normal(h, present=shape.skip),
        v_rank_HRP=normal(h, r, p, present=ranked),
        gate_rank_HRP=normal(h, r, p, present=shape.gate_ranked and shape.gate),
        out_rank_HRP=normal(h, r, p, present=ranked),
        norm_HP=normal(h, p, present=shape.norm),
    )
    state = State(uniform(0, 2 * np.pi, b, h, s), normal(b, h, p, n), normal(b, r, h, n), normal(b, h, p))
    return left_out(tokens), left_out(heads), left_out(state)


def cotangents(shape: Shape, seed: int = 1, dtype=np.float32) -> tuple[np.ndarray, State]:
    """What multiplies y and the outgoing state in the loss whose gradients are compared."""
    tokens, _, state = draw(shape, seed, dtype)
    return tokens.v_BLHP, state


@functools.cache
def forward(implementation: str, rotation: str, chunk: int | None = CHUNK):
    """(tokens, heads, state) -> y, state, compiled."""
    return jax.jit(functools.partial(ssm, rotation=rotation, implementation=implementation, chunk=chunk))


def with_gradients(op):
    """((tokens, heads, state), start, (y's, state's cotangents)) -> (y, state), gradients like the inputs; compiled."""

    def call(inputs, start_BL, cotangent):
        results, pull = jax.vjp(lambda tokens, *others: op(tokens._replace(start_BL=start_BL), *others), *inputs)
        return results, pull(jax.tree.map(lambda x, like: x.astype(like.dtype), cotangent, results))

    return jax.jit(call)


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
        results, gradients = pulled("recurrent", rotation)(inputs, start_BL, cotangent)
        return jax.tree.map(np.asarray, (results, gradients))


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
    return tokens._replace(**jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), narrow))

"""Every recorded official op case (tests/golden), for every implementation: outputs, final states, all gradients.

Tolerances, as RMS of the difference over RMS of the reference: forward 1e-5 and gradients 2e-4 in float32 (a few
hundred terms at eps 6e-8, and the gradient of an angle sums over every later token); `siso_stress_long` 2e-4 forward,
for its steep decays and hundreds of turns. In float64 what is left is the float32 rounding of the recorded numbers
(6e-8 each).
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.discretize import exponential_trapezoidal
from mamba3_jax.ops.kernels import BACKENDS
from mamba3_jax.ops.ssm import Heads, State, Tokens, ssm
from tests.helpers import AS_USERS, GOLDEN, golden, rel_rms
from tests.ops import cases
from tests.ops.cases import FLOAT32

CASES = [case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"] if case["kind"].startswith("op_")]
WHOLE = [case["name"] for case in CASES if not case["kind"].endswith("_step")]
STEPS = [case["name"] for case in CASES if case["kind"].endswith("_step")]
ROTATIONS = {"interleaved": "adjacent", "half": "half"}
STATE = ("angle", "ssm", "k", "v")

FORWARD, GRADIENT, STRESS, EXACT = 1e-5, 2e-4, 2e-4, 3e-7


def op_inputs(leaves: dict) -> tuple[Tokens, Heads, State | None]:
    """What the op takes, from the recorded leaves: trap is a logit there, theta is before tanh, time is last."""
    mimo = leaves["C"].ndim == 5
    with_rank = (lambda array, axis: array) if mimo else jnp.expand_dims

    def head_last(array_BHL):
        return jnp.swapaxes(array_BHL, 1, 2)

    dt_BLH = head_last(leaves["dt"])
    _, gamma_BLH, beta_BLH = exponential_trapezoidal(dt_BLH, 0.0, head_last(leaves["trap"]))
    tokens = Tokens(
        q_BLRGN=with_rank(leaves["C"], 2),
        k_BLRGN=with_rank(leaves["B"], 2),
        v_BLHP=leaves["x"],
        dt_BLH=dt_BLH,
        log_a_BLH=head_last(leaves["adt"]),
        gamma_BLH=gamma_BLH,
        beta_BLH=beta_BLH,
        angle_BLHS=jnp.pi * jnp.tanh(leaves["theta"]),
        gate_BLHP=leaves.get("z"),
    )
    heads = Heads(
        q_bias_HRN=with_rank(leaves["C_bias"], 1),
        k_bias_HRN=with_rank(leaves["B_bias"], 1),
        skip_H=leaves.get("D"),
        v_rank_HRP=leaves.get("mimo_x"),
        gate_rank_HRP=leaves.get("mimo_z"),
        out_rank_HRP=leaves.get("mimo_o"),
        norm_HP=leaves.get("norm_w"),
    )
    if "init_angle" not in leaves:
        return tokens, heads, None
    angle, ssm_state, k, v = (leaves[f"init_{part}"] for part in STATE)
    return tokens, heads, State(angle, ssm_state, with_rank(k, 1), v)


def recorded(name: str, dtype=np.float32):
    """The case, its differentiable leaves (in.* and init.*), and everything else that was recorded."""
    case, arrays = golden(name)
    leaves = {
        key.replace("in.", "").replace("init.", "init_"): array.astype(dtype)
        for key, array in arrays.items()
        if key.startswith(("in.", "init.")) and key != "in.cu_seqlens"
    }
    return case, leaves, arrays


def outputs(y_BLHP, state: State, mimo: bool) -> dict:
    """The op's results in the recorded layout: the SISO op keeps no rank axis in k."""
    k = state.k_BRHN if mimo else state.k_BRHN[:, 0]
    return {"y": y_BLHP, "angle": state.angle_BHS, "ssm": state.ssm_BHPN, "k": k, "v": state.v_BHP}


def starts(ends) -> np.ndarray:
    """start_BL of a row of documents that end at `ends`."""
    return np.isin(np.arange(ends[-1]), [0, *ends])[None]


def run(leaves: dict, case: dict, implementation: str) -> dict:
    """One case: whole, before the sum over ranks, as documents packed in a row, or (with initial states) one by one."""
    tokens, heads, state = op_inputs(leaves)
    call = functools.partial(
        ssm,
        rotation=ROTATIONS[case["rotation"]],
        implementation=implementation,
        chunk=case.get("suggested_chunk"),
    )
    mimo = "mimo" in case["kind"]
    if not case.get("reduce", True):  # recorded before the sum over ranks, which one-hot out_rank picks apart
        ranks, shape = heads.v_rank_HRP.shape[1], heads.v_rank_HRP.shape
        one_hot = jnp.stack([jnp.zeros(shape, tokens.dt_BLH.dtype).at[:, rank].set(1) for rank in range(ranks)])
        y, after = jax.lax.map(lambda pick: call(tokens, heads._replace(out_rank_HRP=pick), state), one_hot)
        return outputs(jnp.moveaxis(y, 0, 2), jax.tree.map(lambda array: array[0], after), mimo)
    if case.get("lens") is None:
        return outputs(*call(tokens, heads, state), mimo)

    ends = np.cumsum(case["lens"])
    if state is None:
        return outputs(*call(tokens._replace(start_BL=starts(ends)), heads), mimo)
    documents = []
    for row, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        piece = jax.tree.map(lambda array: array[:, begin:end], tokens)  # noqa: B023
        before = jax.tree.map(lambda array: array[row : row + 1], state)  # noqa: B023
        documents.append(outputs(*call(piece, heads, before), mimo))
    return {
        key: jnp.concatenate([document[key] for document in documents], axis=1 if key == "y" else 0)
        for key in documents[0]
    }


def check_outputs(got: dict, arrays: dict, tolerance: float, prefix: str = "final."):
    for key, value in got.items():
        wanted = arrays["out.y" if key == "y" else prefix + key]
        wanted = wanted[-len(value) :]  # of a packed row only the last document's state comes out
        if key == "angle":  # modulo a turn, in radians: an angle near 0 has no relative error
            assert np.all((value >= 0) & (value <= 2 * np.pi)), "the angle state is not within one turn"
            turns = (np.asarray(value, np.float64) - wanted) / (2 * np.pi)
            error = 2 * np.pi * np.abs(turns - np.round(turns)).max()
        else:
            error = rel_rms(value, wanted)
        assert error < tolerance, f"{key}: {error:.2e} is not below {tolerance}"


@functools.cache
def compiled(name, implementation, as_users=False):
    """leaves -> outputs and gradients (empty where none were recorded) of one case."""
    case, _, arrays = recorded(name)
    cotangents = {key: arrays[f"cot.{key}"] for key in ("y", *STATE) if f"cot.{key}" in arrays}

    def loss_and_outputs(leaves):
        got = run(leaves, case, implementation)
        return sum(jnp.sum(cotangents[key] * got[key]) for key in cotangents), got

    def outputs_and_gradients(leaves):
        if not cotangents:
            return loss_and_outputs(leaves)[1], {}
        (_, got), gradient = jax.value_and_grad(loss_and_outputs, has_aux=True)(leaves)
        return got, gradient

    return cases.compiled(outputs_and_gradients, compiler_options=AS_USERS if as_users else None)


def check_gradients(gradient: dict, arrays: dict, tolerance: float):
    assert {f"grad.{key}" for key in gradient} == {key for key in arrays if key.startswith("grad.")}
    size = {key: np.sqrt(np.mean(np.square(arrays[f"grad.{key}"], dtype=np.float64))) for key in gradient}
    for key, value in gradient.items():
        error = rel_rms(value, arrays[f"grad.{key}"])
        if size[key] < 1e-9 * max(size.values()):  # q and k turn together: one token's angle and decay do nothing
            error = np.abs(value).max() / max(size.values())
        assert error < tolerance, f"gradient of {key}: {error:.2e} is not below {tolerance}"


@pytest.mark.parametrize("implementation", FLOAT32)
@pytest.mark.parametrize("name", WHOLE)
def test_recorded_case(name, implementation):
    _, leaves, arrays = recorded(name)
    got, gradient = compiled(name, implementation)(leaves)
    check_outputs(got, arrays, STRESS if "stress" in name else FORWARD)
    if gradient:
        check_gradients(gradient, arrays, GRADIENT)


@pytest.mark.parametrize("name", WHOLE)
def test_recurrent_in_float64(name):
    with jax.enable_x64(True):
        _, leaves, arrays = recorded(name, np.float64)
        got, gradient = compiled(name, "recurrent")(leaves)
        assert got["y"].dtype == got["ssm"].dtype == np.float64
        check_outputs(got, arrays, EXACT)
        if gradient:
            check_gradients(gradient, arrays, EXACT)


@pytest.mark.parametrize("implementation", FLOAT32)
def test_recorded_case_with_optimised_code(implementation):
    """As `test_recorded_case`, compiled as users do."""
    _, leaves, arrays = recorded("mimo_r4_norm")
    got, gradient = compiled("mimo_r4_norm", implementation, as_users=True)(leaves)
    check_outputs(got, arrays, FORWARD)
    check_gradients(gradient, arrays, GRADIENT)


# On a CPU all cases would take minutes: one of each kind, the rest on demand.
QUICK = ("siso_init_fullrope", "mimo_r4_varlen3")
NAMED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WHOLE]


@pytest.mark.parametrize("implementation", sorted(BACKENDS))
@pytest.mark.parametrize("name", NAMED)
def test_recorded_case_in_bfloat16(name, implementation):
    """q, k, v and gate rounded: outputs and gradients of the definition in float64 on the same numbers."""
    _, leaves, _ = recorded(name)
    narrow = {
        key: leaves[key].astype(jnp.bfloat16) for key in ("B", "C", "x", "z", "init_k", "init_v") if key in leaves
    }
    leaves |= narrow
    got, gradient = compiled(name, implementation)(leaves)
    with jax.enable_x64(True):
        exact = {key: np.asarray(array, np.float64) for key, array in leaves.items()}
        want, want_gradient = compiled(name, "recurrent")(exact)
    for values, wanted, tolerance in ((got, want, 5e-3), (gradient, want_gradient, 1e-2)):
        largest = max((np.sqrt(np.mean(np.square(array))) for array in wanted.values()), default=0)
        for key, value in values.items():
            value, right = np.asarray(value, np.float64), wanted[key]
            if values is got and key == "angle":
                value, right = np.exp(1j * value), np.exp(1j * right)
            # Over the row, of either sign: what is left of the sum has the errors of all of it.
            adds_up = values is gradient and key in ("dt", "adt", "theta", "init_angle", "D")
            size = max(np.sqrt(np.mean(np.square(np.abs(right)))), 1e-4 * largest)
            error = np.sqrt(np.mean(np.square(np.abs(value - right)))) / size
            assert error < tolerance * (1 + adds_up), f"{key}: {error:.2e} is not below {tolerance * (1 + adds_up)}"


@pytest.mark.parametrize("implementation", FLOAT32)
def test_state_at_the_end_of_every_recorded_document(implementation):
    case, leaves, arrays = recorded("mimo_r4_varlen3")
    tokens, heads, _ = cases.compiled(op_inputs)(leaves)
    ends = np.cumsum(case["lens"])
    tokens = tokens._replace(start_BL=starts(ends))
    call = cases.forward(implementation, "half")
    for row, end in enumerate(ends[:-1]):
        y, state = call(jax.tree.map(lambda array: array[:, :end], tokens), heads)  # noqa: B023
        at_end = {f"final.{key}": arrays[f"final.{key}"][row : row + 1] for key in STATE}
        check_outputs(outputs(y, state, mimo=True), {**at_end, "out.y": arrays["out.y"][:, :end]}, FORWARD)


@pytest.mark.parametrize("implementation", FLOAT32)
@pytest.mark.parametrize("name", STEPS)
def test_recorded_decoding(name, implementation):
    """Prefill, then token by token: outputs, and the state after the prefill, the first step and the last."""
    case, leaves, arrays = recorded(name)
    tokens, heads, _ = cases.compiled(op_inputs)(leaves)
    prefill, mimo = case["prefill_len"], "mimo" in case["kind"]
    step = cases.forward(implementation, ROTATIONS[case["rotation"]])

    y, state = step(jax.tree.map(lambda array: array[:, :prefill], tokens), heads)
    check_outputs(outputs(y, state, mimo), {**arrays, "out.y": arrays["out.prefill_y"]}, FORWARD, "prefill.")
    decoded = []
    for position in range(prefill, prefill + case["steps"]):
        token = jax.tree.map(lambda array: array[:, position : position + 1], tokens)  # noqa: B023
        y, state = step(token, heads, state)
        decoded.append(y)
        if position == prefill:
            check_outputs(outputs(y, state, mimo), {**arrays, "out.y": arrays["out.step_y"][:, :1]}, FORWARD, "step0.")
    y = np.concatenate(decoded, axis=1)
    check_outputs(outputs(y, state, mimo), {**arrays, "out.y": arrays["out.step_y"]}, FORWARD)


@pytest.mark.parametrize("leaf", ["C", "B", "x", "adt", "dt", "B_bias", "mimo_x", "mimo_o", "norm_w", "D"])
def test_planted_error_is_caught(leaf):
    """One input of the op off by one part in a thousand fails the check of the outputs."""
    _, leaves, arrays = recorded("mimo_r4_norm")
    got, _ = compiled("mimo_r4_norm", "recurrent")({**leaves, leaf: leaves[leaf] * np.float32(1.001)})
    with pytest.raises(AssertionError, match="is not below"):
        check_outputs(got, arrays, FORWARD)


@pytest.mark.parametrize("leaf", ["x", "dt", "mimo_z", "B_bias"])
def test_planted_gradient_error_is_caught(leaf):
    _, leaves, arrays = recorded("mimo_r4_norm")
    _, gradient = compiled("mimo_r4_norm", "recurrent")(leaves)
    with pytest.raises(AssertionError, match=f"gradient of {leaf}"):
        check_gradients({**gradient, leaf: gradient[leaf] * 1.001}, arrays, GRADIENT)

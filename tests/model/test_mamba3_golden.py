"""The Mamba-3 layer is the official one: recorded outputs, states, decode steps and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.mixers.mamba3 import Mamba3
from tests.helpers import golden, rel_rms
from tests.model.official import layer_config, layer_params

FORWARD, GRADIENT = 1e-5, 2e-4  # float32 against float64: manifest.json, "tolerance"
CASES = [
    "layer_siso",
    "layer_siso_norm",
    "layer_siso_varlen",
    "layer_siso_smallinput",
    "layer_siso_afloor",
    "layer_mimo_r2",
    "layer_mimo_r4_norm",
    "layer_mimo_g2",
]


class Recorded:
    """One case and its layer in our names."""

    def __init__(self, name, implementation):
        self.case, self.arrays = golden(name)
        self.config = layer_config(self.case, implementation=implementation, chunk=8)
        self.params = layer_params(self.config, self.arrays, "param.")
        self.length = self.case["prefill_len"]
        self.x_BLD = jnp.asarray(self.arrays["in.u"])
        self.prompt_BLD = self.x_BLD[:, : self.length]
        self.start_BL = None
        if self.case["lens"]:
            self.start_BL = jnp.zeros(self.x_BLD.shape[:2], bool).at[:, self.arrays["in.cu_seqlens"][:-1]].set(True)

    def layer(self, params, x_BLD, state=None, start_BL=None):
        return Mamba3(self.config).apply({"params": params}, x_BLD, state, start_BL)

    def loss(self, params, x_BLD):
        """The recorded cotangent times the output; and the output and the state."""
        y_BLD, state = self.layer(params, x_BLD, None, self.start_BL)
        return jnp.vdot(self.arrays.get("cot.y", jnp.zeros_like(y_BLD)), y_BLD), (y_BLD, state)

    def check_output(self, y_BLD, state):
        assert rel_rms(y_BLD, self.arrays["out.y"]) < FORWARD
        self.check_state(state, "prefill.")

    def check_state(self, state, prefix):
        """Of a packed row the state is that of its last document: the last of the recorded ones."""
        rows = state.angle_BHS.shape[0]
        wanted = {name: self.arrays[prefix + name][-rows:] for name in ("angle", "ssm", "k", "v")}
        assert rel_rms(turned(state.angle_BHS), turned(wanted["angle"])) < FORWARD
        assert rel_rms(state.ssm_BHPN, wanted["ssm"]) < FORWARD
        assert rel_rms(state.k_BRHN, wanted["k"]) < FORWARD
        assert rel_rms(state.v_BHP, wanted["v"]) < FORWARD

    def check_gradients(self, params, x_BLD):
        wanted = layer_params(self.config, self.arrays, "grad.param.")
        assert params.keys() == wanted.keys()
        errors = {key: rel_rms(params[key], wanted[key]) for key in wanted}
        assert max(errors.values()) < GRADIENT, errors
        assert rel_rms(x_BLD, self.arrays["grad.u"]) < GRADIENT


def turned(angle):
    """An angle as a point of the circle: states are compared modulo 2 pi."""
    return np.stack([np.cos(angle), np.sin(angle)])


def check_all(recorded):
    """Outputs, state after the prompt, and every gradient, from one compiled function."""
    prompt = (recorded.params, recorded.prompt_BLD)
    if not recorded.case["grads"]:
        y_BLD, state = jax.jit(recorded.loss)(*prompt)[1]
    else:
        both = jax.jit(jax.value_and_grad(recorded.loss, argnums=(0, 1), has_aux=True))
        (_, (y_BLD, state)), gradients = both(*prompt)
        recorded.check_gradients(*gradients)
    recorded.check_output(y_BLD, state)
    return state


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_outputs_states_gradients_and_decode_steps_are_the_official_ones(name):
    recorded = Recorded(name, "")
    state = check_all(recorded)

    if recorded.case["steps"]:
        step = jax.jit(recorded.layer)
        steps = []
        for t in range(recorded.length, recorded.length + recorded.case["steps"]):
            y_B1D, state = step(recorded.params, recorded.x_BLD[:, t : t + 1], state)
            steps.append(y_B1D)
        assert rel_rms(jnp.concatenate(steps, axis=1), recorded.arrays["out.step_y"]) < FORWARD
        recorded.check_state(state, "final.")


@pytest.mark.parametrize("implementation", ["recurrent", "associative"])
@pytest.mark.parametrize("name", ["layer_siso_varlen", "layer_mimo_r2"])
def test_the_config_names_the_implementation(name, implementation):
    recorded = Recorded(name, implementation)
    y_BLD, state = jax.jit(recorded.loss)(recorded.params, recorded.prompt_BLD)[1]
    recorded.check_output(y_BLD, state)


@pytest.mark.slow  # four minutes; the op's goldens say the same of every push
@pytest.mark.parametrize("implementation", ["recurrent", "associative", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_every_implementation_gives_the_official_gradients(name, implementation):
    check_all(Recorded(name, implementation))


def test_one_part_in_a_thousand_of_any_parameter_is_caught():
    recorded = Recorded("layer_mimo_r2", "recurrent")  # no norm that would undo a factor on v_rank
    output = jax.jit(recorded.loss)
    for key, array in recorded.params.items():
        y_BLD, _ = output(recorded.params | {key: array * 1.001}, recorded.prompt_BLD)[1]
        assert rel_rms(y_BLD, recorded.arrays["out.y"]) > 3 * FORWARD, key

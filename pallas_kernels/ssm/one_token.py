"""What a kernel that does all of a decoding step takes and gives: the same on every backend.

Letters: B batch, R rank, G groups of q/k, H heads, N state per head, P head width, S planes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """None: absent, and costs nothing. The first four are the state, of the token before."""

    h_BHPN: jax.Array  # float32
    angle_BHS: jax.Array | None  # float32; None, with dt and turn: nothing turns
    before_k_BRHN: jax.Array | None  # biased and turned; these two None, with beta: the token before has no weight
    before_v_BHP: jax.Array | None
    q_BRGN: jax.Array
    k_BRGN: jax.Array
    v_BHP: jax.Array
    log_a_BH: jax.Array  # these five float32
    gamma_BH: jax.Array  # weight of the token's own input
    beta_BH: jax.Array | None  # and of the one before, before this step's decay
    dt_BH: jax.Array | None
    turn_BHS: jax.Array | None  # radians per unit dt; H may be 1: shared
    start_B: jax.Array | None  # int32; what is not 0 forgets everything before
    q_bias_HRN: jax.Array | None
    k_bias_HRN: jax.Array | None
    gate_BHP: jax.Array | None
    skip_H: jax.Array | None
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class Outputs(NamedTuple):
    """The state after the token, in the buffers of the one before where those are donated, and o."""

    h_BHPN: jax.Array
    angle_BHS: jax.Array | None
    k_BRHN: jax.Array | None  # like the token's k
    v_BHP: jax.Array | None
    o_BHP: jax.Array  # like v


def outputs_of(inputs: Inputs) -> Outputs:
    """Returns the shapes and dtypes of the outputs: those parts of the state that came in."""

    def like(array, dtype):
        return None if array is None else jax.ShapeDtypeStruct(array.shape, dtype)

    return Outputs(
        h_BHPN=like(inputs.h_BHPN, jnp.float32),
        angle_BHS=like(inputs.angle_BHS, jnp.float32),
        k_BRHN=like(inputs.before_k_BRHN, inputs.k_BRGN.dtype),
        v_BHP=like(inputs.before_v_BHP, inputs.v_BHP.dtype),
        o_BHP=like(inputs.v_BHP, inputs.v_BHP.dtype),
    )


def in_place(inputs: Inputs, out: Outputs) -> dict[int, int]:
    """Says which outputs take the buffer of which input: the parts of the state, which come first among both."""
    before = (inputs.h_BHPN, inputs.angle_BHS, inputs.before_k_BRHN, inputs.before_v_BHP)
    after = (out.h_BHPN, out.angle_BHS, out.k_BRHN, out.v_BHP)
    pairs = [pair for pair in zip(before, after, strict=True) if pair[0] is not None]
    return {i: i for i, (old, new) in enumerate(pairs) if old.dtype == new.dtype}

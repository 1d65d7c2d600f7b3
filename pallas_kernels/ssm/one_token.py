"""What a kernel that does all of a decoding step takes and gives: the same on every backend.

Letters: B batch, R rank, G groups of q/k, H heads, N state per head, P head width, S planes.
"""

from typing import NamedTuple

import jax


class Inputs(NamedTuple):
    """None: absent. The first four are the state, of the token before."""

    h_BHPN: jax.Array  # float32
    angle_BHS: jax.Array  # float32
    before_k_BRHN: jax.Array  # biased and turned
    before_v_BHP: jax.Array
    q_BRGN: jax.Array
    k_BRGN: jax.Array
    v_BHP: jax.Array
    dt_BH: jax.Array  # these four float32
    log_a_BH: jax.Array
    trap_BH: jax.Array
    turn_BHS: jax.Array  # radians per unit dt; H may be 1: shared
    start_B: jax.Array | None  # int32; what is not 0 forgets everything before
    q_bias_HRN: jax.Array
    k_bias_HRN: jax.Array
    gate_BHP: jax.Array | None
    skip_H: jax.Array | None
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class Outputs(NamedTuple):
    """The state after the token, in the buffers of the one before where those are donated, and o."""

    h_BHPN: jax.Array
    angle_BHS: jax.Array
    k_BRHN: jax.Array  # like the token's k
    v_BHP: jax.Array
    o_BHP: jax.Array  # like v

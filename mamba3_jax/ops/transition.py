"""What a run of tokens does to any state before it, and how that of one run and that of the next make one.

A run sees the state before it only through its first token's beta, its decay, and the angle at which it begins: with
(h', k', v', phi') what it leaves from the empty state, and (h, k, v, phi) the state before it,

    h <- rotate(h', phi) + exp(log_a) (h + first X k^T),    k <- rotate(k', phi),    v <- v',    phi <- phi + phi'

where no document starts inside; else what was before is gone, and the run leaves what it leaves from nothing.
"""

import jax.numpy as jnp

from mamba3_jax.ops.recurrent import within_a_turn
from mamba3_jax.ops.rotary import ROTATIONS, rotate
from mamba3_jax.ops.state import incoming
from mamba3_jax.ops.types import Heads, State, Tokens, Transition


def of_run(tokens: Tokens, state: State) -> Transition:
    """Return the transition of a run that leaves `state` from the empty state."""
    first_BH = None if tokens.beta_BLH is None else tokens.beta_BLH[:, 0]
    carried_B = jnp.ones(tokens.log_a_BLH.shape[0], bool)
    if tokens.start_BL is not None:
        carried_B = ~jnp.any(tokens.start_BL, axis=1)
        if first_BH is not None:
            first_BH = jnp.where(tokens.start_BL[:, :1], 0, first_BH)
    return Transition(jnp.sum(tokens.log_a_BLH, axis=1), carried_B, first_BH, state)


def compose(left: Transition | State, right: Transition, heads: Heads, *, rotation: str = "adjacent"):
    """Return what the run of `left` and then that of `right` do: their Transition; of a State, the State after.

    Associative and exact: composing the transitions of any cut of a row gives that of the row, and composing the state
    before a row with its transition gives the state after it. Differentiable in everything.

    Args:
        left: the earlier run, or the state before `right`.
        right: the later run.
        heads: as for the tokens of both (the ranks of v are read).
        rotation: as for both.

    Raises:
        ValueError: an unknown rotation, or two runs of which one has an angle, or a beta, and the other has not.
    """
    if rotation not in ROTATIONS:
        raise ValueError(f"{rotation=} is not one of {ROTATIONS}")
    before, added = left.state if isinstance(left, Transition) else left, right.state
    for part in ("angle_BHS", "k_BRHN"):
        left_has, right_has = (getattr(state, part) is not None for state in (before, added))
        if left_has != right_has:
            raise ValueError(f"state.{part.split('_')[0]}: {left_has=}, {right_has=}, wanted the same")
    carried_B = right.carried_B

    def carried(array_B):
        return jnp.where(carried_B.reshape(-1, *[1] * (array_B.ndim - 1)), array_B, 0)

    def rotated(x_BHRN, angle_BHS):
        """Not at all where there is no angle; in the angle's dtype."""
        if angle_BHS is None:
            return x_BHRN
        return rotate(x_BHRN.astype(angle_BHS.dtype), angle_BHS[:, :, None], rotation).astype(x_BHRN.dtype)

    angle_BHS = turns_BHS = None
    if before.angle_BHS is not None:
        turns_BHS = carried(before.angle_BHS)
        angle_BHS = within_a_turn(turns_BHS + added.angle_BHS)
    decayed_BHPN = jnp.exp(right.log_a_BH)[..., None, None] * incoming(before, right.first_BH, heads)
    h_BHPN = rotated(added.ssm_BHPN, turns_BHS) + carried(decayed_BHPN)
    k_BRHN = None
    if added.k_BRHN is not None:
        k_BRHN = jnp.swapaxes(rotated(jnp.swapaxes(added.k_BRHN, 1, 2), turns_BHS), 1, 2)
    state = State(angle_BHS, h_BHPN, k_BRHN, added.v_BHP)
    if not isinstance(left, Transition):
        return state
    return Transition(left.log_a_BH + right.log_a_BH, left.carried_B & carried_B, left.first_BH, state)

"""The transition of a run of tokens: what the run does to any state before it. Those of two runs compose to one.

The state before a run enters only by the first token's beta, by the run's decay and by the angle at which it begins.
Let (h', k', v', phi') be the state that the run leaves when it begins with the empty state. It takes (h, k, v, phi) to

    h <- rotate(h', phi) + exp(log_a) (h + first X k^T),    k <- rotate(k', phi),    v <- v',    phi <- phi + phi'

where log_a is the sum over the run, first is the first token's beta, and X is v in ranks. If a document starts in the
run, the state before it is dropped, and the run leaves (h', k', v', phi').
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
    """Return the `Transition` of the run of `left` and then that of `right`; or, if `left` is a State, the State after.

    This is associative and exact: the transitions of the pieces of a row, however it is cut, compose to that of the
    row; the state before a row and the row's transition compose to the state after it. It is differentiable in
    everything.

    Args:
        left: the earlier run, or the state before `right`.
        right: the later run.
        heads: those of the tokens of both; only v_rank is read.
        rotation: that of both.

    Raises:
        ValueError: an unknown rotation; only one of the two has an angle or a beta; or sizes of theirs, or of heads,
            that do not fit.
    """
    if rotation not in ROTATIONS:
        raise ValueError(f"{rotation=} is not one of {ROTATIONS}")
    check(left, right, heads)
    before, added = left.state if isinstance(left, Transition) else left, right.state
    carried_B = right.carried_B

    def carried(array_B):
        return jnp.where(carried_B.reshape(-1, *[1] * (array_B.ndim - 1)), array_B, 0)

    def rotated(x_BHRN, angle_BHS):
        """Rotate in the angle's dtype; return the argument if there is no angle."""
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


def check(left: Transition | State, right: Transition, heads: Heads) -> None:
    """Raise ValueError, naming the part, for what is not two runs of the same rows, and the heads of both."""
    for name, value, kinds in (
        ("left", left, (Transition, State)),
        ("right", right, (Transition,)),
        ("heads", heads, (Heads,)),
    ):
        if not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} is {type(value).__name__}, wanted a tuple {wanted} of ops.ssm")
    parts = {"left": _parts(left), "right": _parts(right)}
    for name in ("state.angle_BHS", "state.k_BRHN", "state.v_BHP"):
        left_has, right_has = (run[name] is not None for run in parts.values())
        if left_has != right_has:
            raise ValueError(f"{_bare(name)}: {left_has=}, {right_has=}, wanted the same")
    sizes = {
        axis: size
        for name in ("state.ssm_BHPN", "state.angle_BHS", "state.k_BRHN")
        if parts["right"][name] is not None
        for axis, size in zip(name.rpartition("_")[2], parts["right"][name].shape, strict=True)
    }
    for run, of_run in parts.items():
        if "first_BH" in of_run and (of_run["first_BH"] is None) != (of_run["state.k_BRHN"] is None):
            raise ValueError(f"{run}.first and {run}.state.k: one of them is None, wanted both or none")
        for name, array in of_run.items():
            wanted = array is not None and tuple(sizes[axis] for axis in name.rpartition("_")[2])
            if array is not None and jnp.shape(array) != wanted:
                raise ValueError(f"{run}.{_bare(name)} has shape {jnp.shape(array)}, wanted {wanted}")
    if "R" in sizes:
        weights, wanted = heads.v_rank_HRP, tuple(sizes[axis] for axis in "HRP")
        if weights is None and sizes["R"] > 1:
            raise ValueError(f"rank={sizes['R']} needs v_rank")
        if weights is not None and weights.shape != wanted:
            raise ValueError(f"v_rank has shape {weights.shape}, wanted {wanted}")


def _parts(run: Transition | State) -> dict:
    """Return all arrays by name, those of the state as `state.NAME`."""
    own = run._asdict() if isinstance(run, Transition) else {"state": run}
    return own | {f"state.{name}": array for name, array in own.pop("state")._asdict().items()}


def _bare(name: str) -> str:
    """Return a name without the letters of its axes."""
    return name.rpartition("_")[0]

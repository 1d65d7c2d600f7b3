"""The entry points of the state space op, `ssm` and `transition`: their checks and the table of implementations."""

import warnings

import jax.numpy as jnp

from mamba3_jax.ops import kernels, tuned
from mamba3_jax.ops.associative import associative
from mamba3_jax.ops.chunked import chunked
from mamba3_jax.ops.recurrent import recurrent
from mamba3_jax.ops.rotary import ROTATIONS
from mamba3_jax.ops.sharded import one_device
from mamba3_jax.ops.transition import compose, of_run
from mamba3_jax.ops.tuned import device
from mamba3_jax.ops.types import Heads, State, Tokens, Transition, accumulator, empty_state

__all__ = ["IMPLEMENTATIONS", "Heads", "State", "Tokens", "Transition", "compose", "empty_state", "ssm", "transition"]

# These run on every device, and without queries (`transition`).
PLAIN = {"recurrent": recurrent, "associative": associative, "chunked": chunked}
# All take the state None for `empty_state`. Most of them make it; the TPU's scan then has one operand less, and one
# gradient less.
IMPLEMENTATIONS = PLAIN | kernels.IMPLEMENTATIONS


def ssm(
    tokens: Tokens,
    heads: Heads,
    state: State | None = None,
    *,
    rotation: str = "adjacent",
    implementation: str | None = None,
    chunk: int | None = None,
    along: object = None,
):
    """Compute Mamba-3 between its two projections: bias, rotation, recurrence, skip, norm, gate (SPEC 4 to 7).

        h_t = a_t (h_{t-1} + beta_t X_{t-1} k_{t-1}^T) + gamma_t X_t k_t^T,   y_t = h_t q_t

    Arrays that are None (beta, angle, gate, start, any field of heads) are left out and cost nothing; with all of them
    None this is Mamba-2's SSD.

    Running a sequence in two pieces with the state carried gives what running it whole gives. So training, prefill,
    prefill in pieces and decoding are this one function. It is differentiable in everything, both states included.

    Args:
        tokens: one entry a token, see `Tokens`. `start` isolates documents exactly: no finite value and no gradient
            crosses it. A token that is not finite reaches later tokens of its document, and never another row. In
            `recurrent` it reaches nothing else. In `chunked` it may also reach all of its chunk, earlier tokens and
            other documents included, and the tokens after the chunk up to the next `start`; in `associative`, all
            tokens from the beginning of its chunk on. In kernels it may reach all of its row. Gradients may be NaN in
            all of its row.
        heads: learned, one entry a head, see `Heads`. With more than one rank, v_rank and out_rank are needed.
        state: what the tokens before left; None: nothing. It reaches the tokens before the first `start` of its row.
        rotation: "adjacent" (SISO weights) or "half" (MIMO weights).
        implementation: a name in `IMPLEMENTATIONS`, or None for the fastest one that supports these inputs here.
        chunk: tokens in a chunk. Performance only: results do not depend on it. None: the implementation chooses.
        along: inside `jax.shard_map`, how rows go on from device to device. `ops.context` passes it, to kernels for
            which `kernels.spans` holds.

    Returns:
        y_BLHP in v's dtype, and the `State` after the last token.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown rotation or implementation.
    """
    check(tokens, heads, state, rotation, chunk)
    if implementation is None:
        implementation = default_implementation(tokens)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is not one of {sorted(IMPLEMENTATIONS)}")
    more = {}
    if along is not None:
        if not kernels.spans(implementation, tokens):
            raise ValueError(f"{implementation=} does not run rows that go on over devices ({along=}), wanted None")
        more = {"along": along}
    return IMPLEMENTATIONS[implementation](tokens, heads, state, rotation=rotation, chunk=chunk, **more)


def transition(
    tokens: Tokens,
    heads: Heads,
    *,
    rotation: str = "adjacent",
    implementation: str | None = None,
    chunk: int | None = None,
) -> Transition:
    """Return what a run of tokens does to any state before it, by a pass over states alone in plain XLA.

    `compose` joins two runs, or a state and the run after it. So a row can be cut into pieces, over devices or in time,
    that are computed at once. No outputs are computed; queries and gate are not read.

    Args:
        tokens: as for `ssm`; q may be None.
        heads: as for `ssm`; only the bias of keys and v_rank are read.
        rotation: as for `ssm`.
        implementation: a name in `PLAIN`, or None for the fastest of them.
        chunk: as for `ssm`.

    Raises:
        ValueError: as `ssm` raises, or the name of a kernel.
    """
    check_arrays("tokens", tokens, Tokens)
    tokens = tokens._replace(q_BLRGN=None, gate_BLHP=None)
    check(tokens, heads, None, rotation, chunk, queries=False)
    if implementation is None:
        implementation = plain(tokens)
    if implementation not in PLAIN:
        raise ValueError(f"{implementation=} has no pass over states alone, it is not one of {sorted(PLAIN)}")
    _, state = IMPLEMENTATIONS[implementation](tokens, heads, None, rotation=rotation, chunk=chunk)
    return of_run(tokens, state)


def plain(tokens: Tokens) -> str:
    """Return the fastest implementation in plain XLA: a step for one token, and chunks for more."""
    return "recurrent" if tokens.log_a_BLH.shape[1] == 1 else "chunked"


def default_implementation(tokens: Tokens) -> str:
    """Return the implementation measured as fastest on this device (`tuned`), or else its kernels, or else plain XLA.

    XLA cannot divide a kernel over devices as it divides plain code: that takes `ops.sharded`. If the device has
    kernels and the choice is plain XLA, a warning says why.

    Raises:
        ValueError: the table of tuned configs names an unknown implementation.
    """
    kind = device().device_kind
    entry = tuned.choose(kind, tokens)
    if entry is not None and entry.implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{tuned.PATH} has {entry}, whose implementation is not one of {sorted(IMPLEMENTATIONS)}")
    wanted = [*([entry.implementation] if entry else []), *kernels.BACKENDS]
    why = {}
    for name in wanted:
        if name in PLAIN or (wish := kernels.refused(name, tokens)) is None:
            if name in PLAIN or one_device():
                return name
            wish = "wants each device's part alone, and no mesh in context says it (mamba3_jax.sharding.using)"
        why[name] = wish
    if left := {name: wish for name, wish in why.items() if kernels.available(name)}:
        reasons = "; ".join(f"{name} {wish}" for name, wish in left.items())
        warnings.warn(f"the op runs in plain XLA on {kind}, whose kernels are left out: {reasons}", stacklevel=2)
    return plain(tokens)


def check(
    tokens: Tokens, heads: Heads, state: State | None, rotation: str, chunk: int | None, queries: bool = True
) -> None:
    """Raise ValueError, naming the array, its shape and the wish, for inputs that do not fit the op or one another."""
    check_arrays("tokens", tokens, Tokens, ("q_BLRGN",) * queries + ("k_BLRGN", "v_BLHP", "log_a_BLH", "gamma_BLH"))
    check_arrays("heads", heads, Heads)
    if state is not None:
        check_arrays("state", state, State, ("ssm_BHPN",))
    first, array = ("q", tokens.q_BLRGN) if queries else ("k", tokens.k_BLRGN)
    if array.ndim != 5:
        raise ValueError(f"{first} has shape {array.shape}, wanted five axes (B, L, R, G, N)")
    batch, length, rank, groups, d_state = array.shape
    if tokens.v_BLHP.ndim != 4:
        raise ValueError(f"v has shape {tokens.v_BLHP.shape}, wanted four axes (B, L, H, P)")
    n_heads, width = tokens.v_BLHP.shape[2:]
    planes = angle_heads = 0
    if tokens.angle_BLHS is not None:
        if tokens.angle_BLHS.ndim != 4:
            raise ValueError(f"angle has shape {tokens.angle_BLHS.shape}, wanted four axes (B, L, 1 or H, S)")
        planes = tokens.angle_BLHS.shape[-1]
        angle_heads = 1 if tokens.angle_BLHS.shape[2] == 1 else n_heads
    if rotation not in ROTATIONS:
        raise ValueError(f"{rotation=} is not one of {ROTATIONS}")
    for name, sized in {first: array, "v": tokens.v_BLHP, "angle": tokens.angle_BLHS}.items():
        if sized is not None and 0 in sized.shape:
            raise ValueError(f"{name} has shape {sized.shape}: needs at least one of every axis, a row and a token too")
    if n_heads % groups:
        raise ValueError(f"{n_heads=} is not a multiple of {groups=}")
    if d_state % 2 or 2 * planes > d_state:
        raise ValueError(f"{planes=} planes do not fit in {d_state=} (even, at least twice the planes)")
    if chunk is not None and not (hasattr(chunk, "__index__") and chunk >= 1):
        raise ValueError(f"{chunk=} is not a positive number of tokens")
    if rank > 1 and (heads.v_rank_HRP is None or (queries and heads.out_rank_HRP is None)):
        raise ValueError(f"{rank=} needs v_rank{' and out_rank' * queries}")
    if tokens.angle_BLHS is not None and tokens.dt_BLH is None:
        raise ValueError("dt is None, but multiplies the angle, which is not")

    sizes = {"B": batch, "L": length, "R": rank, "G": groups, "H": n_heads, "N": d_state, "P": width, "S": planes}
    given = {_name(field): (field, array) for field, array in (tokens._asdict() | heads._asdict()).items()}
    if state is not None:
        check_parts(tokens, state)
        given |= {f"state.{_name(field)}": (field, array) for field, array in state._asdict().items()}
    for name, (field, array) in given.items():
        wanted = tuple(
            (sizes | {"H": angle_heads} if name == "angle" else sizes)[axis] for axis in field.rpartition("_")[2]
        )
        if array is not None and array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}, wanted {wanted}")

    check_dtypes({name: array for name, (_, array) in given.items() if array is not None}, accumulator(tokens))


def check_dtypes(given: dict, dtype) -> None:
    """Raise ValueError, by name, for arrays of another kind of numbers, or of less than the accumulator's precision."""
    for name, array in given.items():
        if name == "start":
            if array.dtype != jnp.bool_:
                raise ValueError(f"start is {array.dtype}, wanted bool")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}, wanted a floating point dtype")
    for name in ("dt", "log_a", "gamma", "beta", "angle", "state.angle", "state.ssm"):
        if name in given and given[name].dtype != dtype:
            raise ValueError(f"{name} is {given[name].dtype}, wanted {dtype}")


def check_arrays(name: str, values, kind: type, needed: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless `values` is a tuple of this kind, of arrays, or None where they are not needed."""
    if not isinstance(values, kind):
        raise ValueError(f"{name} is {type(values).__name__}, wanted ops.ssm.{kind.__name__}")
    for field, array in values._asdict().items():
        given = f"{'state.' * (kind is State)}{_name(field)}"
        if array is None and field in needed:
            raise ValueError(f"{given} is None, wanted an array")
        if array is not None and not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise ValueError(f"{given} is {type(array).__name__}, wanted an array{' or None' * (field not in needed)}")


def check_parts(tokens: Tokens, state: State) -> None:
    """Raise ValueError for a part of the state that the tokens do not need, or one that they need and that is None."""
    needed_by = {"angle_BHS": ("angle", tokens.angle_BLHS), "k_BRHN": ("beta", tokens.beta_BLH)}
    needed_by["v_BHP"] = needed_by["k_BRHN"]
    for part, (name, array) in needed_by.items():
        if (getattr(state, part) is None) != (array is None):
            given, wanted = ("None", "an array") if array is not None else ("an array", "None")
            raise ValueError(f"state.{_name(part)} is {given}, wanted {wanted}, as the tokens' {name}")


def _name(field: str) -> str:
    """Return the name of a field without the letters of its axes: "log_a" of `log_a_BLH`."""
    return field.rpartition("_")[0]

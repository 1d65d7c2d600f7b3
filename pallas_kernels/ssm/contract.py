"""What every backend takes and gives: the same arrays, in the op's own shapes and order of axes.

A backend is a package of this folder with four functions, a number and a flag:

    available() -> str | None                 what it wants of the device, and what it got; None: it can run
    unsupported(inputs) -> str | None         likewise of a `Row` or a `Token`; arrays may be `jax.ShapeDtypeStruct`
    scan(row, rotation, *, interpret, **config) -> Scanned
    step(token, rotation, *, interpret, **config) -> Stepped
    STEPS                                     rows of up to so many tokens are steps, one after another
    SPANS                                     whether `scan` takes `along`, see below

It owns its shapes: what it wants padded, transposed or in another order of N (`order.Order`), it pads, transposes and
orders for itself, forward and backward. `config` is performance only; what it does not say is the backend's choice.
`scan` and `step` raise ValueError for what is not supported. `scan` is differentiable, `step` need not be.

With `along` (`angle.Along`), inside `jax.shard_map`, rows go on over the devices of an axis of the mesh, each of which
has runs of equally many tokens. `row.before` is zero but of the first run; the last kappa of each includes what the
next run's first token adds; `after` is what all tokens so far leave. It costs what splits of a row cost, a pass over
states.

Letters: B batch, L tokens, R rank, G groups of q/k, H heads, N state per head, P head width, S rotary pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NORM_EPS = 1e-5


class Weights(NamedTuple):
    """Learned, one entry a head. None: absent, and costs nothing; so everywhere here."""

    q_bias_HRN: jax.Array | None = None
    k_bias_HRN: jax.Array | None = None
    skip_H: jax.Array | None = None
    v_rank_HRP: jax.Array | None = None
    gate_rank_HRP: jax.Array | None = None
    out_rank_HRP: jax.Array | None = None
    norm_HP: jax.Array | None = None
    # Of a `Token`, both or neither: its queries and keys come before their RMSNorm, in float32, and are rounded to the
    # dtype of values after it. A backend without it refuses (`wants_normed`).
    q_norm_N: jax.Array | None = None
    k_norm_N: jax.Array | None = None


class Carry(NamedTuple):
    """The state between two tokens of a scan: beside it, a token needs nothing of those before it (see `Row.kappa`)."""

    angle_BHS: jax.Array | None  # radians, float32; None: nothing rotates
    h_BHPN: jax.Array  # float32


class Row(NamedTuple):
    """A row of tokens. A token weighs gamma in its own output and kappa in every later one.

    q, k, v and gate may be bfloat16; everything else is float32.
    """

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    angle_BLHS: jax.Array | None  # radians per unit dt; the H axis may be 1: shared by the heads
    dt_BLH: jax.Array | None  # of the angle alone; None with it
    log_a_BLH: jax.Array
    gamma_BLH: jax.Array
    kappa_BLH: jax.Array | None  # None: gamma
    start_BL: jax.Array | None  # bool, true at the first token of a document
    before: Carry | None  # None: the empty state
    weights: Weights


class Scanned(NamedTuple):
    """What a row gives and leaves."""

    o_BLHP: jax.Array  # like v
    after: Carry
    k_BRGN: jax.Array  # of the last token, as it came; like v
    v_BHP: jax.Array


class Last(NamedTuple):
    """The state between two tokens of decoding."""

    h_BHPN: jax.Array  # float32
    angle_BHS: jax.Array | None  # float32, radians in [0, 2 pi); None: nothing rotates
    k_BRHN: jax.Array | None  # of the last token, biased and rotated; None, as v: it has no weight in the next
    v_BHP: jax.Array | None


class Token(NamedTuple):
    """One token, after the state before it: `h' = a (h + beta x_last k_last^T) + gamma x k^T`."""

    last: Last
    q_BRGN: jax.Array
    k_BRGN: jax.Array
    v_BHP: jax.Array
    gate_BHP: jax.Array | None
    angle_BHS: jax.Array | None  # radians per unit dt; H may be 1
    dt_BH: jax.Array | None
    log_a_BH: jax.Array
    gamma_BH: jax.Array
    beta_BH: jax.Array | None
    start_B: jax.Array | None  # int32; what is not 0 forgets everything before
    weights: Weights


class Stepped(NamedTuple):
    """The state after the token, in the buffers of the one before where those are donated, and the output."""

    last: Last
    o_BHP: jax.Array  # like v


def stepped_like(token: Token) -> Stepped:
    """Return the shapes and dtypes of a step's outputs: those parts of the state that came in."""

    def like(array, dtype):
        return None if array is None else jax.ShapeDtypeStruct(array.shape, dtype)

    last = token.last
    return Stepped(
        last=Last(
            h_BHPN=like(last.h_BHPN, jnp.float32),
            angle_BHS=like(last.angle_BHS, jnp.float32),
            k_BRHN=like(last.k_BRHN, key_dtype(token)),
            v_BHP=like(last.v_BHP, token.v_BHP.dtype),
        ),
        o_BHP=like(token.v_BHP, token.v_BHP.dtype),
    )


def key_dtype(token: Token) -> jnp.dtype:
    """Return the dtype of the key that a step leaves: that of keys after their norm."""
    return token.k_BRGN.dtype if token.weights.k_norm_N is None else token.v_BHP.dtype


def in_place(before: Last, after: Last) -> dict[int, int]:
    """Say which outputs take the buffer of which input, where the parts of the state come first among both."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {i: i for i, (old, new) in enumerate(pairs) if old.dtype == new.dtype}


def axes_of(path) -> str:
    """Return the shape letters of a field: "BLHP" of `v_BLHP`."""
    return path[-1].name.rsplit("_", 1)[-1]


def map_axes(function: Callable, tree):
    """Call `function(axes, array)` for every array of a tree of the tuples here, with the letters of its field."""
    return jax.tree_util.tree_map_with_path(lambda path, array: function(axes_of(path), array), tree)


def pad(tree, **sizes: int):
    """Pad with zeros every axis whose letter is given up to that size: `pad(row, L=192, P=64)`.

    A padded token has gamma = 0 and log_a = 0 and leaves the state as it is.
    """

    def padded(axes: str, array):
        missing = [sizes.get(axis, size) - size for axis, size in zip(axes, array.shape, strict=True)]
        return jnp.pad(array, [(0, more) for more in missing]) if any(missing) else array

    return map_axes(padded, tree)


def cut(tree, **sizes: int):
    """Take back what `pad` added: the first entries of every axis whose letter is given."""

    def first(axes: str, array):
        kept = [sizes.get(axis, size) for axis, size in zip(axes, array.shape, strict=True)]
        return array if tuple(kept) == array.shape else array[tuple(slice(size) for size in kept)]

    return map_axes(first, tree)


def ordered(tree, function: Callable):
    """Call `function` on every array whose last axis is N."""
    return map_axes(lambda axes, array: function(array) if axes.endswith("N") else array, tree)


def cast(array, dtype):
    """Return the array in a dtype; None stays None."""
    return None if array is None else array.astype(dtype)


def heads_first(array_BLH):
    """Put what is one number a token and head in the order (B, H, L); None stays None."""
    return None if array_BLH is None else jnp.swapaxes(array_BLH, 1, 2)


def sizes_of(inputs: Row | Token) -> dict[str, int]:
    """Return every size by its letter: S = 0 where nothing rotates, L = 1 of a token."""
    sizes = {"S": 0, "L": 1}
    for path, array in jax.tree_util.tree_leaves_with_path(inputs):
        for axis, size in zip(axes_of(path), array.shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, size))  # heads that share an angle have an axis of 1
    return sizes


def empty_carry(row: Row) -> Carry:
    """Return the state before any token: zeros."""
    size = sizes_of(row)
    angle_BHS = None if row.angle_BLHS is None else jnp.zeros((size["B"], size["H"], size["S"]), jnp.float32)
    return Carry(angle_BHS, jnp.zeros((size["B"], size["H"], size["P"], size["N"]), jnp.float32))


def product_dtype(inputs: Row | Token) -> jnp.dtype:
    """Return what the operands of matrix products are rounded to: the dtype of queries, keys and values."""
    if (
        isinstance(inputs, Token) and inputs.weights.k_norm_N is not None
    ):  # queries and keys take that of values after their norm
        return inputs.v_BHP.dtype
    return jnp.result_type(*(array for name, array in inputs._asdict().items() if name[:2] in ("q_", "k_", "v_")))


def decay_dtype(inputs: Row | Token) -> jnp.dtype:
    """Return the dtype of what is exact: the decay's, the state's."""
    (dtype,) = (array.dtype for name, array in inputs._asdict().items() if name.startswith("log_a_"))
    return dtype


def wants_float32_or_bfloat16(token: Token) -> str | None:
    """Return what every decoding kernel wants of dtypes, and what it got; None: nothing."""
    dtypes = {array.dtype for array in (token.q_BRGN, token.k_BRGN, token.v_BHP)}
    if token.log_a_BH.dtype == jnp.float32 and dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return None
    return f"wants float32 or bfloat16, not {sorted(map(str, dtypes | {token.log_a_BH.dtype}))}"


def wants_normed(inputs: Row | Token) -> str | None:
    """Return what kernels that do not norm queries and keys want of them, and what they got; None: nothing."""
    given = [name for name in ("q_norm_N", "k_norm_N") if getattr(inputs.weights, name) is not None]
    return f"wants q and k after their norm, not {' and '.join(given)}" if given else None


def require(backend: str, wish: str | None) -> None:
    """Raise ValueError where a backend's `available` or `unsupported` has a wish."""
    if wish is not None:
        raise ValueError(f"implementation={backend!r} {wish}")

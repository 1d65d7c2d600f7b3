"""What every backend takes and returns: the same arrays, in the op's own shapes and order of axes.

A backend is a package of this folder with four functions, a number and a flag:

    available() -> str | None                 what it wants of the device, and what it got; None: it can run
    unsupported(inputs) -> str | None         what it wants of a `Row` or a `Token`, and what it got; None: it can run.
                                              Arrays may be `jax.ShapeDtypeStruct`
    scan(row, rotation, *, interpret, **config) -> Scanned
    step(token, rotation, *, interpret, **config) -> Stepped
    STEPS                                     rows of up to so many tokens run as steps, one after another
    SPANS                                     whether `scan` takes `along`, see below

A backend owns its shapes: if its kernels want arrays padded, transposed or in another order of N (`order.Order`), it
pads, transposes and orders them itself, forward and backward. `config` holds options for performance only; the backend
chooses those that are not given. `scan` and `step` raise ValueError for unsupported inputs. `scan` is differentiable;
`step` need not be.

With `along` (`angle.Along`), inside `jax.shard_map`, rows go on over the devices of a mesh axis; all runs have the same
number of tokens. `row.before` is zero except for a row's first run. The last kappa of a run includes what the first
token of the next run adds. `after` is the state after all tokens of the row up to the end of the run. This costs a pass
over states, as the splits of a row do.

Letters: B batch, L tokens, R rank, G groups of q/k, H heads, N state per head, P head width, S rotary pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NORM_EPS = 1e-5


class Weights(NamedTuple):
    """Learned, one entry a head. Here as everywhere in this file, None is absent and costs nothing."""

    q_bias_HRN: jax.Array | None = None
    k_bias_HRN: jax.Array | None = None
    skip_H: jax.Array | None = None
    v_rank_HRP: jax.Array | None = None
    gate_rank_HRP: jax.Array | None = None
    out_rank_HRP: jax.Array | None = None
    norm_HP: jax.Array | None = None
    # Weights of an RMSNorm of queries and keys; a `Token` may have both or neither. With them, queries and keys come
    # before the norm, in float32, and are rounded to the dtype of values after it. Backends whose step does not norm
    # refuse them (`wants_normed`).
    q_norm_N: jax.Array | None = None
    k_norm_N: jax.Array | None = None


class Carry(NamedTuple):
    """The state between two tokens of a scan. A token needs nothing else of those before it (see `Row.kappa_BLH`)."""

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
    dt_BLH: jax.Array | None  # multiplies the angle, nothing else; None where the angle is
    log_a_BLH: jax.Array
    gamma_BLH: jax.Array
    kappa_BLH: jax.Array | None  # None: gamma
    start_BL: jax.Array | None  # bool, true at the first token of a document
    before: Carry | None  # None: the empty state
    weights: Weights


class Scanned(NamedTuple):
    """The outputs of a row, and what it leaves behind."""

    o_BLHP: jax.Array  # in v's dtype
    after: Carry
    k_BRGN: jax.Array  # the last token's key as it was given: neither biased nor rotated
    v_BHP: jax.Array  # the last token's value


class Last(NamedTuple):
    """The state between two tokens of decoding."""

    h_BHPN: jax.Array  # float32
    angle_BHS: jax.Array | None  # float32, radians in [0, 2 pi); None: nothing rotates
    k_BRHN: jax.Array | None  # the last token's key, biased and rotated; None: the rule has no beta
    v_BHP: jax.Array | None  # the last token's value; None: the rule has no beta


class Token(NamedTuple):
    """One token, and the state before it: `h' = a (h + beta x_last k_last^T) + gamma x k^T`."""

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
    start_B: jax.Array | None  # int32; not 0: a document starts, and everything before is dropped
    weights: Weights


class Stepped(NamedTuple):
    """The output of a token and the state after it, in the buffers of the state before it if those are donated."""

    last: Last
    o_BHP: jax.Array  # in v's dtype


def stepped_like(token: Token) -> Stepped:
    """Return the shapes and dtypes of a step's results; the state has the parts that it had before."""

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
    """Return the dtype of the key that a step leaves behind: that of keys after their norm."""
    return token.k_BRGN.dtype if token.weights.k_norm_N is None else token.v_BHP.dtype


def in_place(before: Last, after: Last) -> dict[int, int]:
    """Map inputs to the outputs that take their buffers; the parts of the state must come first among both."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {i: i for i, (old, new) in enumerate(pairs) if old.dtype == new.dtype}


def axes_of(path) -> str:
    """Return the shape letters of a field: "BLHP" of `v_BLHP`."""
    return path[-1].name.rsplit("_", 1)[-1]


def map_axes(function: Callable, tree):
    """Map `function(axes, array)` over a tree of this file's tuples; `axes` are the letters of the array's field."""
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
    """Undo `pad`: return the first entries of every axis whose letter is given."""

    def first(axes: str, array):
        kept = [sizes.get(axis, size) for axis, size in zip(axes, array.shape, strict=True)]
        return array if tuple(kept) == array.shape else array[tuple(slice(size) for size in kept)]

    return map_axes(first, tree)


def ordered(tree, function: Callable):
    """Map `function` over the arrays of a tree whose last axis is N."""
    return map_axes(lambda axes, array: function(array) if axes.endswith("N") else array, tree)


def cast(array, dtype):
    """Return the array in a dtype; None stays None."""
    return None if array is None else array.astype(dtype)


def heads_first(array_BLH):
    """Transpose numbers of tokens and heads, (B, L, H), to (B, H, L); None stays None."""
    return None if array_BLH is None else jnp.swapaxes(array_BLH, 1, 2)


def sizes_of(inputs: Row | Token) -> dict[str, int]:
    """Return every size by its letter; S = 0 where nothing rotates, L = 1 for a `Token`."""
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
    """Return the dtype that the operands of matrix products are rounded to: that of queries, keys and values."""
    if (
        isinstance(inputs, Token) and inputs.weights.k_norm_N is not None
    ):  # after their norm, queries and keys are rounded to the dtype of values
        return inputs.v_BHP.dtype
    return jnp.result_type(*(array for name, array in inputs._asdict().items() if name[:2] in ("q_", "k_", "v_")))


def decay_dtype(inputs: Row | Token) -> jnp.dtype:
    """Return the dtype of decays and states, which are not rounded for products."""
    (dtype,) = (array.dtype for name, array in inputs._asdict().items() if name.startswith("log_a_"))
    return dtype


def wants_float32_or_bfloat16(token: Token) -> str | None:
    """Return which dtypes every decoding kernel wants, and what it got; None: it takes these."""
    dtypes = {array.dtype for array in (token.q_BRGN, token.k_BRGN, token.v_BHP)}
    if token.log_a_BH.dtype == jnp.float32 and dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return None
    return f"wants float32 or bfloat16, not {sorted(map(str, dtypes | {token.log_a_BH.dtype}))}"


def wants_normed(inputs: Row | Token) -> str | None:
    """Return what kernels that do not norm queries and keys want, and what they got; None: they take these."""
    given = [name for name in ("q_norm_N", "k_norm_N") if getattr(inputs.weights, name) is not None]
    return f"wants q and k after their norm, not {' and '.join(given)}" if given else None


def require(backend: str, wish: str | None) -> None:
    """Raise ValueError where a backend's `available` or `unsupported` has a wish."""
    if wish is not None:
        raise ValueError(f"implementation={backend!r} {wish}")

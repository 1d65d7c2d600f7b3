"""The kernels as implementations of the op: one adapter for all backends, from `Tokens` to a row or a token and back.

`pallas_kernels.ssm.contract` says what a backend takes and returns. A backend is a line of `BACKENDS`. Its module is
imported only when it is used, since everything else works without the kernels.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from mamba3_jax.ops import tuned
from mamba3_jax.ops.discretize import later_weight
from mamba3_jax.ops.recurrent import recurrent
from mamba3_jax.ops.state import incoming, last_state
from mamba3_jax.ops.tuned import device
from mamba3_jax.ops.types import Heads, State, Tokens, empty_state

BACKENDS = {  # in order of preference for inputs that were not measured
    "mosaic_gpu": "pallas_kernels.ssm.mosaic_gpu",
    "triton": "pallas_kernels.ssm.triton",
    "mosaic_tpu": "pallas_kernels.ssm.mosaic_tpu",
}

NORMED = "mosaic_gpu"  # the backend whose step also norms queries and keys


def kernels(
    tokens: Tokens,
    heads: Heads,
    state: State | None,
    *,
    rotation: str,
    chunk: int | None = None,
    backend: str,
    interpret: object = None,
    anywhere: bool = False,
    along: object = None,
    **config,
):
    """Compute `ssm` by a backend's kernels: rows of up to `STEPS` tokens by its decoding step, longer ones by its scan.

    Args:
        tokens: as for `ssm`.
        heads: as for `ssm`.
        state: as for `ssm`.
        rotation: as for `ssm`.
        chunk: tokens in a chunk, rounded to what the kernels can do. Performance only.
        backend: a name in `BACKENDS`.
        interpret: runs the kernels in an interpreter on any device, slowly, for tests: True, or Pallas's parameters of
            the interpreter.
        anywhere: does not check the device, to trace and compile for another one than `device()`.
        along: inside `jax.shard_map`, how rows go on over devices, an `angle.Along` of `pallas_kernels.ssm`; only where
            `spans` holds.
        config: further options of the backend's `scan` or `step`, performance only. Options that are not given come
            from the table (`tuned`), or else are left to the backend.

    Raises:
        ValueError: the device is not one of the backend's, or it does not support shapes, dtypes or options.
    """
    from pallas_kernels.ssm.contract import require

    module = _module(backend)
    if not interpret and not anywhere:
        require(backend, module.available())
    config = tuned.config(backend, tokens) | config
    how = {"rotation": rotation, "interpret": interpret or None, **config}
    if along is not None:
        return _along(tokens, heads, state, backend, along, **how, chunk=chunk)
    if tokens.log_a_BLH.shape[1] <= module.STEPS:
        state = empty_state(tokens) if state is None else state
        return _steps(tokens, heads, state, backend, tuple(how.items()))
    return _finished(tokens, heads, module.scan(_row(tokens, heads, state), **how, chunk=chunk), rotation)


def _finished(tokens: Tokens, heads: Heads, scanned, rotation: str):
    """Return the output and the state of a row from what the backend's scan returned."""
    last = tokens._replace(k_BLRGN=scanned.k_BRGN[:, None], v_BLHP=scanned.v_BHP[:, None])
    return scanned.o_BLHP, last_state(last, heads, scanned.after.angle_BHS, scanned.after.h_BHPN, rotation)


def spans(implementation: str, tokens: Tokens) -> bool:
    """Tell whether an implementation's kernels can compute rows such as these that go on over several devices."""
    if implementation not in BACKENDS:
        return False
    module = _module(implementation)
    return module.SPANS and tokens.log_a_BLH.shape[1] > module.STEPS


def _along(tokens: Tokens, heads: Heads, state: State | None, backend: str, along, *, rotation: str, **how):
    """Compute this device's tokens of rows that go on over devices; the given state is that before whole rows."""
    from pallas_kernels.ssm.angle import of_next_run

    row, first_device = _row(tokens, heads, state), jax.lax.axis_index(along.axis) == 0
    if row.before is not None:
        row = row._replace(before=jax.tree.map(lambda x: jnp.where(first_device, x, 0), row.before))
    if row.kappa_BLH is not None:
        _, first_BH = later_weight(tokens.gamma_BLH, tokens.beta_BLH, tokens.start_BL)
        row = row._replace(kappa_BLH=row.kappa_BLH.at[:, -1].add(of_next_run(first_BH, along)))
    scanned = _module(backend).scan(row, rotation, **how, along=along)
    return _finished(tokens, heads, scanned, rotation)


def normed_step(tokens: Tokens, heads: Heads, state: State, norms: tuple, *, rotation: str, interpret: object = None):
    """Compute the RMSNorm of queries and keys, and `ssm` of one token, in one kernel of `NORMED`.

    The normed queries and keys are rounded to the dtype of values, as a layer rounds them. Not differentiable.

    Args:
        tokens: one for each row; q and k in float32, before their norm.
        heads: as for `ssm`.
        state: as for `ssm`.
        norms: weights (q_norm_N, k_norm_N).
        rotation: as for `ssm`.
        interpret: as for `kernels`.
    """
    token = normed_token(tokens, heads, state, norms)
    state, o_BHP = _step_in_place(NORMED, token, rotation=rotation, interpret=interpret)
    return o_BHP[:, None], state


def refused_normed(tokens: Tokens, heads: Heads, state: State, norms: tuple) -> str | None:
    """Return why `normed_step` cannot run these inputs, or inputs of their shapes, on this device; None: it can."""
    if NORMED not in BACKENDS:
        return f"wants a backend {NORMED!r}"
    module = _module(NORMED)
    return module.available() or module.unsupported(jax.eval_shape(normed_token, tokens, heads, state, norms))


def normed_token(tokens: Tokens, heads: Heads, state: State, norms: tuple):
    """Return the token that `normed_step` gives to its kernel."""
    token = _token(tokens, heads, state, 0)
    return token._replace(weights=token.weights._replace(q_norm_N=norms[0], k_norm_N=norms[1]))


def available(backend: str) -> bool:
    """Tell whether a backend's kernels are for this device."""
    return _module(backend).available() is None


def refused(backend: str, tokens: Tokens) -> str | None:
    """Return why a backend cannot run these inputs on this device; None: it can."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tokens)
    return _module(backend).available() or _unsupported(backend, shapes, device().device_kind)


def _module(backend: str):
    return importlib.import_module(BACKENDS[backend])


def _row(tokens: Tokens, heads: Heads, state: State | None):
    from pallas_kernels.ssm.contract import Carry, Row, Weights

    kappa_BLH, first_BH = later_weight(tokens.gamma_BLH, tokens.beta_BLH, tokens.start_BL)
    before = None
    if state is not None:
        # Without the barrier, XLA for GPU sums the gradient of first_BH, over all of a state, again for every token.
        first_BH = jax.lax.optimization_barrier(first_BH)
        before = Carry(angle_BHS=state.angle_BHS, h_BHPN=incoming(state, first_BH, heads))
    given = tokens._asdict() | {"dt_BLH": None if tokens.angle_BLHS is None else tokens.dt_BLH}
    del given["beta_BLH"]
    return Row(**given, kappa_BLH=kappa_BLH, before=before, weights=Weights(**heads._asdict()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _steps(tokens: Tokens, heads: Heads, state: State, backend: str, how):
    """Compute one token after another; the state is updated in place where it is donated."""
    outputs = []
    for place in range(tokens.log_a_BLH.shape[1]):
        state, o_BHP = _step_in_place(backend, _token(tokens, heads, state, place), **dict(how))
        outputs.append(o_BHP)
    return jnp.stack(outputs, axis=1), state


def _steps_fwd(tokens, heads, state, backend, how):
    return _steps(tokens, heads, state, backend, how), (tokens, heads, state)


def _steps_bwd(backend, how, inputs, cotangents):
    """Run the backward pass of `recurrent` from the inputs: steps have no backward kernels."""
    _, pull = jax.vjp(functools.partial(recurrent, rotation=dict(how)["rotation"]), *inputs)
    return pull(cotangents)


_steps.defvjp(_steps_fwd, _steps_bwd)


def _step_in_place(backend: str, token, **how):
    """Return (state, o_BHP) after a token.

    The kernel overwrites the state that it reads. XLA for GPU would fuse it with slices of stacked layers around it
    (dynamic slice fusion) and give it other memory to write to than it was told; the barriers keep them apart.
    """
    last, o_BHP = jax.lax.optimization_barrier(_module(backend).step(jax.lax.optimization_barrier(token), **how))
    return State(last.angle_BHS, last.h_BHPN, last.k_BRHN, last.v_BHP), o_BHP


def _token(tokens: Tokens, heads: Heads, state: State, place: int):
    from pallas_kernels.ssm.contract import Last, Token, Weights

    token = jax.tree.map(lambda array: array[:, place], tokens)
    token = token._replace(
        dt_BLH=None if token.angle_BLHS is None else token.dt_BLH,
        start_BL=None if token.start_BL is None else token.start_BL.astype(jnp.int32),
    )
    last = Last(h_BHPN=state.ssm_BHPN, angle_BHS=state.angle_BHS, k_BRHN=state.k_BRHN, v_BHP=state.v_BHP)
    given = {name.replace("L", ""): array for name, array in token._asdict().items()}  # names as arrays, without L
    return Token(last=last, **given, weights=Weights(**heads._asdict()))


@functools.lru_cache
def _unsupported(backend: str, tokens: Tokens, device: str) -> str | None:
    """Ask the backend whether it supports these shapes, once on each device: it may trace its kernels to find out."""
    del device
    (rank, _, d_state), (n_heads, width) = tokens.k_BLRGN.shape[2:], tokens.v_BLHP.shape[2:]
    weights = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    # All weights that there can be, which is the most that a kernel may have to hold.
    heads = Heads(
        **dict.fromkeys(("q_bias_HRN", "k_bias_HRN"), weights(n_heads, rank, d_state)),
        **dict.fromkeys(("v_rank_HRP", "gate_rank_HRP", "out_rank_HRP"), weights(n_heads, rank, width)),
        skip_H=weights(n_heads),
        norm_HP=weights(n_heads, width),
    )
    module, state = _module(backend), jax.eval_shape(empty_state, tokens)
    inputs = functools.partial(_token, place=0) if tokens.log_a_BLH.shape[1] <= module.STEPS else _row
    return module.unsupported(jax.eval_shape(inputs, tokens, heads, state))


IMPLEMENTATIONS = {name: functools.partial(kernels, backend=name) for name in BACKENDS}

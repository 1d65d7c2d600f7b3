"""One token of the op in a Pallas Mosaic kernel, for TPUs; and a few, one after another."""

import functools

import jax
import jax.numpy as jnp

from mamba3_jax.ops.decode import in_one_kernel
from mamba3_jax.ops.recurrent import recurrent
from mamba3_jax.ops.types import Heads, State, Tokens, empty_state

# Tokens up to which steps are estimated to be no slower than the scan, which costs about the same for 2 and for 16: see
# pallas_kernels/ssm/mosaic_tpu/NOTES.md.
FEW = 4


def decode_tpu(tokens: Tokens, heads: Heads, state: State | None, *, rotation: str, tile=None):
    """`recurrent` for up to `FEW` tokens, all of the state in place where it is donated.

    A token is one call of `pallas_kernels.ssm.mosaic_tpu.decode`, which reads the state and writes it. The backward
    pass is that of `recurrent`, on the inputs.

    Args:
        tile: a `pallas_kernels.ssm.mosaic_tpu.decode.Tile`; None chooses. Performance only, but for `interpret`: the
            kernel's program on any backend, slowly, for tests.

    Raises:
        ValueError: no TPU, what `unsupported` says, or a tile that does not fit in VMEM.
    """
    check(tokens, tile)
    state = empty_state(tokens) if state is None else state
    return _decode(tokens, heads, state, rotation, tile)


def check(tokens: Tokens, tile=None) -> None:
    """Raise ValueError, naming it, for what the kernel does not support."""
    # A tile is for a TPU to compile for, or for the interpreter, whatever this process has.
    if tile is None and jax.default_backend() != "tpu":
        raise ValueError(f"the TPU's decode kernel needs a TPU, the backend is {jax.default_backend()!r}")
    wish = unsupported(tokens)
    if wish is not None:
        raise ValueError(f"the TPU's decode kernel wants {wish}")


def unsupported(tokens: Tokens) -> str | None:
    """What the kernel wants of inputs that it cannot run, or None."""
    length = tokens.log_a_BLH.shape[1]
    if length > FEW:
        return f"up to {FEW} tokens, not {length=}"
    dtypes = {tokens.q_BLRGN.dtype, tokens.k_BLRGN.dtype, tokens.v_BLHP.dtype}
    if tokens.log_a_BLH.dtype != jnp.float32 or not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"float32 or bfloat16, not {sorted(map(str, dtypes | {tokens.log_a_BLH.dtype}))}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _decode(tokens: Tokens, heads: Heads, state: State, rotation: str, tile):
    return _steps(tokens, heads, state, rotation, tile)


def _decode_fwd(tokens, heads, state, rotation, tile):
    return _steps(tokens, heads, state, rotation, tile), (tokens, heads, state)


def _decode_bwd(rotation, tile, inputs, cotangents):
    del tile
    _, pull = jax.vjp(functools.partial(recurrent, rotation=rotation), *inputs)
    return pull(cotangents)


_decode.defvjp(_decode_fwd, _decode_bwd)


def _steps(tokens: Tokens, heads: Heads, state: State, rotation: str, tile):
    # Here, since everything else works without the kernel.
    from pallas_kernels.ssm.mosaic_tpu import decode as kernel

    outputs = []
    for place in range(tokens.log_a_BLH.shape[1]):
        token = jax.tree.map(lambda array: array[:, place], tokens)  # noqa: B023
        o_BHP, state = in_one_kernel(token, heads, state, rotation, tile or kernel.Tile(), kernel)
        outputs.append(o_BHP)
    return jnp.stack(outputs, axis=1), state

"""What keeps inputs from the TPU kernels on this process's devices, for the choice of an implementation."""

import functools

import jax
import jax.numpy as jnp

from mamba3_jax.ops import decode_tpu, mosaic_tpu
from mamba3_jax.ops.types import Heads, Tokens, empty_state


def refuses(tokens: Tokens) -> str | None:
    """No TPU, or one that is not known, shapes or dtypes that the kernels do not have, or too little VMEM; or None."""
    one_token = tokens.dt_BLH.shape[1] == 1
    unsupported = decode_tpu.unsupported if one_token else mosaic_tpu.unsupported
    return mosaic_tpu.needs() or unsupported(tokens) or _traced(*_abstract(tokens))


def _abstract(tokens: Tokens):
    """The shapes alone, which can be remembered: a field of `Tokens` each, and the TPU that they are for."""
    shapes = tuple(None if x is None else (x.shape, jnp.dtype(x.dtype)) for x in tokens)
    return shapes, jax.devices()[0].device_kind


@functools.lru_cache
def _traced(shapes, device: str) -> str | None:
    """What tracing both passes raises: how much VMEM they take depends on all of the shapes."""
    del device
    tokens = Tokens(*(None if x is None else jax.ShapeDtypeStruct(*x) for x in shapes))
    (rank, _, d_state), (n_heads, width) = tokens.q_BLRGN.shape[2:], tokens.v_BLHP.shape[2:]
    weights = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    by_rank = [weights(n_heads, rank, width)] * 3
    # All that there can be: the most that a grid step may have to hold.
    heads = Heads(*[weights(n_heads, rank, d_state)] * 2, weights(n_heads), *by_rank, weights(n_heads, width))

    def both(tokens, heads):
        op = functools.partial(mosaic_tpu.mosaic_tpu, rotation="half")
        results, pull = jax.vjp(op, tokens, heads, empty_state(tokens))
        return pull(results)

    try:
        jax.eval_shape(both, tokens, heads)
    except ValueError as error:
        return str(error)
    return None

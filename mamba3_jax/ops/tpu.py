"""The TPU kernels as one implementation: the decoding step for a few tokens, the scan for more; and where they run."""

import functools

import jax
import jax.numpy as jnp

from mamba3_jax.ops import decode_tpu as steps
from mamba3_jax.ops import mosaic_tpu as scan
from mamba3_jax.ops.types import Heads, State, Tokens, empty_state


def mosaic_tpu(
    tokens: Tokens,
    heads: Heads,
    state: State | None,
    *,
    rotation: str,
    chunk: int | None = None,
    interpret: object = None,
):
    """See `ops.decode_tpu` for up to `FEW` tokens, `ops.mosaic_tpu` for more.

    Args:
        chunk: of the scan. Performance only.
        interpret: pltpu.InterpretParams: run the kernels' program on any backend, slowly, for tests.

    Raises:
        ValueError: what either raises.
    """
    # Here, since everything else works without the kernels.
    from pallas_kernels.ssm.mosaic_tpu.decode import Tile

    if tokens.log_a_BLH.shape[1] > steps.FEW:
        return scan.mosaic_tpu(tokens, heads, state, rotation=rotation, chunk=chunk, interpret=interpret)
    tile = None if interpret is None else Tile(interpret=interpret)
    return steps.decode_tpu(tokens, heads, state, rotation=rotation, tile=tile)


def refuses(tokens: Tokens) -> str | None:
    """No TPU, or one that is not known, shapes or dtypes that the kernels do not have, or too little VMEM; or None."""
    unsupported = steps.unsupported if tokens.log_a_BLH.shape[1] <= steps.FEW else scan.unsupported
    return scan.needs() or unsupported(tokens) or _traced(*_abstract(tokens))


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
    # All that there can be, and N to be reordered: the most that a grid step may have to hold.
    heads = Heads(*[weights(n_heads, rank, d_state)] * 2, weights(n_heads), *by_rank, weights(n_heads, width))

    def both(tokens, heads):
        op = functools.partial(mosaic_tpu, rotation="adjacent")
        results, pull = jax.vjp(op, tokens, heads, empty_state(tokens))
        return pull(results)

    try:
        jax.eval_shape(both, tokens, heads)
    except ValueError as error:
        return str(error)
    return None

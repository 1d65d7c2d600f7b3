"""What the TPU kernels can run, and how they are cut for a row."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.ssm.contract import Row, product_dtype, sizes_of
from pallas_kernels.ssm.mosaic_tpu.contract import LANES, Tiles
from pallas_kernels.ssm.mosaic_tpu.tiles import block, default, this_chip
from pallas_kernels.ssm.order import Order

RANKS = (1, 2, 4, 8)
# Tokens up to which steps are estimated to be no slower than the scan, which costs about the same for 2 and for 16: see
# NOTES.md.
STEPS = 4


def available() -> str | None:
    """Returns what the kernels want of this process's devices, and what they got; None: nothing."""
    backend = jax.default_backend()
    return None if backend == "tpu" else f"needs a TPU, the backend is {backend!r}"


def limits(row: Row) -> str | None:
    """Returns what the kernels want of these shapes and dtypes, VMEM aside, and what they got; None: nothing."""
    size, dtype = sizes_of(row), product_dtype(row)
    if row.log_a_BLH.dtype != jnp.float32:
        return f"computes in float32, log_a is {row.log_a_BLH.dtype}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"wants q, k and v in float32 or bfloat16, not {dtype}"
    if size["L"] <= STEPS:  # a decoding step has no other limits
        return None
    rank, d_state, width = size["R"], size["N"], size["P"]
    if rank not in RANKS:
        return f"wants a rank of {', '.join(map(str, RANKS))}, not {rank=}"
    if width > 128 or d_state > 256:
        return f"wants d_state up to 256 and P up to 128, not {d_state=}, P={width}"
    return None


def order_of(rotation: str, d_state: int, planes: int) -> Order:
    """Returns the kernels' order of N, a multiple of 128: pair i at (i, i + N/2), what does not rotate between."""
    return Order(rotation, d_state, planes, size=-(-d_state // LANES) * LANES, halves=True)


def order_matrix(order: Order):
    """Returns a one where an entry of N, padded, goes: TPUs move lanes slowly, but multiply matrices in no time."""
    return jnp.pad(order.to(jnp.eye(order.d_state)), [(0, order.size - order.d_state), (0, 0)])


def tiles_of(row: Row, chunk: int | None, tiles: Tiles | None, interpret) -> Tiles:
    """Returns how the kernels are cut: what is not given, by the chip; never more tokens than there are."""
    size = sizes_of(row)
    shape = (size["H"], size["G"], size["P"])
    if tiles is None:
        chip = "v5e" if interpret is not None else this_chip()
        tiles = default(chip, size["R"], *shape, dtype=product_dtype(row))
    heads = block(*shape) if tiles.heads is None else tiles.heads
    tokens = -(-min(chunk or tiles.tokens, size["L"]) // 16) * 16
    return dataclasses.replace(tiles, tokens=tokens, heads=heads, width=size["P"], interpret=interpret)


def padded_width(n_heads: int, width: int, heads: int) -> int:
    """Returns P in the kernel: a block of heads fills its lanes, or, where it has all, a state whole tiles of rows."""
    unit = 8 if heads == n_heads else LANES // heads
    return -(-width // unit) * unit

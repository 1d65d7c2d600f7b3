"""What the TPU kernels can run, and how they are cut for a row and a chip."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.device import target
from pallas_kernels.ssm.contract import Row, product_dtype, sizes_of
from pallas_kernels.ssm.order import Order

LANES = 128
MIB = 2**20
RANKS = (1, 2, 4, 8)
# Tokens up to which steps are estimated to be no slower than the scan, which costs about the same for 2 and for 16: see
# NOTES.md.
STEPS = 4
CHIPS = {  # MiB of VMEM for the kernels, of a core's 16, 128, 64, 128 and 64; rows of a chunk
    "v4": (15, 256),
    "v5e": (100, 512),
    "v5p": (56, 512),
    "v6e": (100, 512),
    "tpu7x": (56, 512),
}
KINDS = {  # jax's device_kind; of some chips it has had two
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernels are cut. Performance only."""

    tokens: int = 128  # of a chunk, Q: a multiple of 16
    heads: int | None = None  # of a grid step, J; None: the shapes decide
    vmem: int = 56  # MiB that the kernels may take
    interpret: object = None  # pltpu's InterpretParams: on the CPU, for tests


def available() -> str | None:
    """Return what the kernels want of the device, and what they got; None: nothing."""
    platform = target().platform
    return None if platform == "tpu" else f"needs a TPU, the backend is {platform!r}"


def limits(row: Row) -> str | None:
    """Return what the scan wants of these shapes and dtypes, VMEM aside, and what it got; None: nothing."""
    size, dtype = sizes_of(row), product_dtype(row)
    if row.log_a_BLH.dtype != jnp.float32:
        return f"computes in float32, log_a is {row.log_a_BLH.dtype}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"wants q, k and v in float32 or bfloat16, not {dtype}"
    rank, d_state, width = size["R"], size["N"], size["P"]
    if rank not in RANKS:
        return f"wants a rank of {', '.join(map(str, RANKS))}, not {rank=}"
    if width > 128 or d_state > 256:
        return f"wants d_state up to 256 and P up to 128, not {d_state=}, P={width}"
    return None


def order_of(rotation: str, d_state: int, pairs: int) -> Order:
    """Return the kernels' order of N, a multiple of 128: pair i at (i, i + N/2), what does not rotate between."""
    return Order(rotation, d_state, pairs, size=-(-d_state // LANES) * LANES, halves=True)


def order_matrix(order: Order):
    """Return a one where an entry of N, padded, goes: TPUs move lanes slowly, but multiply matrices in no time."""
    return jnp.pad(order.to(jnp.eye(order.d_state)), [(0, order.size - order.d_state), (0, 0)])


def padded_width(n_heads: int, width: int, heads: int) -> int:
    """Return P in the kernel: a block of heads fills its lanes, or, where it has all, a state whole tiles of rows."""
    unit = 8 if heads == n_heads else LANES // heads
    return -(-width // unit) * unit


def tiles_of(row: Row, chunk: int | None, tiles: Tiles | None, interpret) -> Tiles:
    """Return how the kernels are cut: the chip decides what is not given; never more tokens than there are."""
    size = sizes_of(row)
    shape = (size["H"], size["G"], size["P"])
    if tiles is None:
        chip = "v5e" if interpret is not None else this_chip()
        tiles = default(chip, size["R"], dtype=product_dtype(row))
    heads = block_of_heads(*shape) if tiles.heads is None else tiles.heads
    tokens = -(-min(chunk or tiles.tokens, size["L"]) // 16) * 16
    return dataclasses.replace(tiles, tokens=tokens, heads=heads, interpret=interpret)


def default(chip: str, rank: int, *, dtype=jnp.bfloat16) -> Tiles:
    """Return the tiles for a chip of `CHIPS`; `dtype` is that of the products.

    Raises:
        ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"{chip=} is not one of {sorted(CHIPS)}")
    vmem, rows = CHIPS[chip]
    if dtype == jnp.float32:  # a product is six of bfloat16, and those of T x T outweigh the rest at 512
        rows = min(rows, 256)
    return Tiles(tokens=rows // rank, vmem=vmem)


def block_of_heads(n_heads: int, groups: int, width: int) -> int:
    """Return the heads of a grid step: as many as fill 128 lanes with their P entries, if groups allow."""
    a_group = n_heads // groups

    def fits(heads: int) -> bool:
        if n_heads % heads or (a_group % heads and heads % a_group):
            return False
        return heads == n_heads or LANES % heads == 0

    wanted = (4, 2) if width <= 32 else (2,)
    return next(heads for heads in (*wanted, 1) if fits(heads))


def this_chip() -> str:
    """Return the name in `CHIPS` of the TPU that the program is for.

    Raises:
        ValueError: another device.
    """
    kind = target().device_kind
    if kind not in KINDS:
        raise ValueError(f"device {kind!r} is not one of {sorted(KINDS)}: pass tiles")
    return KINDS[kind]


def vmem_limit(name: str, tiles: Tiles, intermediates: int, *, arrays, specs, scratch) -> int:
    """Return the bytes of VMEM for a kernel: XLA sets all of them aside for it, so no more than it may take.

    Args:
        intermediates: bytes that the compiler holds of a grid step.
        arrays: operands and results, as `specs`, whose blocks are held twice: the next one is on its way.

    Raises:
        ValueError: more than there is; it names the tile to shrink.
    """
    blocks = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec))
    of_block = zip(blocks, jax.tree.leaves(arrays), strict=True)
    total = intermediates + 2 * sum(tiled_bytes(spec.block_shape, array.dtype) for spec, array in of_block)
    total += sum(tiled_bytes(array.shape, array.dtype) for array in jax.tree.leaves(scratch))
    if total > tiles.vmem * MIB:
        raise ValueError(
            f"{name} takes about {total / MIB:.1f} MiB of VMEM, more than {tiles.vmem=}: "
            f"shrink {tiles.tokens=} (with {tiles.heads=})"
        )
    return min(total + total // 8 + 2 * MIB, tiles.vmem * MIB)


def tiled_bytes(shape, dtype) -> int:
    """Return the bytes in VMEM, where a tile is 8 rows of 128 lanes of 32 bits; an axis that is None is squeezed."""
    *outer, rows, lanes = (1, *(size or 1 for size in shape))
    bytes_ = jnp.dtype(dtype).itemsize
    up = lambda size, unit: -(-size // unit) * unit  # noqa: E731
    return math.prod(outer) * up(rows, 32 // bytes_) * up(lanes, LANES) * bytes_

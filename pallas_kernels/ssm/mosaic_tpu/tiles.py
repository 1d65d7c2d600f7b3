"""Default `Tiles` by chip, and the VMEM that they take."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.ssm.mosaic_tpu.contract import LANES, MIB, Grid, Tiles

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


def default(chip: str, rank: int, *heads, dtype=jnp.bfloat16) -> Tiles:
    """`Tiles` for a chip of `CHIPS`.

    Args:
        heads: as for `block`; none: left to the shapes.
        dtype: of the products.

    Raises:
        ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"{chip=} is not one of {sorted(CHIPS)}")
    vmem, rows = CHIPS[chip]
    if dtype == jnp.float32:  # a product is six of bfloat16, and those of T x T outweigh the rest at 512
        rows = min(rows, 256)
    return Tiles(tokens=rows // rank, heads=block(*heads) if heads else None, vmem=vmem)


def block(n_heads: int, groups: int, width: int) -> int:
    """Heads of a grid step: those of P entries that fill 128 lanes, if groups allow."""
    a_group = n_heads // groups

    def fits(heads: int) -> bool:
        if n_heads % heads or (a_group % heads and heads % a_group):
            return False
        return heads == n_heads or LANES % heads == 0

    wanted = (4, 2) if width <= 32 else (2,)
    return next((heads for heads in (*wanted, 1) if fits(heads)), n_heads)


def this_chip() -> str:
    """The name in `CHIPS` of this process's TPU.

    Raises:
        ValueError: another device.
    """
    kind = jax.devices()[0].device_kind
    if kind not in KINDS:
        raise ValueError(f"device {kind!r} is not one of {sorted(KINDS)}: pass tiles")
    return KINDS[kind]


def vmem_limit(name: str, grid: Grid, blocks, scratch) -> int:
    """Bytes of VMEM for a kernel: XLA keeps all of them for it, so no more than it may take.

    Args:
        blocks: (block, dtype) of every array; there are two of each, one on its way.
        scratch: (shape, dtype).

    Raises:
        ValueError: more than there is; it names the tile to shrink.
    """
    # What the compiler keeps of a chunk in between: T x T and T x N, float32, whose products take three pieces of each.
    squares, rows = (8, 16) if grid.backwards else (4, 8)
    between = 4 * grid.rows * (squares * grid.rows + rows * grid.d_state)
    if grid.dtype == jnp.float32:
        between += between // 2
    total = 2 * sum(_size(*block) for block in blocks) + sum(_size(*array) for array in scratch) + between
    if total > grid.tiles.vmem * MIB:
        raise ValueError(
            f"{name} takes about {total / MIB:.1f} MiB of VMEM, more than tiles.vmem={grid.tiles.vmem}: "
            f"shrink tiles.tokens={grid.tokens} (of {grid.rank} ranks and {grid.heads} heads)"
        )
    # A rough figure: with the chips' compilers, sizes and dtypes that were tried, up to 1.2 times as much was needed.
    return min(total + total // 4 + 2 * MIB, grid.tiles.vmem * MIB)


def _size(shape, dtype) -> int:
    """Bytes in VMEM, where a tile is 8 rows of 128 lanes of 32 bits."""
    *outer, rows, lanes = (size or 1 for size in shape)
    bytes_ = jnp.dtype(dtype).itemsize
    up = lambda size, unit: -(-size // unit) * unit  # noqa: E731
    return math.prod(outer) * up(rows, 32 // bytes_) * up(lanes, LANES) * bytes_

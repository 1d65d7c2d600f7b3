"""Default `Tiles` by chip, and the VMEM that they take."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

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
    return next(heads for heads in (*wanted, 1) if fits(heads))


def this_chip() -> str:
    """The name in `CHIPS` of this process's TPU.

    Raises:
        ValueError: another device.
    """
    kind = jax.devices()[0].device_kind
    if kind not in KINDS:
        raise ValueError(f"device {kind!r} is not one of {sorted(KINDS)}: pass tiles")
    return KINDS[kind]


def vmem_limit(name: str, tiles: Tiles, between: int, arrays, specs, scratch) -> int:
    """Bytes of VMEM for a kernel: XLA sets all of them aside for it, so no more than it may take.

    Args:
        between: bytes that the compiler keeps of a grid step.
        arrays: what goes in and out, as `specs`, of whose blocks there are two, one on its way.

    Raises:
        ValueError: more than there is; it names the tile to shrink.
    """
    blocks = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec))
    of_block = zip(blocks, jax.tree.leaves(arrays), strict=True)
    total = between + 2 * sum(_size(spec.block_shape, array.dtype) for spec, array in of_block)
    total += sum(_size(array.shape, array.dtype) for array in jax.tree.leaves(scratch))
    if total > tiles.vmem * MIB:
        raise ValueError(
            f"{name} takes about {total / MIB:.1f} MiB of VMEM, more than {tiles.vmem=}: "
            f"shrink {tiles.tokens=} (with {tiles.heads=})"
        )
    return min(total + total // 8 + 2 * MIB, tiles.vmem * MIB)


def between(grid: Grid) -> int:
    """What the compiler keeps of a chunk, float32: Q x Q of the heads of a block, T x T and T x N of those of a pack.

    A rough figure: a quarter more, for what v4's takes; half, where products take three pieces of each operand.
    """
    if grid.backwards:
        of_tokens, of_rows, columns = 2 + grid.heads, 2 + grid.pack, 8 + 4 * grid.pack
    else:
        of_tokens, of_rows, columns = grid.heads, 2, 4 + 2 * grid.pack
    kept = of_tokens * grid.tokens**2 + of_rows * grid.rows**2 + columns * grid.rows * grid.d_state
    return kept * (6 if grid.dtype == jnp.float32 else 5)


def _size(shape, dtype) -> int:
    """Bytes in VMEM, where a tile is 8 rows of 128 lanes of 32 bits."""
    *outer, rows, lanes = (size or 1 for size in shape)
    bytes_ = jnp.dtype(dtype).itemsize
    up = lambda size, unit: -(-size // unit) * unit  # noqa: E731
    return math.prod(outer) * up(rows, 32 // bytes_) * up(lanes, LANES) * bytes_

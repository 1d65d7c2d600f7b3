"""How `few_rows` is cut, by rows, kind of product and dtype, as measured on an H200 inside a decode loop.

In one layer of siso-180m, the kernels in, out, gate and back read 3,432, 768, 3,072 and 768 rows of a matrix: 5.3, 2.4,
4.7 and 2.4 MB of bfloat16, which at 4.2 TB/s take 1.2, 0.6, 1.1 and 0.6 us. A launch takes about 2 us. The kernels, and
XLA's own products with the kernels around them, took, in us:

    rows   tile                                           in, gate, out, back        XLA (or a remark)
       1   rows, 8 columns, 4 warps (gate: 16, 8)         4.1   3.7   2.8   3.0      11 kernels
       8   rows, the same                                 20.7  10.2   8.5   8.7     6.2 + 4.7, 3.3 x 2, 3.0, 3.0
       8   loop of 128, 32 columns, 4 warps, 6 stages     7.2   5.4   5.0   5.2      (out, back: 16 columns, 8 stages)
       8   loop of 128, 16 columns, 4 warps, 6 stages     6.3   5.3   4.3   4.5      (out, back: a loop of 256)
       8   loop of 128, 16 columns, 2 warps, 6 stages     5.5   4.4   4.3   4.5      (out, back: a loop of 256)
       8   loop of 256, 16 columns, 4 warps, 3 stages     5.9   5.2   4.1   4.4      (out, back: 8 columns, 6 stages)
       8   loop of 64, 16 columns, 4 warps, 8 stages      7.0   5.4   4.5   4.8      (out, back: of 128, 8 columns)
       8   all of K in registers, 16 columns, 4 warps     15.8  8.1   5.2   5.5      (out, back: 8 columns)
     128   loop of 64, 32 columns, 4 warps, 4 stages       9.6  13.1   9.3   8.4     out and back 5.5

Row by row, `in` takes 2.4 us more for every row, so that way is for two rows at most. For more rows, narrow programs
are better because there are more of them: at 32 columns `in` has 107 and `out` 24, at 16 and 8 columns they have 213
and 96, for 132 multiprocessors. A loop whose stages cover all or most of K has its loads under way at once and needs no
registers for them. Two warps read the rows half as often as four. With all of K in registers, of which each warp needs
all rows, a program of `in` spilled 544 bytes a thread. The norm before a loop is a kernel of 1.6 us.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernel is cut. Performance only."""

    columns: int = 8  # rows of the matrix in a program, over all matrices of a product
    block: int = 512  # the most entries of K in one load
    warps: int = 4
    dot: bool = False  # True: tensor cores multiply in a loop over K; False: threads, one row after another
    rows: int = 16  # with dot: the most rows in a program
    stages: int = 4  # with dot: how many steps of the loop are under way at once


# By the most rows that they are for, and by kind of product: "normed", "gated" (normed, of two matrices) or "bare".
# None: XLA's product is taken.
TILES = {
    2: {"normed": Tile(), "gated": Tile(columns=16, warps=8), "bare": Tile()},
    16: {
        "normed": Tile(dot=True, columns=16, block=128, warps=2, stages=6),
        "gated": Tile(dot=True, columns=16, block=128, warps=2, stages=6),
        "bare": Tile(dot=True, columns=8, block=256, stages=6),
    },
    256: {
        "normed": Tile(dot=True, columns=32, block=64, rows=128),
        "gated": Tile(dot=True, columns=64, block=64, rows=128),
        "bare": None,
    },
}
ROW = 2048  # the longest K that four warps take row by row


def kind_of(products, normed: bool) -> str:
    """Return the kind, a key of `TILES`, of some products."""
    if not normed:
        return "bare"
    return "gated" if all(len(product.firsts) == 2 for product in products) else "normed"


def default_tile(rows: int, size: int, kind: str, dtype) -> Tile | None:
    """Choose a tile for so many rows of K entries; None: XLA's own product was faster, or was not compared.

    Row by row, the threads of a program hold its columns of the matrix in registers, so a long K takes more threads.
    """
    most = next((most for most in TILES if rows <= most), None)
    tile = None if most is None else TILES[most][kind]
    if tile is None or (tile.dot and jnp.dtype(dtype) == jnp.float32):  # there is no tensor core for true float32
        return None
    return tile if tile.dot or size <= ROW else dataclasses.replace(tile, warps=8)

"""How `few_rows` is cut, by rows, kind of product and dtype: what was measured, on an H200 inside a decode loop.

One layer of siso-180m reads 3,432, 768, 3,072 and 768 matrix rows: 5.3, 2.4, 4.7 and 2.4 MB of bfloat16, which at 4.2
TB/s take 1.2, 0.6, 1.1 and 0.6 us. A launch takes about 2 us. What the four kernels took, in us:

    rows   tile                                           in, gate, out, back        XLA's products, with what is around
       1   rows, 8 columns, 4 warps (gate: 16, 8)         4.1   3.7   2.8   2.9      11 kernels
       8   rows, the same                                 20.7  10.2   8.5   8.7     6.2 + 4.7, 3.3 x 2, 3.0, 3.0
       8   loop of 128, 32 columns, 4 warps, 4 stages     11.4   9.1   5.4   5.6
     128   loop of 64, 32 columns, 4 warps, 4 stages       9.4   7.8   9.3   8.4     out and back 4.7

Row by row costs 2.4 us more with every row, so it is for two at most. The loop had 24 programs of `out` for 132
multiprocessors, and a sum over threads in each of its steps, for the norm. Up to 16 rows a program therefore takes
fewer columns, so that 96 to 215 programs run, and asks for all of their weights before it does anything: a
multiprocessor that has 24 KB on their way is at the memory's speed. What that takes was not measured yet.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernel is cut. Performance only."""

    columns: int = 8  # of all products that one epilogue takes, a program
    block: int = 512  # entries of K at a time, at most
    warps: int = 4
    dot: bool = False  # whether tensor cores multiply, and not threads row after row
    rows: int = 16  # a program, at most: of tensor cores alone
    stages: int = 0  # how many steps ahead a loop over K loads: of tensor cores alone; 0: all of K at once


# By the most rows that they are for. A product is "normed", "gated" (normed, of two matrices) or "bare". None: XLA's.
TILES = {
    2: {"normed": Tile(), "gated": Tile(columns=16, warps=8), "bare": Tile()},
    16: {
        "normed": Tile(dot=True, columns=16, block=256),
        "gated": Tile(dot=True, columns=16, block=256),
        "bare": Tile(dot=True, columns=8),
    },
    256: {
        "normed": Tile(dot=True, columns=32, block=64, rows=128, stages=4),
        "gated": Tile(dot=True, columns=64, block=64, rows=128, stages=4),
        "bare": None,
    },
}
LOOP = Tile(dot=True, columns=32, block=256, stages=4)  # of some rows, where all of K is too much for registers
# The longest K that is not: a thread then holds up to 192 registers of operands, rows before their norm in float32.
AT_ONCE = {"normed": 1024, "gated": 1024, "bare": 2048}
ROW = 2048  # and of rows one by one by four warps


def kind_of(products, normed: bool) -> str:
    """Return which tile of `TILES` some products take."""
    if not normed:
        return "bare"
    return "gated" if all(len(product.firsts) == 2 for product in products) else "normed"


def default_tile(rows: int, size: int, kind: str, dtype) -> Tile | None:
    """Choose a tile for so many rows of K entries; None: XLA's own product is faster, or not measured against.

    A program holds its columns of the matrix in registers. Of a long K more threads do, or it is taken in a loop.
    """
    most = next((most for most in TILES if rows <= most), None)
    tile = None if most is None else TILES[most][kind]
    if tile is None or (tile.dot and jnp.dtype(dtype) == jnp.float32):  # there is no tensor core for true float32
        return None
    if tile.dot:
        return tile if tile.stages or size <= AT_ONCE[kind] else dataclasses.replace(LOOP, rows=tile.rows)
    return tile if size <= ROW else dataclasses.replace(tile, warps=8)

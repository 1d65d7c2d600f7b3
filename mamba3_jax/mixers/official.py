"""Where official tensors lie in our arrays: the rows of tables in `convert/` and in each mixer with official weights.

An official tensor is a stack, along its first axis, of pieces of our arrays. Official `Linear` weights are (out, in).
Ours have the input axes first and split what the official in_proj packs, so that heads can be sharded on their own
axis.
"""

from typing import NamedTuple


class Piece(NamedTuple):
    """Part of one of our arrays: some columns of the array flattened to (inputs, outputs)."""

    path: str
    shape: tuple[int, ...]  # of our whole array
    columns: slice = slice(None)


class Row(NamedTuple):
    """One official tensor."""

    shape: tuple[int, ...]
    inputs: int  # width of a Linear's input; 0: the tensor is only reshaped
    pieces: tuple[Piece, ...]

    def under(self, prefix: str) -> "Row":
        """Put a prefix before the path of every piece."""
        return self._replace(pieces=tuple(piece._replace(path=prefix + piece.path) for piece in self.pieces))


def same(path: str, shape: tuple[int, ...], official: tuple[int, ...] | None = None) -> Row:
    """Declare an official tensor with the same numbers, in the same order, as one of our arrays."""
    return Row(official or shape, 0, (Piece(path, shape),))


def weight(inputs: int, outputs: int, *pieces: Piece) -> Row:
    """Declare an official Linear weight, (out, in)."""
    return Row((outputs, inputs), inputs, pieces)

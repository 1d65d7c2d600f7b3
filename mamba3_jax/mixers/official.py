"""Where official tensors lie in our arrays: rows, of which `convert/` and each mixer with official weights make tables.

An official tensor is a stack (along its first axis) of pieces of ours. Official `Linear` weights are (out, in); ours
keep the input axes first and split what the official in_proj packs, so that heads can be sharded on their own axis.
"""

from typing import NamedTuple


class Piece(NamedTuple):
    """Part of one of our arrays: the columns `first` to `stop` of it flattened to (inputs, outputs)."""

    path: str
    shape: tuple[int, ...]  # of our whole array
    columns: slice = slice(None)


class Row(NamedTuple):
    """One official tensor: `inputs` is the width of a Linear's input, or 0 for a tensor that is only reshaped."""

    shape: tuple[int, ...]
    inputs: int
    pieces: tuple[Piece, ...]

    def under(self, prefix: str) -> "Row":
        """Put a prefix before the path of every piece."""
        return self._replace(pieces=tuple(piece._replace(path=prefix + piece.path) for piece in self.pieces))


def same(path: str, shape: tuple[int, ...], official: tuple[int, ...] | None = None) -> Row:
    """Declare a tensor of the same numbers in the same order."""
    return Row(official or shape, 0, (Piece(path, shape),))


def weight(inputs: int, outputs: int, *pieces: Piece) -> Row:
    """Declare an official Linear weight, (out, in)."""
    return Row((outputs, inputs), inputs, pieces)

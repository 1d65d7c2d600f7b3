"""Draw flip-flop: the bit stored, when it is read (Liu et al. 2023, "Exposing attention glitches", arXiv:2306.00946).

In shapes J stands for the instructions of a document, two tokens each.
"""

import numpy as np

from mamba3_jax.data.batch import Documents

SYMBOLS = "wri01u"  # write, read, ignore, the bits, and undo

# How often each instruction is drawn. Without undo: Liu et al.'s FFL(0.8).
PLAIN = {"i": 0.8, "w": 0.1, "r": 0.1}
UNDO = {"i": 0.4, "w": 0.25, "u": 0.25, "r": 0.1}


def flip_flop(numbers_BL: np.ndarray, frequencies: dict[str, float]) -> Documents:
    """Draw instructions, each with a bit after it: w stores its bit, i does nothing, r is followed by the bit stored.

    With undo (after arXiv:2604.05923), what is stored is a stack: w puts its bit on top and u takes the top away, so
    that the value below it is stored again; u does nothing while there is only one value. The bit after u means
    nothing, as that after i. That paper's frequencies are not known to us; ours, with writes and undos equally often,
    let the depth wander.

    The first instruction is a write, the last one a read. The target at every r is the bit that comes after it. A
    document of odd length ends in an i.

    Args:
        numbers_BL: uniform in [0, 1), of at least 4 tokens.
        frequencies: of each instruction; they add up to 1.
    """
    count = numbers_BL.shape[1] // 2
    kinds = np.array([SYMBOLS.index(name) for name in frequencies], np.int32)
    ends = np.cumsum([*frequencies.values()])[:-1]  # the last kind takes what is left, whatever the sum's rounding
    kind_BJ = kinds[np.searchsorted(ends, numbers_BL[:, : 2 * count : 2], side="right")]
    kind_BJ[:, 0], kind_BJ[:, -1] = SYMBOLS.index("w"), SYMBOLS.index("r")
    bit_BJ = (numbers_BL[:, 1 : 2 * count : 2] * 2).astype(np.int32)
    top_BJ = top_writes(kind_BJ == SYMBOLS.index("w"), kind_BJ == SYMBOLS.index("u"))
    stored_BJ = np.take_along_axis(bit_BJ, top_BJ, axis=1)
    read_BJ = kind_BJ == SYMBOLS.index("r")

    tokens_BL = np.full(numbers_BL.shape, SYMBOLS.index("i"), np.int32)
    tokens_BL[:, : 2 * count : 2] = kind_BJ
    tokens_BL[:, 1 : 2 * count : 2] = SYMBOLS.index("0") + np.where(read_BJ, stored_BJ, bit_BJ)
    targets_BL, scored_BL = np.zeros_like(tokens_BL), np.zeros(tokens_BL.shape, bool)
    targets_BL[:, : 2 * count : 2] = SYMBOLS.index("0") + stored_BJ
    scored_BL[:, : 2 * count : 2] = read_BJ
    return Documents(tokens_BL=tokens_BL, targets_BL=targets_BL, scored_BL=scored_BL, answer=2 * count - 2)


def top_writes(write_BJ: np.ndarray, undo_BJ: np.ndarray) -> np.ndarray:
    """Return, for each instruction, the write whose value is on top of the stack then. The first must be a write."""
    place_J = np.arange(write_BJ.shape[1])
    if not undo_BJ.any():
        return np.maximum.accumulate(np.where(write_BJ, place_J, 0), axis=1)
    # An undo of the only value does nothing: the depth is the running sum plus the most that it fell short of 1 so far.
    narrow = np.min_scalar_type(-1 - len(place_J))  # numbers of 16 bits are sorted in linear time
    sum_BJ = np.cumsum(write_BJ.astype(narrow) - undo_BJ.astype(narrow), axis=1, dtype=narrow)
    depth_BJ = sum_BJ + np.maximum.accumulate(np.maximum(0, 1 - sum_BJ), axis=1)
    # On top is the last write that led to this depth, since every later write has been undone. Sorted by depth, then
    # time, it is the last write up to here: the first instruction at a depth is always a write.
    order_BJ = np.argsort(depth_BJ, axis=1, kind="stable")
    last_BJ = np.maximum.accumulate(np.where(np.take_along_axis(write_BJ, order_BJ, axis=1), place_J, 0), axis=1)
    top_BJ = np.empty_like(order_BJ)
    np.put_along_axis(top_BJ, order_BJ, np.take_along_axis(order_BJ, last_BJ, axis=1), axis=1)
    return top_BJ

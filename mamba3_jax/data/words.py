"""Draw words over finite groups, with the running product of their elements (Merrill et al. 2024, arXiv:2404.08819).

In shapes V stands for the elements of a group, I for the points that they permute.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mamba3_jax.data.batch import Documents


class Group(NamedTuple):
    """A finite group of permutations of 1 .. n, which are numbered in the order of their one-line notation."""

    names: tuple[str, ...]  # of each element
    table_VV: np.ndarray  # int32: the number of "a, then b"
    generators: np.ndarray  # numbers of the elements that words over generators consist of


def group(permutations: Sequence[tuple[int, ...]], generators: Sequence[tuple[int, ...]], names=None) -> Group:
    """Build the table of a group given by all of its permutations of 0 .. n - 1, in ascending order.

    Element a sends i to a[i]; "a, then b" sends i to b[a[i]].
    """
    points_VI = np.array(permutations)
    powers_I = len(points_VI[0]) ** np.arange(len(points_VI[0]))[::-1]
    codes_V = points_VI @ powers_I  # ascending, as the permutations are
    table_VV = np.searchsorted(codes_V, points_VI[:, points_VI] @ powers_I).T
    return Group(
        names=names or tuple("".join(str(1 + point) for point in permutation) for permutation in permutations),
        table_VV=np.ascontiguousarray(table_VV, np.int32),
        generators=np.searchsorted(codes_V, np.array(generators) @ powers_I),
    )


def cyclic(order: int) -> Group:
    """Build Z_n by rotations of n points, named 0 .. n - 1: a word's product is its sum mod n. Generators: 0 and 1."""
    rotations = [tuple((point + shift) % order for point in range(order)) for shift in range(order)]
    return group(rotations, rotations[:2], tuple(map(str, range(order))))


def symmetric(points: int) -> Group:
    """Build S_n. Generators: the identity, the rotation of all points and the swap of the first two."""
    one = tuple(range(points))
    return group(list(itertools.permutations(one)), [one, (*one[1:], 0), (1, 0, *one[2:])])


def alternating(points: int) -> Group:
    """Build A_n, the even permutations. Generators: the identity and the 3-cycles (1 2 x)."""
    one = tuple(range(points))
    even = [p for p in itertools.permutations(one) if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    cycles = [(1, last, *(0 if point == last else point for point in one[2:])) for last in one[2:]]
    return group(even, [one, *cycles])


def products(table_VV: np.ndarray, elements_BL: np.ndarray) -> np.ndarray:
    """Compute p_t = x_1, then x_2, .. then x_t, the running products of each row (B, L), in log2 L passes.

    Each pass doubles how many elements, up to its own, the product at a place has.
    """
    order, table = len(table_VV), table_VV.ravel()
    product_BL, reach = elements_BL, 1
    while reach < elements_BL.shape[1]:
        joined_BL = table[product_BL[:, :-reach] * order + product_BL[:, reach:]]
        product_BL = np.concatenate([product_BL[:, :reach], joined_BL], axis=1)
        reach *= 2
    return product_BL


def words(numbers_BL: np.ndarray, group: Group, over_generators: bool) -> Documents:
    """Draw words; the target at every token is the product of the elements up to it.

    Elements are uniform over the group, as Merrill et al. have it, or over its generators with the identity, the
    actions of Liu et al. 2023 ("Transformers learn shortcuts to automata", arXiv:2210.10749).

    Args:
        numbers_BL: uniform in [0, 1).
        group: whose elements are the vocabulary.
        over_generators: draw generators only.
    """
    drawn = group.generators if over_generators else np.arange(len(group.names))
    tokens_BL = drawn.astype(np.int32)[(numbers_BL * len(drawn)).astype(np.int32)]
    return Documents(
        tokens_BL=tokens_BL,
        targets_BL=products(group.table_VV, tokens_BL),
        scored_BL=np.ones(tokens_BL.shape, bool),
        answer=tokens_BL.shape[1] - 1,
    )

"""The order of N: in which places the op, and in which a kernel, has the entries of a query, a key or a state.

Products of queries and keys do not depend on the order, so a kernel may choose one in which it reads rotary pairs well.
The op has pair i at (2i, 2i + 1), "adjacent" (SISO weights), or at (i, i + N/2), "half" (MIMO weights). Entries that do
not rotate take the other places.
"""

import jax.numpy as jnp


class Order:
    """The way from the op's order to a kernel's and back, with zeros where the kernel has more entries.

    Args:
        rotation: "adjacent" or "half", the op's.
        d_state: the op's N.
        planes: rotary pairs, S; 0: nothing rotates, and entries stay where they are.
        size: the kernel's N.
        kernel_pairs: rotary pairs of the kernel, S with padding; None: S.
        halves: whether the kernel has pair i at (i, i + size/2), and entries that do not rotate between; else it has
            pair i at (2i, 2i + 1).
    """

    def __init__(
        self, rotation: str, d_state: int, planes: int, *, size: int, kernel_pairs: int | None = None, halves: bool
    ):
        self.half_given, self.halves = rotation == "half", halves
        self.d_state, self.planes, self.size = d_state, planes, size
        self.kernel_pairs = planes if kernel_pairs is None else kernel_pairs
        # If so, the only difference is padding at the end.
        self.same_order = not planes or (
            self.half_given == halves and self.kernel_pairs == planes and (size == d_state or not halves)
        )

    def to(self, array_N):
        """Put entries in the kernel's order."""
        if self.same_order:
            return _padded(array_N, self.size)
        first, second, rest = self.split(array_N)
        first, second = _padded(first, self.kernel_pairs), _padded(second, self.kernel_pairs)
        if not self.halves:
            pairs = jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
            return jnp.concatenate([pairs, _padded(rest, self.size - 2 * self.kernel_pairs)], axis=-1)
        between = self.size // 2 - self.kernel_pairs
        rests = (_padded(part, between) for part in jnp.split(rest, [min(between, rest.shape[-1])], axis=-1))
        return jnp.concatenate([x for pair in zip((first, second), rests, strict=True) for x in pair], axis=-1)

    def back(self, array_N):
        """Put a kernel's entries in the op's order, without its padding."""
        if self.same_order:
            return array_N[..., : self.d_state]
        rest_size = self.d_state - 2 * self.planes
        if self.halves:
            low, high = jnp.split(array_N, 2, axis=-1)
            first, second = low[..., : self.planes], high[..., : self.planes]
            rest = jnp.concatenate([low[..., self.kernel_pairs :], high[..., self.kernel_pairs :]], axis=-1)
        else:
            pairs = array_N[..., : 2 * self.planes].reshape(*array_N.shape[:-1], self.planes, 2)
            first, second, rest = pairs[..., 0], pairs[..., 1], array_N[..., 2 * self.kernel_pairs :]
        return self.joined(first, second, rest[..., :rest_size])

    def split(self, array_N):
        """Return the first and the second of every pair of the op's order, and the rest."""
        if not self.half_given:
            pairs = array_N[..., : 2 * self.planes]
            return pairs[..., ::2], pairs[..., 1::2], array_N[..., 2 * self.planes :]
        low, high = jnp.split(array_N, 2, axis=-1)
        rest = jnp.concatenate([low[..., self.planes :], high[..., self.planes :]], axis=-1)
        return low[..., : self.planes], high[..., : self.planes], rest

    def joined(self, first, second, rest):
        """Undo `split`."""
        if not self.half_given:
            pairs = jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
            return jnp.concatenate([pairs, rest], axis=-1)
        low, high = jnp.split(rest, 2, axis=-1)
        return jnp.concatenate([first, low, second, high], axis=-1)


def _padded(array_N, size: int):
    more = size - array_N.shape[-1]
    return jnp.pad(array_N, [(0, 0)] * (array_N.ndim - 1) + [(0, more)]) if more else array_N

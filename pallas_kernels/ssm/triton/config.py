"""What the Triton kernels can run, and how they are cut and launched."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.device import target
from pallas_kernels.ssm.angle import Along
from pallas_kernels.ssm.contract import Row, Token, decay_dtype, product_dtype, require, sizes_of, wants_normed
from pallas_kernels.ssm.order import Order

PROGRAMS = 256  # fill an H200: two on each of its 132 multiprocessors, and powers of two divide them


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one kernel runs: warps a program, and how many steps ahead its loop loads."""

    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernels of a row are cut and launched. Performance only, but for `rank` and `width`, the shape's."""

    rows: int = 64  # of a chunk, ranks times tokens: a power of two, at least 16, a multiple of the rank
    rank: int = 1
    width: int | None = None  # entries of P that are not padding; None: all
    splits: int = 1  # parts of the length that run side by side, of equally many chunks
    rotate_tokens: int = 16  # tokens that a program of the rotation takes
    rotate_heads: int = 8  # heads, at most, that it takes one after another
    rotate_bwd_heads: int = 16  # likewise in its backward pass, which adds up their gradients
    along: Along | None = None  # how rows go on over devices
    checkpoint_interval: int = 512  # tokens between two states from which the backward pass begins its sums again
    rotate: Launch = Launch(2, 1)
    rotate_bwd: Launch = Launch(1, 1)
    forward: Launch = Launch(4, 2)
    split_sums: Launch = Launch(4, 3)
    query: Launch = Launch(4, 2)
    key: Launch = Launch(4, 2)
    value: Launch = Launch(4, 2)
    epilogue_bwd: Launch = Launch(4, 1)
    interpret: bool = False  # on the CPU, for tests

    @property
    def tokens(self) -> int:
        """Return the tokens of a chunk."""
        return self.rows // self.rank

    @property
    def checkpoint_chunks(self) -> int:
        """Return the chunks between two checkpoints."""
        return self.checkpoint_interval // self.tokens


def available() -> str | None:
    """Return what the kernels want of the device, and what they got; None: nothing."""
    device = target().device_kind
    return None if "NVIDIA" in device else f"needs an NVIDIA GPU, not {device!r}"


def unsupported(inputs: Row | Token) -> str | None:
    """Return what the kernels want of these shapes and dtypes, and what they got; None: nothing."""
    size, dtype = sizes_of(inputs), product_dtype(inputs)
    rank, d_state, width, pairs = size["R"], size["N"], size["P"], size["S"]
    if decay_dtype(inputs) != jnp.float32:
        return f"computes in float32, log_a is {decay_dtype(inputs)}"
    if wish := wants_normed(inputs):
        return wish
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"wants q, k and v in float32 or bfloat16, not {dtype}"
    if rank & (rank - 1) or rank > 16:
        return f"wants a rank that is a power of two up to 16, not {rank=}"
    padded = order_of("half", d_state, pairs).size
    if width > 128 or padded > 256:
        wish = "d_state up to 256 (with the pairs padded) and P up to 128"
        return f"wants {wish}, not {d_state=} with {pairs=}, P={width}"
    if dtype == jnp.float32 and tile_size(width) * padded > 128 * 128:
        return f"wants P d_state up to 128 x 128 in float32, not {d_state=}, P={width}"
    return None


def order_of(rotation: str, d_state: int, pairs: int) -> Order:
    """Return the kernels' order of N: pairs, then what does not rotate, both padded: N is 2 S or 4 S."""
    if not pairs:
        return Order(rotation, d_state, 0, size=tile_size(d_state), halves=False)
    rest, padded = d_state - 2 * pairs, max(4, 1 << (pairs - 1).bit_length())
    while rest > 2 * padded or (padded < 8 and not rest):
        padded *= 2
    return Order(rotation, d_state, pairs, size=4 * padded if rest else 2 * padded, kernel_pairs=padded, halves=False)


def tile_of(row: Row, d_state: int, config: dict, interpret: bool) -> Tile:
    """Return the `Tile` of a row: what `config` says, and where it is silent what was found by hand.

    Args:
        d_state: N as the kernels have it, see `order_of`.
    """
    size = sizes_of(row)
    config = known(config, Tile, "chunk", "programs")
    # JSON has a kernel's launch as [warps, stages].
    config = {name: Launch(*value) if isinstance(value, list | tuple) else value for name, value in config.items()}
    rank, large = size["R"], tile_size(size["P"]) * d_state > 64 * 128
    rows = (config.pop("chunk", None) or 0) * rank or 64 >> (large and product_dtype(row) == jnp.float32)
    rows = _power_of_two(max(16, rank, min(64, rows)))
    n_chunks = -(-size["L"] // (rows // rank))
    programs = config.pop("programs", PROGRAMS)
    by_hand = {"splits": max(1, min(programs // (size["B"] * size["H"]), n_chunks // 4))}
    if rank > 1:
        by_hand["checkpoint_interval"] = 256  # 512 is 0.11 ms of 1.45 slower (H100, R4 B16 L2048 H32)
    if large:  # the state fills the registers of four warps, and the tiles fill shared memory
        by_hand |= dict.fromkeys(("forward", "split_sums", "query", "key", "value"), Launch(8, 1))
    elif rank > 1:
        by_hand["value"] = Launch(4, 1)
    config = {name: value for name, value in config.items() if value is not None}
    return Tile(**{"rows": rows, "rank": rank, "width": size["P"], "interpret": interpret} | by_hand | config)


def known(config: dict, tile, *more: str) -> dict:
    """Return `config`, checked.

    Raises:
        ValueError: an entry that is neither a field of `tile` nor one of `more`.
    """
    names = {field.name for field in dataclasses.fields(tile)} | set(more)
    if unknown := sorted(set(config) - names):
        require("triton", f"has no {', '.join(unknown)} to be launched with: {sorted(names)}")
    return config


def tile_size(size: int) -> int:
    """Return the next power of two from 16 on: products over fewer entries are silently wrong on the GPU."""
    return max(16, 1 << (size - 1).bit_length())


def _power_of_two(size: int) -> int:
    """Return the largest power of two that is not above `size`."""
    return 1 << (size.bit_length() - 1)

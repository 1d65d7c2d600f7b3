"""What the Hopper kernels can run, and how they are cut."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.ssm.contract import Row, product_dtype, sizes_of
from pallas_kernels.ssm.mosaic_gpu.registers import ROWS
from pallas_kernels.ssm.order import Order

WIDTH = 64  # P, padded
PROGRAMS = 264  # that fill an H200: two on each of its 132 multiprocessors


@dataclass(frozen=True)
class Tile:
    """How the kernels are cut. Performance only, but for `rank` and `width`, the shape's."""

    rank: int = 1
    width: int = WIDTH  # entries of P that are not padding
    splits: int = 1  # parts of the length side by side, of equally many chunks
    residuals: bool = False  # store y too, which the backward pass reads
    interpret: object = None  # plgpu's InterpretParams: on the CPU, for tests

    @property
    def tokens(self) -> int:
        """Returns how many a chunk has."""
        return ROWS // self.rank


def available() -> str | None:
    """Returns what the kernels want of this process's devices, and what they got; None: nothing."""
    found = jax.default_backend()
    if found == "gpu":
        capability = getattr(jax.local_devices()[0], "compute_capability", "unknown")
        if capability == "9.0":
            return None
        found = f"a GPU of compute capability {capability}"
    return f"needs a Hopper GPU (compute capability 9.0), not {found}"


def unsupported(row: Row) -> str | None:
    """Returns what the kernels want of these shapes and dtypes, and what they got; None: nothing."""
    size, dtype = sizes_of(row), product_dtype(row)
    rank, d_state, width, planes = size["R"], size["N"], size["P"], size["S"]
    if row.log_a_BLH.dtype != jnp.float32:
        return f"computes in float32, log_a is {row.log_a_BLH.dtype}"
    if dtype != jnp.bfloat16:
        return f"wants q, k and v in bfloat16, not {dtype}: Hopper's wgmma has no products of true float32"
    if rank not in (1, 2, 4):
        return f"wants a rank of 1, 2 or 4, not {rank=}"
    if width > WIDTH or order_of("half", d_state, planes).size > 128:
        room = f"d_state up to 128 (with the planes padded to 16, 32 or 64) and P up to {WIDTH}"
        return f"wants {room}, not {d_state=} with {planes=}, P={width}"
    return None


def order_of(rotation: str, d_state: int, planes: int) -> Order:
    """Returns the kernels' order of N: pair i at (i, i + N/2), as MIMO weights have it, what does not rotate between.

    S is 16, 32 or 64 there, and N 64 or 128.
    """
    room = max(16, 1 << (planes - 1).bit_length()) if planes else 0
    size = max(64, 1 << (2 * room + d_state - 2 * planes - 1).bit_length())
    return Order(rotation, d_state, planes, size=size, room=room, halves=True)


def splits_of(row: Row, programs: int) -> int:
    """Returns how many parts of the length fill the device, of four chunks or more."""
    size = sizes_of(row)
    chunks = -(-size["L"] // (ROWS // size["R"]))
    return max(1, min(programs // (size["B"] * size["H"]), chunks // 4))


def interpreter():
    """Returns what runs the kernels on the CPU."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.10 has no public name

    return InterpretGPUParams()

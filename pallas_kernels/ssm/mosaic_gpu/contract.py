"""What the scan reads and writes, and how it is cut."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from pallas_kernels.ssm.mosaic_gpu.config import WIDTH, Tile


class Inputs(NamedTuple):
    """Padded to whole chunks: L = C Q. Plane i is entries (i, i + N / 2) of N."""

    q_BLRGN: jax.Array | None  # None: no output, only the state that a split adds
    k_BLRGN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    phase_BHLS: jax.Array | None  # int16, fractions of a turn; None: nothing rotates
    scalars_BHCXT: jax.Array  # float32, of every row: c, c - log2 kappa, gamma and, for packed rows, the document
    h_BHZPN: jax.Array  # float32, the state before every split
    q_bias_HRN: jax.Array | None  # float32, as all below; None: absent
    k_bias_HRN: jax.Array | None
    skip_H: jax.Array | None
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class Outputs(NamedTuple):
    o_BLHP: jax.Array | None  # like v
    h_BHZPN: jax.Array  # float32, the state after every split
    y_BLHRP: jax.Array | None  # before norm and gate


@dataclass(frozen=True)
class Sizes:
    heads: int
    heads_a_group: int
    groups: int
    chunks: int  # of a split
    d_state: int
    planes: int


def n_planes(phase_BHLS) -> int:
    """Returns how many planes rotate."""
    return 0 if phase_BHLS is None else phase_BHLS.shape[-1]


def check(inputs: Inputs, tile: Tile) -> None:
    """Raises ValueError, naming it, for a size that the kernel cannot run."""
    length, rank, groups, d_state = inputs.k_BLRGN.shape[1:]
    n_heads, width = inputs.v_BLHP.shape[2:]
    planes = n_planes(inputs.phase_BHLS)
    if tile.rank not in (1, 2, 4) or rank != tile.rank:
        raise ValueError(f"{tile.rank=} is not 1, 2 or 4, or k has another {rank=}")
    if d_state not in (64, 128) or width != WIDTH:
        raise ValueError(f"{d_state=} is not 64 or 128, or {width=} not {WIDTH}")
    if inputs.phase_BHLS is not None and (planes not in (16, 32, 64) or 2 * planes > d_state):
        raise ValueError(f"{planes=} is not 16, 32 or 64, or more than {d_state=} holds")
    if length % (tile.tokens * tile.splits) or length == 0:
        raise ValueError(f"{length=} is not a multiple of {tile.splits=} chunks of {tile.tokens} tokens")
    if n_heads % groups:
        raise ValueError(f"{n_heads=} is not a multiple of {groups=}")
    if tile.rank == 1 and inputs.v_rank_HRP is not None:
        raise ValueError("v_rank of one rank is part of v")

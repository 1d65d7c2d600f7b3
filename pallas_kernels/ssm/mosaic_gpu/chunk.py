"""Bias and rotation of a chunk's queries and keys, its inverse for gradients, and what the chunk's scalars weigh."""

import jax.numpy as jnp

from pallas_kernels.ssm.mosaic_gpu.config import Tile
from pallas_kernels.ssm.mosaic_gpu.registers import (
    COLUMN,
    ROW,
    ROWS,
    TILE,
    joined_planes,
    of_ranks,
    of_tokens,
    planes_of,
)
from pallas_kernels.ssm.mosaic_gpu.tiles import across, down, iota, load

# Scalars of every row. The scan has the first three, its backward pass also kappa; of packed rows the last is the
# document.
DECAY, SHIFTED, GAMMA, KAPPA = range(4)


class Decay:
    """What the scalars of a chunk weigh. Vectors are loaded where they are used: they would fill the registers."""

    def __init__(self, scalars_XT, tile: Tile, *, packed: bool):
        self.scalars_XT, self.tile, self.interpret = scalars_XT, tile, tile.interpret is not None
        self.document = scalars_XT.shape[0] - 1 if packed else None

    def rows(self, which: int):
        """Loads a scalar of every row, for the rows of a tile."""
        return load(self.scalars_XT.at[which], ROW, self.interpret)

    def columns(self, which: int):
        """Loads a scalar of every row, for the columns of a tile."""
        return load(self.scalars_XT.at[which], COLUMN, self.interpret)

    def last(self, which: int):
        """Loads a scalar of the last row."""
        return self.scalars_XT[which, ROWS - 1]

    def tokens(self):
        """Returns the token of every row of a (T, T) tile, and of every column."""
        return (token(iota(axis, self.interpret), self.tile) for axis in (0, 1))

    def _together(self, before_TT):
        """Restricts pairs of rows and columns to those of one document."""
        if self.document is None:
            return before_TT
        return before_TT & (down(self.rows(self.document), ROWS) == across(self.columns(self.document), ROWS))

    def weight_TT(self):
        """Returns e^(c_t - c_s) kappa_s for targets t (down) after sources s, in a document; gamma_t where t = s."""
        target_TT, source_TT = self.tokens()
        gap_TT = down(self.rows(DECAY), ROWS) - across(self.columns(DECAY), ROWS)
        later_TT = jnp.exp2(gap_TT) * across(self.columns(KAPPA), ROWS)  # to the bit as the gradient of keys has it
        own_TT = jnp.where(target_TT == source_TT, across(self.columns(GAMMA), ROWS), 0.0)
        return jnp.where(self._together(target_TT > source_TT), later_TT, own_TT)

    def shifted_weight_TT(self):
        """Returns `weight_TT` with kappa as part of the exponent."""
        target_TT, source_TT = self.tokens()
        before_TT = self._together(target_TT > source_TT)
        gap_TT = down(self.rows(DECAY), ROWS) - across(self.columns(SHIFTED), ROWS)
        own_TT = jnp.where(target_TT == source_TT, across(self.columns(GAMMA), ROWS), 0.0)
        return jnp.where(before_TT, jnp.exp2(gap_TT), own_TT)  # what lies after a token may be infinite

    def later_TT(self):
        """Returns e^(c_t - c_s) for targets t (across) after sources s (down), in a document; 0 elsewhere."""
        source_TT, target_TT = self.tokens()
        gap_TT = across(self.columns(DECAY), ROWS) - down(self.rows(DECAY), ROWS)
        return jnp.where(self._together(target_TT > source_TT), jnp.exp2(gap_TT), 0.0)

    def own_TT(self):
        """Returns where row and column are of one token."""
        down_TT, across_TT = self.tokens()
        return down_TT == across_TT

    def decay_from_start_T(self):
        """Returns what is left at each row of the state before the chunk."""
        decay_T = jnp.exp2(self.rows(DECAY))
        return decay_T if self.document is None else jnp.where(self.rows(self.document) == 0.0, decay_T, 0.0)

    def decay_to_end_T(self, which: int = DECAY):
        """Returns what is left of each row at the end of the chunk; SHIFTED: times kappa."""
        decay_T = jnp.exp2(self.last(DECAY) - self.rows(which))
        if self.document is None:
            return decay_T
        return jnp.where(self.rows(self.document) == self.last(self.document), decay_T, 0.0)

    def chunk_decay(self):
        """Returns what is left at the end of the chunk of the state before it."""
        decay = jnp.exp2(self.last(DECAY))
        return decay if self.document is None else jnp.where(self.last(self.document) == 0.0, decay, 0.0)


def token(row, tile: Tile):
    """Returns the token of a row."""
    return row if tile.rank == 1 else row & (tile.tokens - 1)


class Rotation:
    """Bias and rotation by the angles of a chunk. Computed where it is used, as registers are few."""

    def __init__(self, phase_QS, interpret: bool):
        self.interpret, self.sin_TS, self.cos_TS = interpret, None, None
        if phase_QS is not None:
            radians_TS = of_tokens(phase_QS, interpret).astype(jnp.float32) * (2 * jnp.pi / 2.0**16)
            self.sin_TS, self.cos_TS = jnp.sin(radians_TS), jnp.cos(radians_TS)

    def changes(self, bias_RN) -> bool:
        """Returns whether anything is done to queries or keys with this bias (None: no bias)."""
        return bias_RN is not None or self.sin_TS is not None

    def apply(self, x_ref, bias_RN):
        """Returns queries or keys, biased and rotated, in registers, bfloat16."""
        x_TN = load(x_ref, TILE, self.interpret)
        if not self.changes(bias_RN):
            return x_TN
        x_TN = x_TN.astype(jnp.float32)
        if bias_RN is not None:
            x_TN += of_ranks(bias_RN, self.interpret)
        if self.sin_TS is None:
            return x_TN.astype(jnp.bfloat16)
        u_TS, rest, w_TS, more = planes_of(x_TN, self.sin_TS.shape[1])
        sin_TS, cos_TS = self.sin_TS, self.cos_TS
        rotated = (u_TS * cos_TS - w_TS * sin_TS, rest, u_TS * sin_TS + w_TS * cos_TS, more)
        return joined_planes(rotated, self.interpret)

    def inverse(self, dx_TN, x_TN):
        """Returns the gradient of what was rotated into x, bfloat16, and of the angle (None without angles)."""
        if self.sin_TS is None:
            return dx_TN.astype(jnp.bfloat16), None
        planes, sin_TS, cos_TS = self.sin_TS.shape[1], self.sin_TS, self.cos_TS
        du_TS, rest, dw_TS, more = planes_of(dx_TN, planes)
        u_TS, _, w_TS, _ = planes_of(x_TN, planes)
        dphi_TS = dw_TS * u_TS.astype(jnp.float32) - du_TS * w_TS.astype(jnp.float32)
        parts = (du_TS * cos_TS + dw_TS * sin_TS, rest, dw_TS * cos_TS - du_TS * sin_TS, more)
        return joined_planes(parts, self.interpret), dphi_TS

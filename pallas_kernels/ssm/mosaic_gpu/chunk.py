"""The turning of a chunk's queries and keys, there and back, and what its scalars weigh in the backward pass."""

import jax.numpy as jnp

from pallas_kernels.ssm.mosaic_gpu.contract import Tile
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

DECAY, SHIFTED, GAMMA, KAPPA, DOCUMENT = range(5)  # the scalars, see `back.Inputs`


class Decay:
    """What the scalars of a chunk weigh. Vectors are loaded where they are used: they would fill the registers."""

    def __init__(self, scalars_XT, tile: Tile):
        self.scalars_XT, self.tile, self.interpret = scalars_XT, tile, tile.interpret is not None
        self.packed = scalars_XT.shape[0] == 5

    def rows(self, which: int):
        return load(self.scalars_XT.at[which], ROW, self.interpret)

    def columns(self, which: int):
        return load(self.scalars_XT.at[which], COLUMN, self.interpret)

    def last(self, which: int):
        return self.scalars_XT[which, ROWS - 1]

    def tokens(self):
        """Down and across."""
        return (token(iota(axis, self.interpret), self.tile) for axis in (0, 1))

    def _together(self, before_TT):
        if not self.packed:
            return before_TT
        return before_TT & (down(self.rows(DOCUMENT), ROWS) == across(self.columns(DOCUMENT), ROWS))

    def weight_TT(self):
        """e^(c_t - c_s) kappa_s for targets t (down) after sources s, in a document; gamma_t where t = s."""
        target_TT, source_TT = self.tokens()
        gap_TT = down(self.rows(DECAY), ROWS) - across(self.columns(DECAY), ROWS)
        later_TT = jnp.exp2(gap_TT) * across(self.columns(KAPPA), ROWS)  # to the bit as `key` has it
        own_TT = jnp.where(target_TT == source_TT, across(self.columns(GAMMA), ROWS), 0.0)
        return jnp.where(self._together(target_TT > source_TT), later_TT, own_TT)

    def later_TT(self):
        """e^(c_t - c_s) for targets t (across) after sources s (down), in a document; 0 elsewhere."""
        source_TT, target_TT = self.tokens()
        gap_TT = across(self.columns(DECAY), ROWS) - down(self.rows(DECAY), ROWS)
        return jnp.where(self._together(target_TT > source_TT), jnp.exp2(gap_TT), 0.0)

    def own_TT(self):
        down_TT, across_TT = self.tokens()
        return down_TT == across_TT

    def since_T(self):
        """What is left at each row of the state before the chunk."""
        since_T = jnp.exp2(self.rows(DECAY))
        return jnp.where(self.rows(DOCUMENT) == 0.0, since_T, 0.0) if self.packed else since_T

    def until_T(self, which: int = DECAY):
        """What is left of each row at the end of the chunk; SHIFTED: times kappa."""
        until_T = jnp.exp2(self.last(DECAY) - self.rows(which))
        return jnp.where(self.rows(DOCUMENT) == self.last(DOCUMENT), until_T, 0.0) if self.packed else until_T

    def whole(self):
        """What is left at the end of the chunk of the state before it."""
        whole = jnp.exp2(self.last(DECAY))
        return jnp.where(self.last(DOCUMENT) == 0.0, whole, 0.0) if self.packed else whole


def token(row, tile: Tile):
    return row if tile.rank == 1 else row & (tile.tokens - 1)


class Turn:
    """Bias and rotation by the angles of a chunk, there and back. Computed where it is used, as registers are few."""

    def __init__(self, phase_QS, interpret: bool):
        self.interpret, self.sin_TS, self.cos_TS = interpret, None, None
        if phase_QS is not None:
            radians_TS = of_tokens(phase_QS, interpret).astype(jnp.float32) * (2 * jnp.pi / 2.0**16)
            self.sin_TS, self.cos_TS = jnp.sin(radians_TS), jnp.cos(radians_TS)

    def changes(self, bias_RN) -> bool:
        """Returns whether anything is done to queries or keys with this bias (None: no bias)."""
        return bias_RN is not None or self.sin_TS is not None

    def there(self, x_ref, bias_RN):
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
        turned = (u_TS * cos_TS - w_TS * sin_TS, rest, u_TS * sin_TS + w_TS * cos_TS, more)
        return joined_planes(turned, self.interpret)

    def back(self, dx_TN, x_TN):
        """Returns the gradient of what was turned into x, bfloat16, and of the angle (None without angles)."""
        if self.sin_TS is None:
            return dx_TN.astype(jnp.bfloat16), None
        planes, sin_TS, cos_TS = self.sin_TS.shape[1], self.sin_TS, self.cos_TS
        du_TS, rest, dw_TS, more = planes_of(dx_TN, planes)
        u_TS, _, w_TS, _ = planes_of(x_TN, planes)
        dphi_TS = dw_TS * u_TS.astype(jnp.float32) - du_TS * w_TS.astype(jnp.float32)
        parts = (du_TS * cos_TS + dw_TS * sin_TS, rest, dw_TS * cos_TS - du_TS * sin_TS, more)
        return joined_planes(parts, self.interpret), dphi_TS

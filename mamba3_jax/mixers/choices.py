"""What a config chooses for a Mamba-3 layer: tables of the choices, the sizes that follow, and checks."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mixer import check_op, head_count
from mamba3_jax.mixers.rates import A_FORMS
from mamba3_jax.ops.discretize import DISCRETIZATIONS
from mamba3_jax.ops.rotary import ROTATIONS


def data_angle(theta_BLS, dt_BLH):
    """Return pi tanh(theta), the angle in radians per unit dt, shared by the heads."""
    return jnp.pi * jnp.tanh(theta_BLS)[:, :, None]


def rope_angle(theta_BLS, dt_BLH):
    """Return 10000^(-i/S) / dt: the op multiplies by dt, so pair i rotates by 10000^(-i/S) radians at every token."""
    planes = theta_BLS.shape[-1]
    frequency_S = 10000.0 ** (-np.arange(planes, dtype=np.float32) / planes)
    return frequency_S / jnp.maximum(dt_BLH, 1e-15)[..., None]  # a dt that underflowed rotates by 0, not by 0 * inf


def no_angle(theta_BLS, dt_BLH):
    """Return None: no rotation."""
    return


# The angles that the op rotates by. With quaternions there are none: keys and queries are rotated before the op.
ANGLES = {"data": data_angle, "rope": rope_angle, "none": no_angle, "quaternion": no_angle}
BIASED = {"both": ("k_bias", "q_bias"), "b": ("k_bias",), "c": ("q_bias",), "none": ()}  # which bias parameters exist


class Sizes(NamedTuple):
    """What a config implies for one layer."""

    heads: int
    head_dim: int
    groups: int
    rank: int  # 1 for SISO
    d_state: int
    planes: int  # pairs of entries that rotate together; with quaternions, groups of four
    thetas: int  # columns of theta: one for each plane, or three with quaternions
    mimo: bool


def sizes(config: ModelConfig) -> Sizes:
    """Return the sizes of a config's layer. A plane has two entries of the rotated part of the state, or four.

    H = expand D / P;  S = rope_fraction N / 2, or rope_fraction N / 4 with quaternions.
    """
    quaternion = config.angles == "quaternion"
    planes = int(config.d_state * config.rope_fraction) // (4 if quaternion else 2)
    return Sizes(
        heads=head_count(config),
        head_dim=config.head_dim,
        groups=config.n_groups,
        rank=max(config.mimo_rank, 1),
        d_state=config.d_state,
        planes=planes,
        thetas=3 * planes if quaternion else planes,
        mimo=config.mimo_rank > 0,
    )


def pairing(config: ModelConfig) -> str:
    """Return which entries of the state form a plane, a name in `ROTATIONS`."""
    return config.pairing or ("half" if config.mimo_rank > 0 else "adjacent")


def check(config: ModelConfig) -> None:
    """Raise ValueError for sizes or choices that no Mamba-3 layer can have."""
    check_op(config)
    if config.rope_fraction not in (0.5, 1.0):
        raise ValueError(f"{config.rope_fraction=} is neither 0.5 nor 1.0")
    if config.d_state % 2:
        raise ValueError(f"{config.d_state=} is not an even number")
    if not sizes(config).planes:
        raise ValueError(f"{config.d_state=} is too small to rotate {config.rope_fraction=} of it")
    if config.discretization not in DISCRETIZATIONS:
        raise ValueError(f"{config.discretization=} is not one of {sorted(DISCRETIZATIONS)}")
    if config.angles not in ANGLES:
        raise ValueError(f"{config.angles=} is not one of {sorted(ANGLES)}")
    if config.angles == "quaternion" and config.pairing == "half":
        raise ValueError(f"{config.pairing=} has no quaternions: wanted '' or 'adjacent' for {config.angles=}")
    if config.pairing and config.pairing not in ROTATIONS:
        raise ValueError(f"{config.pairing=} is not '' or one of {sorted(ROTATIONS)}")
    if config.bc_bias not in BIASED:
        raise ValueError(f"{config.bc_bias=} is not one of {sorted(BIASED)}")
    if config.a_form not in A_FORMS:
        raise ValueError(f"{config.a_form=} is not one of {sorted(A_FORMS)}")
    if config.conv == 1:
        raise ValueError(f"{config.conv=} sees its own token alone: wanted 0 (none), or 2 or more")

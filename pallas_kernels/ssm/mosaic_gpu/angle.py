"""Angles of Pallas Mosaic GPU kernels, which have no floor, and sines to 5e-7 or by branches."""

import jax.numpy as jnp


def within_a_turn(angle):
    """Returns the angle modulo 2 pi, in [0, 2 pi)."""
    for _ in range(2):  # a tiny negative angle rounds up to a whole turn, which is zero
        turns = angle * (1 / (2 * jnp.pi))
        whole = turns.astype(jnp.int32).astype(jnp.float32)  # this rounds towards zero: Mosaic has no floor
        angle = angle - 2 * jnp.pi * jnp.where(whole > turns, whole - 1, whole)
    return angle


def sine_and_cosine(angle):
    """Returns sine and cosine of angles in [0, 2 pi), to 1e-7.

    The hardware's sine is off by 5e-7, which sums of products that cancel show.
    """
    quarter = (angle * (2 / jnp.pi) + 0.5).astype(jnp.int32)
    x = angle
    for part in (1.5703125, 4.837512969970703125e-4, 7.54978995489188216e-8):  # pi / 2; the first two times 4 are exact
        x -= quarter.astype(jnp.float32) * part
    # These are Cephes' sinf and cosf, from -pi / 4 to pi / 4.
    z = x * x
    sin = x + x * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cos = 1 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    odd = (quarter & 1) == 1
    sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)
    return jnp.where((quarter & 2) == 0, sin, -sin), jnp.where(((quarter + 1) & 2) == 0, cos, -cos)

"""A Mamba-3 layer by its equations, token by token, whatever its switches are: the state is rotated, not keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.config import ModelConfig


def norm(x, weight=None):
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    return x if weight is None else x * weight


def convolved(x, weights, bias, first_BL):
    """silu(bias + sum_s w_{t-s} x_s) over the tokens s of t's document that are fewer than K before it."""
    taps, t_L = weights.shape[-1], jnp.arange(x.shape[1])
    total = bias
    for back in range(taps):
        seen_BL = t_L - back >= first_BL
        seen = seen_BL.reshape(*seen_BL.shape, *[1] * (x.ndim - 2))
        total = total + jnp.where(seen, jnp.roll(x, back, axis=1), 0) * weights[..., -1 - back]
    return jax.nn.silu(total)


def plane_turns(config: ModelConfig, angle_BLHS):
    """(u, v) -> (u cos - v sin, u sin + v cos) in every plane, a matrix a token and head."""
    n, planes = config.d_state, angle_BLHS.shape[-1]
    half = (config.pairing or ("half" if config.mimo_rank else "adjacent")) == "half"
    u = np.arange(planes) if half else 2 * np.arange(planes)
    v = u + n // 2 if half else u + 1
    turn = jnp.broadcast_to(jnp.eye(n), (*angle_BLHS.shape[:3], n, n))
    sin, cos = jnp.sin(angle_BLHS), jnp.cos(angle_BLHS)
    turn = turn.at[..., u, u].set(cos).at[..., v, v].set(cos)
    return turn.at[..., u, v].set(-sin).at[..., v, u].set(sin)


def quaternion_turns(config: ModelConfig, axis_BLHS3):
    """The product by exp(axis) from the left on every four entries w, x, y, z, as a matrix."""
    length = jnp.sqrt(jnp.sum(axis_BLHS3**2, axis=-1))
    w, (x, y, z) = jnp.cos(length), jnp.moveaxis(axis_BLHS3 * (jnp.sin(length) / length)[..., None], -1, 0)
    rows = [[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]]
    turn = jnp.broadcast_to(jnp.eye(config.d_state), (*length.shape[:3], config.d_state, config.d_state))
    for i, j in np.ndindex(4, 4):
        at = 4 * np.arange(length.shape[-1])
        turn = turn.at[..., at + i, at + j].set(rows[i][j])
    return turn


def turns(config: ModelConfig, theta, dt_BLH):
    """What a step does to a row of the state."""
    if config.angles == "none":
        return jnp.broadcast_to(jnp.eye(config.d_state), (*dt_BLH.shape, config.d_state, config.d_state))
    if config.angles == "rope":
        frequency_S = 10000.0 ** (-np.arange(theta.shape[-1]) / theta.shape[-1])
        return plane_turns(config, jnp.broadcast_to(frequency_S, (*dt_BLH.shape, len(frequency_S))))
    if config.angles == "data":
        return plane_turns(config, jnp.pi * jnp.tanh(theta)[:, :, None] * dt_BLH[..., None])
    theta = jnp.moveaxis(theta.reshape(*theta.shape[:2], 1, 3, -1), 3, 4)
    length = jnp.sqrt(jnp.sum(theta**2, axis=-1, keepdims=True))
    return quaternion_turns(config, jnp.pi * jnp.tanh(length) * theta / length * dt_BLH[..., None, None])


@functools.partial(jax.jit, static_argnums=0)
def equations(fields: tuple, p, x_BLD, start_BL):
    """h_t = a_t (h_{t-1} + beta_t X_{t-1} k_{t-1}^T) R_t + gamma_t X_t k_t^T,  y_t = h_t q_t; norms, ranks, gate, out.

    R_t is the matrix of `turns`; keys and queries are biased and never rotated. exponential_trapezoidal.
    """
    config = ModelConfig(**dict(fields))
    (heads, width, _), ranks = p["out"].shape, max(config.mimo_rank, 1)
    shared = ranks * config.n_groups * config.d_state
    first_BL = jax.lax.cummax(jnp.where(start_BL, jnp.arange(x_BLD.shape[1]), 0), axis=1)
    z_BLHP, v_BLHP = jnp.einsum("bld,dchp->cblhp", x_BLD, p["in_zx"])
    dt_BLH, a_BLH, trap_BLH = jnp.einsum("bld,dch->cblh", x_BLD, p["in_dt_a_trap"])
    kq, theta = jnp.split(x_BLD @ p["in_kq_angle"], [2 * shared], axis=-1)
    if config.conv:
        v_BLHP = convolved(v_BLHP, p["conv_x"], p["conv_x_bias"], first_BL)
        kq = convolved(kq, p["conv_kq"], p["conv_kq_bias"], first_BL)

    def per_head(x, name):
        x = x.reshape(*x.shape[:2], ranks, config.n_groups, config.d_state)
        x = norm(x, p[f"{name}_norm"]) if config.bc_norm else x
        x_BLHRN = jnp.repeat(jnp.swapaxes(x, 2, 3), heads // config.n_groups, axis=2)
        return x_BLHRN + p.get(f"{name}_bias", 0)

    k_BLHRN, q_BLHRN = per_head(kq[..., :shared], "k"), per_head(kq[..., shared:], "q")
    dt_BLH = jax.nn.softplus(dt_BLH + p["dt_bias"])
    rate = {
        "heavy_tail": lambda u: jnp.where(u >= 0, 1 + u, 1 / (1 - jnp.minimum(u, 0))),
        "softplus": jax.nn.softplus,
        "learned": lambda u: jnp.exp(p["a_log"]),
    }[config.a_form]
    x_BLHRP = v_BLHP[..., None, :] * p.get("v_rank", 1.0)
    a_BLH = jnp.exp(-dt_BLH * jnp.maximum(rate(a_BLH), config.a_floor))
    gamma_BLH = dt_BLH * jax.nn.sigmoid(trap_BLH)

    def step(before, token):
        a, beta, gamma, x, k, q, turn, start = token
        before = jax.tree.map(lambda array: jnp.where(start.reshape(-1, *[1] * (array.ndim - 1)), 0, array), before)
        h, u = before
        now = jnp.einsum("bhrp,bhrn->bhpn", x, k)
        h = a * jnp.einsum("bhpn,bhnm->bhpm", h + beta * u, turn) + gamma * now
        return (h, now), jnp.einsum("bhpn,bhrn->bhrp", h, q)

    wide = lambda x_BLH: x_BLH[..., None, None]  # noqa: E731
    scalars = wide(a_BLH), wide(dt_BLH - gamma_BLH), wide(gamma_BLH)
    tokens = (*scalars, x_BLHRP, k_BLHRN, q_BLHRN, turns(config, theta, dt_BLH), start_BL)
    empty = jnp.zeros((x_BLD.shape[0], heads, width, config.d_state), x_BLD.dtype)
    _, y_LBHRP = jax.lax.scan(step, (empty, empty), jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens))
    y_BLHRP = jnp.swapaxes(y_LBHRP, 0, 1) + p["skip"][:, None, None] * x_BLHRP
    if config.out_norm:
        y_BLHRP = norm(y_BLHRP) * p["norm"][:, None]
    y_BLHRP = y_BLHRP * jax.nn.silu(z_BLHP[..., None, :] * p.get("gate_rank", 1.0)) * p.get("out_rank", 1.0)
    return jnp.einsum("blhrp,hpd->bld", y_BLHRP, p["out"])

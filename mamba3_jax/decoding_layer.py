"""One decoding step of a layer of Mamba-3 and SwiGLU, in five kernels on a Hopper GPU. It computes what `Block` does.

    r <- r + out(ssm(in(norm1(r))));   r <- r + back(value(norm2(r)) silu(gate(norm2(r))))

The kernel of a product also computes the norm before it and the epilogue after it (`ops.projections`). All matrices
that one kernel reads are one array, in which every output is a row: each is read once, and none is copied.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.choices import Sizes, pairing, sizes
from mamba3_jax.mixers.mamba3 import Mamba3
from mamba3_jax.mixers.rates import heavy_tail
from mamba3_jax.nn.precision import DTYPES
from mamba3_jax.ops import kernels, projections
from mamba3_jax.ops.discretize import DISCRETIZATIONS, uses_previous
from mamba3_jax.ops.projections import Product, project
from mamba3_jax.ops.sharded import one_device
from mamba3_jax.ops.tuned import device
from mamba3_jax.ops.types import Heads, State, Tokens

RULES = ("exponential_trapezoidal", "midpoint", "exponential_euler")  # those that Triton has been seen to lower


class Layer(NamedTuple):
    """One layer's parameters. The rows of `in_MD` are z, x, k, q, theta, dt, a, trap."""

    norm1_D: jax.Array
    in_MD: jax.Array
    dt_bias_H: jax.Array
    q_norm_N: jax.Array
    k_norm_N: jax.Array
    heads: Heads
    out_DI: jax.Array
    norm2_D: jax.Array
    value_gate_FD: jax.Array
    back_DF: jax.Array


def refused(config: ModelConfig) -> str | None:
    """Return why this file cannot run the Mamba-3 layers of a config on this process's devices; None: it can."""
    known = {
        "norm": ("rms",),
        "residual_in_fp32": (True,),
        "angles": ("data",),
        "bc_norm": (True,),
        "conv": (0,),
        "a_form": ("heavy_tail",),
        "discretization": RULES,
        "compute_dtype": ("bfloat16",),
        "implementation": ("", kernels.NORMED),
    }
    for name, values in known.items():
        if getattr(config, name) not in values:
            return f"wants {name} in {values}, not {getattr(config, name)!r}"
    if not config.d_ff:
        return "wants a feed-forward, not d_ff=0"
    if not one_device():
        return "wants one device, not several"
    if device().platform != "gpu":
        return f"wants a GPU, not {device().platform}"
    return projections.refused() or kernels.refused_normed(*jax.eval_shape(lambda: zeros(config)))


def zeros(config: ModelConfig):
    """Return (tokens, heads, state, norms) of a batch of one, for their shapes."""
    size, dtype = sizes(config), DTYPES[config.compute_dtype]
    inner, shared = size.heads * size.head_dim, size.rank * size.groups * size.d_state
    wide, row, number = jnp.zeros((1, inner), dtype), jnp.zeros((1, shared)), jnp.zeros((1, size.heads))
    given = {"z": wide, "x": wide, "k": row, "q": row, "theta": jnp.zeros((1, size.planes))}
    beta = [number] * uses_previous(config.discretization)
    tokens = as_tokens(size, **given, dt=number, log_a=number, gamma=number, beta=beta, start=jnp.zeros(1, bool))
    norm_N = jnp.zeros(size.d_state)
    return tokens, Heads(), Mamba3.empty_state(config, 1, 1), (norm_N, norm_N)


def arranged(config: ModelConfig, block) -> Layer:
    """Return a layer's parameters from those of its `Block`, with matrices in the compute dtype."""
    mixer, mlp, dtype = block["mixer"], block["mlp"], DTYPES[config.compute_dtype]
    flat = lambda matrix: matrix.reshape(matrix.shape[0], -1).T.astype(dtype)  # noqa: E731
    per_head = ("skip", "v_rank", "gate_rank", "out_rank", "norm", "q_bias", "k_bias")
    axes = {"skip": "H", "norm": "HP", "q_bias": "HRN", "k_bias": "HRN"}
    return Layer(
        norm1_D=block["norm1"]["scale"],
        in_MD=jnp.concatenate([flat(mixer[name]) for name in ("in_zx", "in_kq_angle", "in_dt_a_trap")]),
        dt_bias_H=mixer["dt_bias"],
        q_norm_N=mixer["q_norm"],
        k_norm_N=mixer["k_norm"],
        heads=Heads(**{f"{name}_{axes.get(name, 'HRP')}": mixer.get(name) for name in per_head}),
        out_DI=mixer["out"].reshape(-1, mixer["out"].shape[-1]).T.astype(dtype),
        norm2_D=block["norm2"]["scale"],
        value_gate_FD=jnp.concatenate([flat(mlp["value"]), flat(mlp["gate"])]),
        back_DF=flat(mlp["out"]),
    )


def step(config: ModelConfig, layer: Layer, residual_BD, state: State, start_B, *, interpret: object = None):
    """Return (residual_BD, state) of this layer after one token in every row."""
    dtype, how = DTYPES[config.compute_dtype], {"interpret": bool(interpret)}

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    def add(y, residual):
        return (rounded(y) + residual,)

    def gated(value, gate):
        # Round after every operation, as XLA does in `jax.nn.silu` of bfloat16.
        value, gate = rounded(value), rounded(gate)
        sigmoid = rounded(1 / rounded(1 + rounded(jnp.exp(-gate))))
        return (value * rounded(gate * sigmoid),)

    def added(name: str, x_BK, weight_MK):
        product = Product(config.d_model, (jnp.float32,), epilogue=add, vectors=(residual_BD,))
        ((y_BD,),) = project(x_BK, weight_MK, [product], name=name, **how)
        return y_BD

    tokens = tokens_of(config, layer, residual_BD, start_B, **how)
    norms = layer.q_norm_N, layer.k_norm_N
    run = functools.partial(kernels.normed_step, rotation=pairing(config), interpret=interpret)
    y_BLHP, state = run(tokens, layer.heads, state, norms)
    residual_BD = added("out", y_BLHP.reshape(len(residual_BD), -1), layer.out_DI)
    into = Product(config.d_ff, (dtype,), (0, config.d_ff), gated)
    ((f_BF,),) = project(residual_BD, layer.value_gate_FD, [into], layer.norm2_D, name="gate", **how)
    return added("back", f_BF, layer.back_DF), state


def tokens_of(config: ModelConfig, layer: Layer, residual_BD, start_B, *, interpret: bool) -> Tokens:
    """Compute what the op needs of a token. Queries and keys come before their norm, which the op's kernel applies."""
    size, dtype, float32 = sizes(config), DTYPES[config.compute_dtype], jnp.float32
    inner, shared = size.heads * size.head_dim, size.rank * size.groups * size.d_state
    looks_back, scalars = uses_previous(config.discretization), 2 * inner + 2 * shared + size.planes

    def angle(theta):
        return (jnp.pi * jnp.tanh(theta),)

    def numbers(dt, a, trap, dt_bias):
        dt, a = jax.nn.softplus(dt + dt_bias), -jnp.maximum(heavy_tail(a), config.a_floor)
        log_a, gamma, beta = DISCRETIZATIONS[config.discretization](dt, a, trap)
        return (dt, log_a, gamma, beta) if looks_back else (dt, log_a, gamma)

    firsts, outputs = tuple(scalars + i * size.heads for i in range(3)), (float32,) * (4 if looks_back else 3)
    products = [
        Product(inner, (dtype,)),
        Product(inner, (dtype,), (inner,)),
        Product(shared, (float32,), (2 * inner,)),
        Product(shared, (float32,), (2 * inner + shared,)),
        Product(size.planes, (float32,), (2 * inner + 2 * shared,), angle),
        Product(size.heads, outputs, firsts, epilogue=numbers, vectors=(layer.dt_bias_H,)),
    ]
    got = project(residual_BD, layer.in_MD, products, layer.norm1_D, name="in", interpret=interpret)
    (z,), (x,), (k,), (q,), (theta,), (dt, log_a, gamma, *beta) = got
    return as_tokens(size, z=z, x=x, k=k, q=q, theta=theta, dt=dt, log_a=log_a, gamma=gamma, beta=beta, start=start_B)


def as_tokens(size: Sizes, *, z, x, k, q, theta, dt, log_a, gamma, beta: list, start) -> Tokens:
    """Return the outputs of the in-projection, (B, columns) each, in the axes of the op."""
    keys, values = (-1, 1, size.rank, size.groups, size.d_state), (-1, 1, size.heads, size.head_dim)
    return Tokens(
        q_BLRGN=q.reshape(keys),
        k_BLRGN=k.reshape(keys),
        v_BLHP=x.reshape(values),
        dt_BLH=dt[:, None],
        log_a_BLH=log_a[:, None],
        gamma_BLH=gamma[:, None],
        beta_BLH=beta[0][:, None] if beta else None,
        angle_BLHS=theta[:, None, None],
        gate_BLHP=z.reshape(values),
        start_BL=start[:, None],
    )

"""AdamW or Muon, the schedule, and which parameters decay."""

import math

import jax
import jax.numpy as jnp
import optax

from mamba3_jax.config import Config, OptimizerConfig, check
from mamba3_jax.train.muon import Matrix, matrices, muon

# Fraction of the peak as a function of progress u in (0, 1], which begins when the warm-up ends.
SHAPES = {
    "cosine": lambda u, config: config.final + (1 - config.final) * (1 + jnp.cos(jnp.pi * u)) / 2,
    "wsd": lambda u, config: 1 - (1 - config.final) * _last(u, config.decay / (1 - config.warmup)),
    "constant": lambda u, config: jnp.ones_like(u),
}


def _last(u, part):
    """0 until the last `part` of the way, then linearly up to 1."""
    return jnp.clip((u - (1 - part)) / part, 0, 1)


def validate(config: OptimizerConfig) -> None:
    """Raise ValueError, naming the value and the wish."""
    check(config, "config.optimizer")
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name={config.name!r} is not one of {', '.join(OPTIMIZERS)}")
    if config.schedule not in SHAPES:
        raise ValueError(f"optimizer.schedule={config.schedule!r} is not one of {', '.join(SHAPES)}")
    if config.schedule == "wsd" and not 0 < config.decay <= 1 - config.warmup:
        raise ValueError(
            f"optimizer.decay={config.decay} is not a fraction of the steps left by warmup={config.warmup}"
        )


def schedule(config: OptimizerConfig, steps: int):
    """lr(t) of update t = 0..steps-1: linear up to the peak at t = W-1, then the shape, down to `final` at t = steps-1.

    W = warmup * steps. cosine: half a wave. wsd: the peak, then linear over the last decay * steps. The first update is
    not lost to a learning rate of zero, the last one is `final` exactly.
    """
    warm = round(config.warmup * steps)

    def learning_rate(t):
        done = jnp.asarray(t, jnp.float32) + 1
        rise = jnp.minimum(done / max(warm, 1), 1)
        u = jnp.clip((done - warm) / max(steps - warm, 1), 0, 1)
        return config.learning_rate * rise * SHAPES[config.schedule](u, config)

    return learning_rate


def decays(params):
    """Mark the parameters that weight decay shrinks: not dt_bias, A_log, D (here: skip), norms and biases.

    The biases of B and C (k_bias, q_bias) are biases, so are those of attention. Matrices, the embedding and the rank
    projections of MIMO (v_rank, gate_rank, out_rank) decay, as in the official code.
    """

    def decay(path, _):
        name = path[-1].key
        return not (name in ("scale", "skip", "a_log") or name.endswith(("bias", "norm")))

    return jax.tree_util.tree_map_with_path(decay, params)


def adamw(config: Config) -> optax.GradientTransformation:
    """Scale by Adam, in every parameter."""
    return optax.scale_by_adam(config.optimizer.b1, config.optimizer.b2, config.optimizer.eps)


def muon_and_adam(config: Config) -> optax.GradientTransformation:
    """Orthogonalise the layers' matrices, scale by Adam what is not one (`muon.matrices`)."""
    taken = matrices(config.model)
    is_leaf = lambda x: x is None or isinstance(x, Matrix)  # noqa: E731
    alone = jax.tree.map(lambda matrix: matrix or optax.MaskedNode(), taken, is_leaf=is_leaf)
    labels = jax.tree.map(lambda matrix: "muon" if matrix else "adam", taken, is_leaf=is_leaf)
    orthogonalised = muon(alone, config.optimizer.momentum, config.optimizer.eps)
    return optax.partition({"muon": orthogonalised, "adam": adamw(config)}, labels)


OPTIMIZERS = {"adamw": adamw, "muon": muon_and_adam}


def optimizer(config: Config) -> optax.GradientTransformation:
    """Clip by global norm, scale as `config.optimizer.name` says, decoupled decay on `decays`, `schedule`.

    The state has one structure for every config of one name, so a run can resume with another one.
    """
    settings = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(settings.clip or math.inf),
        OPTIMIZERS[settings.name](config),
        optax.add_decayed_weights(settings.weight_decay, decays),
        optax.scale_by_learning_rate(schedule(settings, config.train.steps)),
    )

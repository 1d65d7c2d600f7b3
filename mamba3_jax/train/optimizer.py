"""AdamW or Muon, the schedule, and which parameters decay."""

import math

import jax
import jax.numpy as jnp
import optax

from mamba3_jax.config import Config, OptimizerConfig, check
from mamba3_jax.train.muon import Matrix, matrices, muon

# The learning rate over its peak, as a function of progress u in (0, 1] since the end of the warm-up.
SHAPES = {
    "cosine": lambda u, config: config.final + (1 - config.final) * (1 + jnp.cos(jnp.pi * u)) / 2,
    "wsd": lambda u, config: 1 - (1 - config.final) * _last(u, config.decay / (1 - config.warmup)),
    "constant": lambda u, config: jnp.ones_like(u),
}


def _last(u, part):
    """Return 0 until the last `part` of the way, then rise linearly to 1."""
    return jnp.clip((u - (1 - part)) / part, 0, 1)


def validate(config: OptimizerConfig) -> None:
    """Raise ValueError, naming the value and the wish, for settings that do not exist or do not go together."""
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
    """Return lr(t) of update t = 0..steps-1: linear up to the peak at t = W-1, then a shape, which ends at t = steps-1.

    W = warmup * steps. The shape "cosine" is half a wave, "wsd" keeps the peak and falls linearly over the last
    decay * steps updates, "constant" keeps the peak. The first update's learning rate is not zero; the last one's is
    final * peak exactly, except with "constant".
    """
    warm = round(config.warmup * steps)

    def learning_rate(t):
        done = jnp.asarray(t, jnp.float32) + 1
        rise = jnp.minimum(done / max(warm, 1), 1)
        u = jnp.clip((done - warm) / max(steps - warm, 1), 0, 1)
        return config.learning_rate * rise * SHAPES[config.schedule](u, config)

    return learning_rate


def decays(params):
    """Mark the parameters that weight decay shrinks: all but dt_bias, A_log, D (here: skip), norms and biases.

    The biases of B and C (k_bias, q_bias) count as biases, and so do those of attention. Matrices, the embedding and
    the rank projections of MIMO (v_rank, gate_rank, out_rank) decay, as in the official code.
    """

    def decay(path, _):
        name = path[-1].key
        return not (name in ("scale", "skip", "a_log") or name.endswith(("bias", "norm")))

    return jax.tree_util.tree_map_with_path(decay, params)


def adamw(config: Config) -> optax.GradientTransformation:
    """Scale the gradient of every parameter by Adam; `optimizer` adds the weight decay."""
    return optax.scale_by_adam(config.optimizer.b1, config.optimizer.b2, config.optimizer.eps)


def muon_and_adam(config: Config) -> optax.GradientTransformation:
    """Orthogonalise the gradients of the layers' matrices (`muon.matrices`), and scale all others by Adam."""
    taken = matrices(config.model)
    is_leaf = lambda x: x is None or isinstance(x, Matrix)  # noqa: E731
    alone = jax.tree.map(lambda matrix: matrix or optax.MaskedNode(), taken, is_leaf=is_leaf)
    labels = jax.tree.map(lambda matrix: "muon" if matrix else "adam", taken, is_leaf=is_leaf)
    orthogonalised = muon(alone, config.optimizer.momentum, config.optimizer.eps)
    return optax.partition({"muon": orthogonalised, "adam": adamw(config)}, labels)


OPTIMIZERS = {"adamw": adamw, "muon": muon_and_adam}


def optimizer(config: Config) -> optax.GradientTransformation:
    """Clip by global norm, scale as `config.optimizer.name` says, decay what `decays` marks, multiply by `schedule`.

    The decay is decoupled. All configs with one `name` have states of one structure, so a run can resume with changed
    settings.
    """
    settings = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(settings.clip or math.inf),
        OPTIMIZERS[settings.name](config),
        optax.add_decayed_weights(settings.weight_decay, decays),
        optax.scale_by_learning_rate(schedule(settings, config.train.steps)),
    )

"""Muon: which parameters it takes, and which axes of each are a matrix's inputs and outputs."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers import MIXERS
from mamba3_jax.model import blocks, boxed_shapes
from mamba3_jax.train.flops import MATRICES

STACKED = ("layers", "pair")  # logical axes that only stack matrices, and are no side of one
# RMS of an update's entries, about that of AdamW's: one learning rate and one weight decay then suit both groups of
# parameters, and the search can begin at AdamW's (Moonlight, arXiv:2502.16982, section 2.2, takes 0.2).
RMS = 0.2


class Matrix(NamedTuple):
    """How a parameter is one or more matrices."""

    axes: MuonDimensionNumbers  # inputs and outputs; every other axis stacks matrices
    widths: tuple[int, ...] = ()  # of the matrices that lie side by side on the last axis; (): it is one matrix's


def matrices(config: ModelConfig):
    """Return the parameter tree with a `Matrix` where Muon takes a parameter, None where Adam does.

    Muon takes the matrices by which a layer multiplies every token (`Mixer.matrices`, and the feed-forward's), from or
    to the model's width: the axis `embed` is one side, and all axes before or after it are the other. Adam takes the
    embedding and the head, which belong to no layer, norms, biases, and parameters without an axis `embed` (the rank
    projections of MIMO).
    """
    mixers = blocks(config.pattern)

    def matrix(path, axes):
        segment, block, *rest = (part.key for part in path)
        if (segment, block) not in mixers:
            return None
        mixer = MIXERS[mixers[segment, block]]
        named, fused = (mixer.matrices, mixer.fused(config)) if rest[0] == "mixer" else (MATRICES, {})
        if rest[-1] not in named or "embed" not in axes:
            return None
        embed = axes.index("embed")
        others = tuple(axis for axis, name in enumerate(axes) if axis != embed and name not in STACKED)
        if not others:
            return None
        inputs, outputs = ((embed,), others) if embed < others[0] else (others, (embed,))
        return Matrix(MuonDimensionNumbers(inputs, outputs), tuple(fused.get(rest[-1], ())))

    axes = nn.get_partition_spec(boxed_shapes(config))
    return jax.tree_util.tree_map_with_path(lambda path, spec: matrix(path, tuple(spec)), axes)


def muon(matrices, momentum: float, eps: float) -> optax.GradientTransformation:
    """Orthogonalise the Nesterov momentum of every matrix on its own, and scale it to entries of RMS `RMS`.

    This is `optax.contrib.scale_by_muon`, except that matrices side by side in one parameter are split before it and
    joined again after it, so the state has one array for every parameter.

    Args:
        matrices: a `Matrix` for each of the parameters that Muon takes, without the others.
        momentum: of Nesterov's method.
        eps: keeps the norm that a matrix is divided by from being 0.
    """
    is_matrix = lambda x: isinstance(x, Matrix)  # noqa: E731
    over = lambda function, tree: jax.tree.map(function, matrices, tree, is_leaf=is_matrix)  # noqa: E731
    part = lambda m, x: jnp.split(x, np.cumsum(m.widths)[:-1].tolist(), axis=-1) if m.widths else [x]  # noqa: E731
    join = lambda m, parts: jnp.concatenate(parts, axis=-1) if m.widths else parts[0]  # noqa: E731
    axes = jax.tree.map(lambda m: [m.axes] * max(len(m.widths), 1), matrices, is_leaf=is_matrix)
    orthogonalise = scale_by_muon(beta=momentum, eps=eps, weight_dimension_numbers=lambda _: axes)

    def scale(m, x):
        # An orthogonal (n, m) matrix has entries of RMS 1 / sqrt(max(n, m)).
        sides = (math.prod(x.shape[axis] for axis in side) for side in m.axes)
        return RMS * math.sqrt(max(sides)) * x

    def update(grads, state: MuonState, params=None):
        del params
        parted = state._replace(mu=over(part, state.mu))
        updates, parted = orthogonalise.update(over(part, grads), parted)
        updates = over(lambda m, parts: join(m, [scale(m, x) for x in parts]), updates)
        return updates, parted._replace(mu=over(join, parted.mu))

    return optax.GradientTransformation(orthogonalise.init, update)

"""The base class of mixers. All that other modules need to know of a mixer are members of its class."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.official import Row
from mamba3_jax.ops import context
from mamba3_jax.ops.context import Context
from mamba3_jax.ops.einsum import einsum
from mamba3_jax.ops.sharded import sharded
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, ssm

# By config.remat: the residuals of the op that the backward pass keeps beside its inputs, by the names that kernels
# give them. Plain XLA gives no names, and so keeps none.
KEPT = {"op": (), "rotation": ("ssm_y", "ssm_states")}
OBSERVED = "intermediates"  # the collection of arrays that layers show to `mamba3_jax/analysis`


class Mixer(nn.Module):
    """y_BLD, state = mixer(x_BLD, state, start_BL), for any L: training, prefill and decoding are this one call.

    `state` None is the empty state. `start_BL` is true at the first token of a document, or None; no value and no
    gradient crosses it. The first axis of every array of the state is the batch.

    Axes of parameters have logical names (`sharding.RULES`). Weight decay leaves out parameters called skip, scale or
    a_log, and those whose name ends in bias or norm (`train/optimizer.py`). Muon takes the parameters in `matrices`
    that have an axis `embed`, the model's width; an axis `pair` is one over several matrices (`train/muon.py`).
    """

    config: ModelConfig

    letter: ClassVar[str]  # of a layer in `config.pattern`
    matrices: ClassVar[tuple[str, ...]]  # parameters that every token is multiplied by: 2 FLOPs for each entry
    splits_rows: ClassVar[bool] = False  # whether it runs rows that `context` splits over devices
    # The values that config fields must have for the official layer to compute the same; None: there is none.
    official: ClassVar[dict | None] = None

    def named(self, name: str, initializer, **axes: int):
        """Return a parameter whose axes are given by logical name and size."""
        return self.param(name, nn.with_logical_partitioning(initializer, tuple(axes)), tuple(axes.values()))

    def observe(self, **arrays) -> None:
        """Show arrays, by name, to a call that asks for the collection `OBSERVED`; other calls are not changed by it.

        `analysis.observe` says what each name means. Arrays that are None are left out.
        """
        for name, array in arrays.items():
            if array is not None:
                self.sow(OBSERVED, name, array)

    def context(self, x_BLD, state) -> Context | None:
        """Return how the tokens of a call lie over the mesh; None: rows are whole."""
        return length_context(self.config, x_BLD.shape[1], state)

    def op(self, rotation: str, over: Context | None):
        """Return `ssm` with the config's implementation, chunk and remat, divided over the mesh in context.

        Args:
            rotation: that of `ssm`.
            over: how the tokens lie over the mesh, from `context`.
        """
        config = self.config
        implementation = "recurrent" if self.is_initializing() else config.implementation or None
        how = {"rotation": rotation, "implementation": implementation, "chunk": config.chunk or None}

        def op(tokens, heads, state, along=None):
            run = functools.partial(ssm, **how, along=along)
            if config.remat in KEPT:
                run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(*KEPT[config.remat]))
            return run(tokens, heads, state)

        if over is not None:
            op = context.across(op, over, **how)
        return sharded(op, *nn.logical_to_mesh_axes(("batch", "heads")), over and over.axis)

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raise ValueError, naming the value and the wish, for sizes or choices that this mixer cannot have."""

    @staticmethod
    def empty_state(config: ModelConfig, batch: int, capacity: int):
        """Return the state before any token; one that grows with the tokens has room for `capacity` of them."""
        raise NotImplementedError

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        """Count the forward FLOPs of a token in a row of `length`, without those of `matrices`."""
        raise NotImplementedError

    @staticmethod
    def fused(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Return, for each parameter whose last axis holds several matrices side by side, their widths."""
        return {}

    @staticmethod
    def room(state) -> tuple | None:
        """Return how many tokens a state holds, an array, and how many fit in all; None: any number fits."""
        return None

    @staticmethod
    def memory(state):
        """Return the state matrix of a layer's state, (..., H, P, N) or one for all heads; None: it has none."""
        return None

    @staticmethod
    def official_rows(config: ModelConfig) -> dict[str, Row]:
        """Return where the official tensors of a layer, in their order, lie in our parameters, by name under `mixer.`.

        A mixer whose `official` is not None defines it.
        """
        raise NotImplementedError


def length_context(config: ModelConfig, length: int, state) -> Context | None:
    """Return how the tokens of a call lie over the mesh; None: rows are whole. After a state the layout is contiguous.

    Raises:
        ValueError: see `ops.context.divide`.
    """
    (axis,) = nn.logical_to_mesh_axes(("length",))
    return context.divide(axis, config.layout if state is None else "contiguous", length)


def both(x_BLD, pair_DC, dtype):
    """Return the products of x with the two matrices that share a parameter (D, 2, ...), as two arrays.

    They are computed apart: a kernel would need copies of the halves of one product, and their two gradients would be
    copied into one array. The copies took 3 of the 113 ms of a step (180M SISO on an H200). For a single token the cost
    is to read the weights, which one product does at once.
    """
    out = "hp"[: pair_DC.ndim - 2]
    if x_BLD.shape[1] == 1:
        return jnp.unstack(einsum(f"bld,dc{out}->blc{out}", x_BLD, pair_DC, dtype=dtype), axis=2)
    return [einsum(f"bld,d{out}->bl{out}", x_BLD, kernel_D, dtype=dtype) for kernel_D in jnp.unstack(pair_DC, axis=1)]


def head_count(config: ModelConfig) -> int:
    """Return H = expand D / P."""
    return config.expand * config.d_model // config.head_dim


def check_op(config: ModelConfig) -> None:
    """Raise ValueError for sizes or choices that no layer around `ssm` can have."""
    d_inner, heads = config.expand * config.d_model, head_count(config)
    if d_inner % config.head_dim or not heads:
        raise ValueError(f"{d_inner=} (expand * d_model) is not a positive multiple of {config.head_dim=}")
    if heads % config.n_groups:
        raise ValueError(f"{heads=} is not a multiple of {config.n_groups=}")
    check_dt(config)
    if config.implementation and config.implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{config.implementation=} is not '' or one of {sorted(IMPLEMENTATIONS)}")


def check_dt(config: ModelConfig) -> None:
    """Raise ValueError for an empty range of initial steps."""
    if config.dt_min > config.dt_max:
        raise ValueError(f"{config.dt_min=}, {config.dt_max=}: wanted dt_min <= dt_max")

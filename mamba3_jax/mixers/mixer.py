"""What a mixer is. All that the rest asks of one stands in its own file; `MIXERS` in `__init__.py` has it in a line."""

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

# By config.remat: what the backward pass keeps of the op beside its inputs, by the names that kernels give. What has no
# such names (plain XLA) keeps nothing.
KEPT = {"op": (), "rotation": ("ssm_y", "ssm_states")}
OBSERVED = "intermediates"  # the collection of what layers show of themselves, by `mamba3_jax/analysis`


class Mixer(nn.Module):
    """y_BLD, state = mixer(x_BLD, state, start_BL), for any L: training, prefill and decoding are this one call.

    `state` None is the empty state; `start_BL` is true at the first token of a document, or None, and no value or
    gradient crosses it. Every array of the state begins with the batch. Axes of parameters have logical names
    (`sharding.RULES`); parameters called skip, scale, a_log or ..bias, ..norm do not decay (`train/optimizer.py`). Of
    those in `matrices`, Muon takes what has an axis `embed`, the model's width, and takes an axis `pair` for several
    matrices (`train/muon.py`).
    """

    config: ModelConfig

    letter: ClassVar[str]  # of a layer in `config.pattern`
    matrices: ClassVar[tuple[str, ...]]  # parameters that every token is multiplied by: 2 FLOPs an entry
    splits_rows: ClassVar[bool] = False  # it asks `context` where its tokens lie, and passes on what the next ones need
    # What fields must be for the official layer to compute the same; None: there is no official layer.
    official: ClassVar[dict | None] = None

    def named(self, name: str, initializer, **axes: int):
        """Return a parameter whose axes are given by logical name and size."""
        return self.param(name, nn.with_logical_partitioning(initializer, tuple(axes)), tuple(axes.values()))

    def observe(self, **arrays) -> None:
        """Show arrays, by name, to a call that asks for the collection `OBSERVED`; any other program is the same.

        `analysis.observe` says which names mean what. What is None is not there.
        """
        for name, array in arrays.items():
            if array is not None:
                self.sow(OBSERVED, name, array)

    def context(self, x_BLD, state) -> Context | None:
        """Return how the tokens of a call lie over the mesh; None: rows are whole."""
        return length_context(self.config, x_BLD.shape[1], state)

    def op(self, rotation: str, over: Context | None):
        """Return `ssm` as the config has it run: by what, in which chunks, over the mesh, keeping what for backward."""
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
        """Make the state before any token, with room for `capacity` of them where it grows with their number."""
        raise NotImplementedError

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        """Count the forward FLOPs a token, in rows of `length`, beside those of `matrices`."""
        raise NotImplementedError

    @staticmethod
    def fused(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """List the widths of the matrices that share the last axis of a parameter, by its name."""
        return {}

    @staticmethod
    def room(state) -> tuple | None:
        """Return (tokens held, an array; tokens that fit in all) of a state, None where any number fits."""
        return None

    @staticmethod
    def memory(state):
        """Return the matrix that a layer remembers by, (..., H, P, N) or one for all heads, None where it has none."""
        return None

    @staticmethod
    def official_rows(config: ModelConfig) -> dict[str, Row]:
        """List the official tensors of a layer in their order: name under `mixer.` -> where it lies in our parameters.

        Needed where `official` is not None.
        """
        raise NotImplementedError


def length_context(config: ModelConfig, length: int, state) -> Context | None:
    """Return how tokens of a call lie over the mesh; None: rows are whole. Those that go on from a state lie in order.

    Raises:
        ValueError: see `ops.context.divide`.
    """
    (axis,) = nn.logical_to_mesh_axes(("length",))
    return context.divide(axis, config.layout if state is None else "contiguous", length)


def both(x_BLD, pair_DC, dtype):
    """Return x W of the two matrices that share a parameter (D, 2, ...), each as an array of its own.

    One product leaves halves of an array, which a kernel only takes as copies, and two gradients to be copied into one:
    3 ms of a step of 113 (180M SISO on an H200). Of a single token the weights are the cost: one product reads them.
    """
    out = "hp"[: pair_DC.ndim - 2]
    if x_BLD.shape[1] == 1:
        return jnp.unstack(einsum(f"bld,dc{out}->blc{out}", x_BLD, pair_DC, dtype=dtype), axis=2)
    return [einsum(f"bld,d{out}->bl{out}", x_BLD, kernel_D, dtype=dtype) for kernel_D in jnp.unstack(pair_DC, axis=1)]


def head_count(config: ModelConfig) -> int:
    """H = expand D / P."""
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
    """Raise ValueError for a range of initial steps that is none."""
    if config.dt_min > config.dt_max:
        raise ValueError(f"{config.dt_min=}, {config.dt_max=}: wanted dt_min <= dt_max")

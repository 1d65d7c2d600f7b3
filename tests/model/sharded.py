"""Run by test_sharding.py in a process of its own with 4 devices: prints one line a mesh, or raises."""

import dataclasses
import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel, init_params
from mamba3_jax.ops.attention import attend, over_mesh
from mamba3_jax.sharding import batch_sharding, make_mesh, param_shardings, state_shardings, using
from tests.helpers import rel_rms

CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    pattern="MAG1",
    d_ff=16,
    d_state=8,
    head_dim=8,
    attn_heads=4,
    attn_head_dim=4,
    chunk=4,
    delta_head_dim=4,
    embedding_std=1.0,  # a residual stream of small numbers, and what norms make of it, would be mostly roundings
)


SWITCHED = dataclasses.replace(
    CONFIG, pattern="M", angles="quaternion", conv=4, a_form="learned", mimo_rank=2, n_groups=2
)


def step(config, params, tokens_BL, state):
    """Loss, gradients, logits and state of a batch that continues `state`."""

    def loss(params):
        logits_BLV, new_state = LanguageModel(config).apply({"params": params}, tokens_BL, state)
        return jnp.mean(jnp.square(logits_BLV)), (logits_BLV, new_state)

    (_, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return outputs, gradient


def attends(mesh):
    """`ops.attention.over_mesh`: rows and heads as they lie on devices, and documents with their rows."""
    q_BLHE = jax.random.normal(jax.random.key(3), (8, 6, 8, 4))
    k_BLKE, v_BLKE = jax.random.normal(jax.random.key(4), (2, 8, 6, 4, 4))
    first_BL = jnp.where(jnp.arange(6) < 3, 0, 3) * (jnp.arange(8)[:, None] % 2)
    with using(mesh):
        split = nn.logical_to_mesh_axes(("batch", "heads"))

        def run(q_BLHE, k_BLKE, v_BLKE, first_BL):
            one = lambda *arrays: attend(*arrays, jnp.broadcast_to(jnp.arange(6), arrays[0].shape[:2]))  # noqa: E731
            return over_mesh(one, *split)(q_BLHE, k_BLKE, v_BLKE, first_BL)

        got = jax.jit(run)(q_BLHE, k_BLKE, v_BLKE, first_BL)
    want = attend(q_BLHE, k_BLKE, v_BLKE, first_BL, jnp.broadcast_to(jnp.arange(6), (8, 6)))
    assert rel_rms(got, want) < 1e-5
    assert got.sharding.is_equivalent_to(jax.NamedSharding(mesh, PartitionSpec(split[0], None, split[1])), 4)


def main(spec: str):
    """Sharded = single device, and it is sharded."""
    mesh = make_mesh(spec)
    attends(mesh)
    # Of heads apart there is more that can go wrong; what is rows apart is so of every layer.
    configs = (CONFIG, SWITCHED) if "tensor" in mesh.axis_names else (CONFIG,)
    worst = max(check(mesh, config) for config in configs)
    print(spec, worst)


def check(mesh, config: ModelConfig) -> float:
    """Return the largest error of what a model gives."""
    params = init_params(config, jax.random.key(0))
    tokens_BL = jax.random.randint(jax.random.key(1), (8, 8), 0, CONFIG.vocab_size)
    state = LanguageModel(config).empty_state(8, 8)
    run = jax.jit(functools.partial(step, config))
    want = run(params, tokens_BL, state)

    placed = (
        jax.device_put(params, param_shardings(config, mesh)),
        jax.device_put(tokens_BL, batch_sharding(mesh)),
        jax.device_put(state, state_shardings(state, mesh)),
    )
    with using(mesh):
        got = run(*placed)
    worst = max(jax.tree.leaves(jax.tree.map(rel_rms, got, want)))
    assert worst < 1e-5, worst

    (logits_BLV, _), gradient = got
    heads = placed[0]["segment_0"]["block_0"]["mixer"]["in_zx"]
    split_batch, split_heads = PartitionSpec("data"), PartitionSpec(None, None, None, "tensor")
    if "data" in mesh.axis_names:
        assert logits_BLV.sharding.is_equivalent_to(jax.NamedSharding(mesh, split_batch), 3), logits_BLV.sharding
        assert heads.sharding.is_fully_replicated
    else:
        wanted = jax.NamedSharding(mesh, split_heads)
        assert heads.sharding.is_equivalent_to(wanted, 5), heads.sharding
        got_heads = gradient["segment_0"]["block_0"]["mixer"]["in_zx"]
        assert got_heads.sharding.is_equivalent_to(wanted, 5), got_heads.sharding
    return worst


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)

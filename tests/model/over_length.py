"""Run by test_context.py in a process of its own with 8 devices: prints a line a case, or raises."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers import MIXERS, Mamba2
from mamba3_jax.model import LanguageModel, init_params
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from mamba3_jax.sharding import make_mesh, param_shardings, using
from tests.helpers import rel_rms

BATCH, LENGTH = 2, 32
SIZES = ModelConfig(
    vocab_size=32,
    d_model=16,
    d_ff=16,
    d_state=8,
    head_dim=8,
    attn_heads=4,
    attn_kv_heads=2,
    attn_head_dim=4,
    attn_rope_theta=100.0,
    chunk=4,
    delta_head_dim=4,
    mamba1_state=4,
)
HYBRID = {"pattern": "MMA"}
SWITCHED = {"pattern": "M", "angles": "quaternion", "conv": 4, "mimo_rank": 2}
QUICK = {"hybrid": ({"sequence": 4}, HYBRID | {"layout": "zigzag"})}
FULL = {
    "hybrid_contiguous": ({"sequence": 8}, HYBRID),
    "hybrid_over_all": ({"data": 2, "sequence": 2, "tensor": 2}, HYBRID | {"layout": "zigzag"}),
    "mimo": ({"sequence": 4}, {"pattern": "M", "mimo_rank": 2, "out_norm": True, "layout": "zigzag"}),
    "mamba2": ({"data": 2, "sequence": 4}, {"pattern": "2"}),
    "quaternions": ({"sequence": 4}, SWITCHED | {"layout": "zigzag"}),
    "others": ({"sequence": 4}, {"pattern": "G1", "layout": "zigzag"}),
    "others_contiguous": ({"data": 2, "sequence": 4}, {"pattern": "G1"}),
    "kernels": ({"sequence": 2}, {"pattern": "M", "remat": "rotation", "implementation": "triton"}),
    "tpu_kernels": ({"sequence": 2}, {"pattern": "M", "remat": "rotation", "implementation": "mosaic_tpu"}),
    "carried": ({"sequence": 4}, {"pattern": "MA2G1"}),
    "block": ({"fsdp": 2, "sequence": 2}, HYBRID | {"remat": "block"}),
    "op": ({"sequence": 2}, HYBRID | {"remat": "op", "layout": "zigzag"}),
}


def mesh_of(sizes: dict[str, int]):
    """A mesh of the first devices, as many as its axes have."""
    spec = ",".join(f"{axis}:{size}" for axis, size in sizes.items())
    return make_mesh(spec, jax.devices()[: math.prod(sizes.values())])


def starts():
    """Documents over several devices, at the first token of one and at the last."""
    start_BL = np.zeros((BATCH, LENGTH), bool)
    start_BL[0, [0, 8, 15, 16]] = True
    start_BL[1, 13] = True
    return start_BL


def step(config, params, tokens_BL, start_BL, state):
    """Return logits and state, and the gradients of a loss that weighs all logits differently."""

    def loss(params):
        logits_BLV, after = LanguageModel(config).apply({"params": params}, tokens_BL, state, start_BL)
        weights_BLV = jnp.cos(jnp.arange(logits_BLV.size, dtype=jnp.float32)).reshape(logits_BLV.shape)
        return jnp.mean(weights_BLV * logits_BLV), (logits_BLV, after)

    (_, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return outputs, gradient


def worst(name: str) -> float:
    """Return the largest error of what a model gives over a mesh, parameters in their parts too.

    The rows of "carried" go on from those before, all others begin.
    """
    sizes, changes = (QUICK | FULL)[name]
    config = dataclasses.replace(SIZES, **changes)
    params = init_params(config, jax.random.key(0))
    tokens_BL = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, config.vocab_size)
    run, state = jax.jit(functools.partial(step, config)), None
    if name == "carried":
        (_, state), _ = run(params, tokens_BL, starts(), LanguageModel(config).empty_state(BATCH, 2 * LENGTH))
    want, mesh = run(params, tokens_BL, starts(), state), mesh_of(sizes)
    params = jax.device_put(params, param_shardings(config, mesh))
    with using(mesh):
        got = run(params, tokens_BL, starts(), state)
    assert got[0][0].sharding.shard_shape(got[0][0].shape)[1] == LENGTH // sizes["sequence"]
    return max(jax.tree.leaves(jax.tree.map(rel_rms, got, want)))


def refusal():
    """Print what a mixer says that does not ask where its tokens lie."""

    class Plain(Mamba2):
        splits_rows = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MIXERS, "mamba2", Plain)
        model = LanguageModel(dataclasses.replace(SIZES, pattern="2"))
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        with using(mesh_of({"sequence": 4})):
            try:
                jax.eval_shape(model.apply, params, jnp.zeros((1, 8), jnp.int32))
            except ValueError as error:
                print(error)


def main(which: str):
    for name in ("triton", "mosaic_tpu"):
        IMPLEMENTATIONS[name] = functools.partial(IMPLEMENTATIONS[name], interpret=True)
    for name in {"quick": QUICK, "full": FULL}[which]:
        print(name, worst(name))
    if which == "quick":
        refusal()


if __name__ == "__main__":
    main(*sys.argv[1:])

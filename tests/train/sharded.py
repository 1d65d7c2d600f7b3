"""Run by test_muon.py in a process of its own with 8 devices: prints one line a mesh, or raises."""

import sys

import jax
from jax.sharding import PartitionSpec

from mamba3_jax.sharding import make_mesh, using
from mamba3_jax.train.step import state_shapes, update
from tests.helpers import rel_rms
from tests.train.test_step import PARTS, fresh
from tests.train.tiny import get_config, random_params


def main(spec: str):
    """Two updates of Muon on a mesh are those of one device, and its momentum lies where the parameters do."""
    config = get_config()
    config.optimizer.name, config.model.d_ff = "muon", 16
    grads = [random_params(config, seed) for seed in (1, 2)]

    def run(step, state):
        for grad in grads:
            state, _ = step(state, grad)
        return state.params, state.opt_state

    step, state = lambda state, grads: update(config, state, grads, PARTS), fresh(config)
    want = run(jax.jit(step), state)

    mesh = make_mesh(spec)
    shardings = jax.tree.map(lambda shape: shape.sharding, state_shapes(config, mesh))
    momentum = shardings.opt_state[1].inner_states["muon"].inner_state.mu
    axis = "tensor" if "tensor" in spec else None
    assert momentum["segment_0"]["block_0"]["mixer"]["in_zx"].spec == PartitionSpec(None, None, None, axis, None)
    with using(mesh):
        got = run(jax.jit(step, out_shardings=(shardings, None)), jax.device_put(state, shardings))
    worst = max(jax.tree.leaves(jax.tree.map(rel_rms, got, want)))
    assert worst < 1e-4, worst
    print(spec, worst)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)

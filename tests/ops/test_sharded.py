"""The op over several devices is the op on one: values, every gradient, packed rows and a carried state."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel
from mamba3_jax.ops.kernels import IMPLEMENTATIONS as of_kernels
from mamba3_jax.ops.sharded import sharded
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, ssm
from tests.helpers import devices


@pytest.mark.cpu
@pytest.mark.full
def test_several_devices_compute_what_one_does():
    command = [sys.executable, "-m", "tests.ops.over_devices"]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "cross_entropy",
        "look_up",
        "a_group_on_two_devices 4 21 1 4",
        "one_row 1 21 2 4",
        "mamba2 2 21 2 4",
        "kernels 2 21 2 4",
        "kernels_mimo 2 21 2 4",
        "tpu_kernels 2 21 2 4",
        "tpu_kernels_mimo 1 21 2 4",
        "tpu_rows 1 21 4 4",
        "tpu_decode 2 1 2 4",
        "tpu_decode_mimo 1 2 2 4",
        "caught",
        "n_heads=3 is not a multiple of the mesh's tensor=2",
    ]


def test_without_a_mesh_it_is_the_op_itself():
    assert sharded(ssm, "data", "tensor") is ssm


GPU = ("NVIDIA H200", None, "gpu", "cuda", ("mamba3_scan", "mamba3_value_gradient"))
TPU = ("TPU v5 lite", 1, "tpu", "tpu", ('"mamba3_tpu_scan"', '"mamba3_tpu_scan_back"'))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize(
    "axes",
    [{}, {"batch": "data", "heads": "tensor"}, {"batch": "data", "length": "tensor"}],
    ids=["unknown", "known", "length"],
)
@pytest.mark.parametrize(("kind", "cores", "backend", "platform", "kernels"), [GPU, TPU], ids=["gpu", "tpu"])
def test_training_on_several_devices_is_by_kernels(kind, cores, backend, platform, kernels, axes, monkeypatch):
    """By default, where the model knows the mesh's axes; else XLA would divide the op, which it can in plain code."""
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=backend)
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    for name, run in of_kernels.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, run)  # not interpreted
    model = LanguageModel(ModelConfig(d_model=128, d_state=64, pattern="M"))
    tokens_BL, start_BL = np.zeros((2, 96), np.int32), np.zeros((2, 96), bool)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens_BL))

    def loss(params):
        return jnp.sum(model.apply(params, tokens_BL, None, start_BL)[0])

    with use_abstract_mesh(mesh), nn.logical_axis_rules(tuple(axes.items())):
        text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=(platform,)).as_text()
    assert [name in text for name in kernels] == [bool(axes)] * 2

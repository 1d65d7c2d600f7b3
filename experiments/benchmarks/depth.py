"""Compile time and program size of a training step's loss and gradient against the number of layers.

    python -m experiments.benchmarks.depth

Layers are scanned over the repeating unit of the pattern, so a deeper model is the same program with a longer loop.
Nothing is run and no parameter is made: shapes are enough.
"""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import common
from launch.provenance import provenance
from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel, boxed_shapes

LAYERS = (2, 8, 24, 48)
PATTERNS = {"SISO": ("M", 0), "MIMO R=4": ("M", 4), "hybrid": ("MA", 0)}  # repeated unit, MIMO rank
LENGTH = 256

FLAGS = flags.FLAGS


def model_config(unit: str, rank: int, layers: int) -> ModelConfig:
    """Return a small model: its depth is what matters."""
    sizes = {"d_model": 64, "d_ff": 128, "d_state": 32, "head_dim": 32, "attn_head_dim": 32}
    return ModelConfig(pattern=unit * (layers // len(unit)), mimo_rank=rank, **sizes)


def row_of(name: str, layers: int) -> dict:
    """Trace, lower and compile the loss and its gradient at one depth."""
    config = model_config(*PATTERNS[name], layers)
    model, params = LanguageModel(config), nn.meta.unbox(boxed_shapes(config))
    tokens_BL = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)

    def loss(params, tokens_BL):
        logits_BLV, _ = model.apply({"params": params}, tokens_BL)
        return -jnp.mean(jax.nn.log_softmax(logits_BLV)[..., 0])

    begin = time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, tokens_BL)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = {"trace_s": traced - begin, "compile_s": time.perf_counter() - traced}
    return {"model": name, "layers": layers, **seconds, "hlo_instructions": instructions(compiled.as_text())}


def instructions(hlo: str) -> int:
    """Instructions of a compiled program, those of its fusions and loops included."""
    return sum(" = " in line for line in hlo.splitlines())


COLUMNS = {
    "model": "model",
    "layers": "layers",
    "trace, s": "trace_s",
    "compile, s": "compile_s",
    "HLO instructions": "hlo_instructions",
}


def main(argv):
    del argv
    jax.config.update("jax_enable_compilation_cache", False)
    depths, origin = common.numbers("depths"), provenance()
    rows = [row_of(name, layers) for name in FLAGS.models for layers in depths]
    print(common.table(rows, COLUMNS))
    print(common.write(f"depth_{jax.default_backend()}", origin, rows, FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_multi_enum("models", list(PATTERNS), list(PATTERNS), "which patterns")
    flags.DEFINE_list("depths", [str(layers) for layers in LAYERS], "numbers of layers")
    common.define_result()
    app.run(main, flags_parser=common.parse)

"""The other side of layer.py: one Mamba-3 layer of the package `mamba3-jax`, in an environment that has it and not us.

Run as a script by that environment's Python (its package has our package's name, so the two never share a process):

    python peer.py CONFIG.json        the sizes of `Layer`, chunks to choose from, and a path for the results to compare

It builds the layer with the weights both sides draw from one seed, picks the chunk size that is fastest for each task,
writes its output, input gradient and first decode step, and then answers every line on standard input with one on
standard output: {"time": "forward", "calls": 3} -> {"seconds": 0.12}.
"""

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of one layer and of the input it is timed on."""

    batch: int = 2
    length: int = 2048
    d_model: int = 256
    d_state: int = 64
    head_dim: int = 64
    expand: int = 2
    rank: int = 0  # 0: SISO, else MIMO

    @property
    def heads(self) -> int:
        return self.expand * self.d_model // self.head_dim


def weights(layer: Layer) -> dict[str, np.ndarray]:
    """Return the layer's tensors by official name, from a fixed seed: nothing is at a value that hides a mistake."""
    random = np.random.default_rng(0)
    rank, heads, d_inner = max(layer.rank, 1), layer.heads, layer.heads * layer.head_dim
    columns = 2 * d_inner + 2 * rank * layer.d_state + 3 * heads + layer.d_state // 4
    dt = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), heads))

    def near(value, *shape):
        return value + 0.1 * random.standard_normal(shape)

    tensors = {
        "dt_bias": dt + np.log(-np.expm1(-dt)),
        "B_bias": near(1, heads, rank, layer.d_state),
        "C_bias": near(1, heads, rank, layer.d_state),
        "D": near(1, heads),
        "in_proj.weight": random.uniform(-1, 1, (columns, layer.d_model)) / layer.d_model**0.5,
        "B_norm.weight": near(1, layer.d_state),
        "C_norm.weight": near(1, layer.d_state),
        "out_proj.weight": random.uniform(-1, 1, (layer.d_model, d_inner)) / d_inner**0.5,
    }
    if layer.rank:
        for name, value in (("mimo_x", 1 / rank), ("mimo_z", 1), ("mimo_o", 1 / rank)):
            tensors[name] = near(value, heads, rank, layer.head_dim)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def activations(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """x_BLD and the gradient of the output, dy_BLD."""
    x_BLD, dy_BLD = np.random.default_rng(1).standard_normal((2, layer.batch, layer.length, layer.d_model), np.float32)
    return x_BLD, dy_BLD


def build(layer: Layer, chunk: int):
    """Return the peer's mixer with our weights, split into its definition and its arrays."""
    from flax import nnx

    from mamba3_jax import Mamba3Config, Mamba3Mixer

    config = Mamba3Config(
        hidden_size=layer.d_model,
        state_size=layer.d_state,
        head_dim=layer.head_dim,
        expand=layer.expand,
        num_hidden_layers=1,
        chunk_size=chunk,
        is_mimo=layer.rank > 0,
        mimo_rank=max(layer.rank, 1),
    )
    mixer = Mamba3Mixer(config, layer_idx=0, rngs=nnx.Rngs(0))
    for name, tensor in weights(layer).items():
        module, _, linear = name.partition(".")
        if module.endswith("_proj"):
            getattr(mixer, module).kernel[...] = tensor.T
        else:
            variable = getattr(getattr(mixer, module), linear) if linear else getattr(mixer, module)
            variable[...] = tensor
    definition, arrays = nnx.split(mixer)
    return definition, arrays, config


def whole_row(layer: Layer, chunk: int) -> dict:
    """Forward, and forward with the gradient of parameters and input: name -> (compiled function, its arguments)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    definition, arrays, _ = build(layer, chunk)
    x_BLD, dy_BLD = map(jnp.asarray, activations(layer))

    def forward(arrays, x_BLD):
        return nnx.merge(definition, arrays)(x_BLD)

    def backward(arrays, x_BLD, dy_BLD):
        def loss(arrays, x_BLD):
            return jnp.sum(forward(arrays, x_BLD)[0] * dy_BLD)

        return jax.value_and_grad(loss, argnums=(0, 1))(arrays, x_BLD)

    return {
        "forward": (jax.jit(forward).lower(arrays, x_BLD).compile(), (arrays, x_BLD)),
        "forward+backward": (jax.jit(backward).lower(arrays, x_BLD, dy_BLD).compile(), (arrays, x_BLD, dy_BLD)),
    }


def decode(layer: Layer):
    """One token after another through the jitted step, which gives its state away each time."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mamba3_jax import create_empty_cache

    definition, arrays, config = build(layer, 64)
    cache = create_empty_cache(config, layer.batch)
    carried = [tuple(each[0] for each in (cache.angle_states, cache.ssm_states, cache.k_states, cache.v_states))]
    token_B1D = jnp.asarray(activations(layer)[0][:, :1])
    step = jax.jit(lambda arrays, x, cache: nnx.merge(definition, arrays)(x, cache), donate_argnums=2)

    def call():
        y_B1D, carried[0] = step(arrays, token_B1D, carried[0])
        return y_B1D, carried[0]

    return call


def seconds_a_call(function, calls: int) -> float:
    """As `common.seconds_a_call`, which this environment cannot import."""
    import jax

    begin = time.perf_counter()
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls


def main():
    from importlib import metadata

    import jax

    config = json.loads(Path(sys.argv[1]).read_text())
    layer = Layer(**config["layer"])
    candidates = {chunk: whole_row(layer, chunk) for chunk in config["chunks"]}
    calls, chunks, memory, results = {"decode": decode(layer)}, {}, {}, {}
    for what in ("forward", "forward+backward"):  # each at the chunk size that suits it best
        timed = {}
        for chunk, compiled in candidates.items():
            function = partial(compiled[what][0], *compiled[what][1])
            results[what] = function()
            timed[min(seconds_a_call(function, 1) for _ in range(2))] = (chunk, function)
        chunks[what], calls[what] = timed[min(timed)]
        memory[what] = candidates[chunks[what]][what][0].memory_analysis().temp_size_in_bytes / 2**20

    y_B1D = np.asarray(calls["decode"]()[0])  # the first step, from the empty state
    np.savez(config["results"], y_BLD=results["forward"][0], dx_BLD=results["forward+backward"][1][1], y_B1D=y_B1D)
    version = metadata.version("mamba3-jax")
    report = {"version": version, "jax": jax.__version__, "chunk": chunks, "temp_mib": memory}
    print(json.dumps(report, allow_nan=False), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        report = {"seconds": seconds_a_call(calls[asked["time"]], asked["calls"])}
        print(json.dumps(report, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()

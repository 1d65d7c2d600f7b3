"""One Mamba-3 layer against the package `mamba3-jax` 1.0.1, in one run on one machine.

    python3 -m venv build/peer && build/peer/bin/pip install mamba3-jax==1.0.1 jax==0.10.2
    python -m experiments.benchmarks.layer --peer_python=build/peer/bin/python

Both get the same weights and inputs, and their outputs, input gradients and first decode steps must agree before
anything is timed. Their batches of calls alternate, so that what else the machine does falls on both. float32, batch 2,
2,048 tokens, d_model 256, d_state 64, head_dim 64; SISO and MIMO of rank 4; forward, forward with the gradient of
parameters and input, and one step of decoding. The peer runs each at the fastest of several chunk sizes. Takes under
four minutes on two cores.
"""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import common
from experiments.benchmarks.peer import Layer, activations, weights
from launch.provenance import provenance
from mamba3_jax.config import ModelConfig
from mamba3_jax.convert import to_params
from mamba3_jax.mixers.mamba3 import Mamba3

CREATE = __doc__.splitlines()[2]
PEER = Path(__file__).with_name("peer.py")
LAYERS = {"SISO": Layer(), "MIMO R=4": Layer(rank=4)}
PEER_CHUNKS = {"SISO": [32, 64, 128], "MIMO R=4": [8, 16, 32]}
BATCH_SECONDS = {"forward": 0.3, "forward+backward": 0.5, "decode": 0.1}
CHECKED = {"forward": "y_BLD", "forward+backward": "dx_BLD", "decode": "y_B1D"}  # what a row's difference is of
TOLERANCE = 2e-5  # float32, two summation orders over up to 2,048 tokens

FLAGS = flags.FLAGS


def model_config(layer: Layer, chunk: int = 0) -> ModelConfig:
    """Return the one-layer model whose mixer is timed."""
    return ModelConfig(
        vocab_size=8,
        d_model=layer.d_model,
        pattern="M",
        d_state=layer.d_state,
        head_dim=layer.head_dim,
        expand=layer.expand,
        mimo_rank=layer.rank,
        chunk=chunk,
    )


def our_params(layer: Layer) -> dict:
    """`peer.weights` as our mixer's parameters, through the converter of official checkpoints."""
    config = model_config(layer)
    outer = {
        "backbone.embedding.weight": np.zeros((config.vocab_size, config.d_model), np.float32),
        "backbone.norm_f.weight": np.ones(config.d_model, np.float32),
        "backbone.layers.0.norm.weight": np.ones(config.d_model, np.float32),
    }
    outer["lm_head.weight"] = outer["backbone.embedding.weight"]
    mixer = {f"backbone.layers.0.mixer.{name}": tensor for name, tensor in weights(layer).items()}
    params = to_params(outer | mixer, config)["segment_0"]["block_0"]["mixer"]
    return jax.tree.map(lambda stacked: jnp.asarray(stacked[0]), params)


class Ours:
    """Our layer, compiled: what is timed by name, its memory, its output and input gradient."""

    def __init__(self, layer: Layer, chunk: int):
        config = model_config(layer, chunk)
        mixer, params = Mamba3(config), our_params(layer)
        x_BLD, dy_BLD = map(jnp.asarray, activations(layer))

        def forward(params, x_BLD, state=None):
            return mixer.apply({"params": params}, x_BLD, state)

        def backward(params, x_BLD, dy_BLD):
            def loss(params, x_BLD):
                return jnp.sum(forward(params, x_BLD)[0] * dy_BLD)

            return jax.value_and_grad(loss, argnums=(0, 1))(params, x_BLD)

        whole = {"forward": (forward, (params, x_BLD)), "forward+backward": (backward, (params, x_BLD, dy_BLD))}
        compiled = {what: jax.jit(function).lower(*given).compile() for what, (function, given) in whole.items()}
        self.temp_mib = {what: common.temp_mib(each) for what, each in compiled.items()}
        self.calls = {what: partial(compiled[what], *given) for what, (_, given) in whole.items()}

        step = jax.jit(forward, donate_argnums=2)
        state, token_B1D = Mamba3.empty_state(config, layer.batch, 0), x_BLD[:, :1]

        def decode():
            nonlocal state
            y_B1D, state = step(params, token_B1D, state)
            return y_B1D, state

        self.calls["decode"] = decode

    def results(self) -> dict[str, np.ndarray]:
        _, (_, dx_BLD) = self.calls["forward+backward"]()
        y_B1D = np.asarray(self.calls["decode"]()[0])  # the first step, from the empty state
        return {"y_BLD": self.calls["forward"]()[0], "dx_BLD": dx_BLD, "y_B1D": y_B1D}

    def seconds(self, what: str, calls: int) -> float:
        return common.seconds_a_call(self.calls[what], calls)


class Peer:
    """The peer's process: `about` is what it said of itself, `results` what it computed."""

    def __init__(self, process: subprocess.Popen, results: Path):
        self.process = process
        self.about = self.answer()
        with np.load(results) as arrays:
            self.results = dict(arrays)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer stopped with exit code {self.process.wait()}; its error is above")
        return json.loads(line)

    def seconds(self, what: str, calls: int) -> float:
        print(json.dumps({"time": what, "calls": calls}, allow_nan=False), file=self.process.stdin, flush=True)
        return self.answer()["seconds"]


@contextmanager
def started_peer(python: str, layer: Layer, chunks: list[int]) -> Iterator[Peer]:
    """Run peer.py by the interpreter `python`; all it is given is a file of sizes."""
    with tempfile.TemporaryDirectory() as directory:
        config, results = Path(directory) / "config.json", Path(directory) / "results.npz"
        given = {"layer": dataclasses.asdict(layer), "chunks": chunks, "results": str(results)}
        config.write_text(json.dumps(given, allow_nan=False))
        command = [python, "-E", str(PEER), str(config)]  # -E: a PYTHONPATH to this repository has its mamba3_jax
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=directory, **pipes) as process:
            try:
                yield Peer(process, results)
            finally:
                process.stdin.close()
                process.terminate()


def rows_of(name: str, layer: Layer, ours: Ours, peer: Peer | None, rounds: int) -> list[dict]:
    """Check against the peer, then time the two by turns; one row a task."""
    sides, errors = {"ours": ours}, {}
    if peer is not None:
        sides["peer"] = peer
        got = ours.results()
        errors = {array: common.rel_rms(got[array], peer.results[array]) for array in got}
        common.require(errors, TOLERANCE, f"{name}, ours against the peer")
    rows = []
    for what, batch_seconds in BATCH_SECONDS.items():
        clocks = {}
        for side, program in sides.items():
            program.seconds(what, 2)  # warm up
            calls = common.calls_for(program.seconds(what, 1), batch_seconds)
            clocks[side] = partial(program.seconds, what, calls)
        timings = common.interleave(clocks, rounds)
        error = errors.get(CHECKED[what])
        row = {"layer": name, "what": what, "error": error, "ours_temp_mib": ours.temp_mib.get(what)}
        for side, timing in timings.items():
            row |= {f"{side}_ms": timing.median * 1e3, f"{side}_best_ms": timing.best * 1e3}
        if peer is not None:
            row["ratio"] = row["peer_ms"] / row["ours_ms"]
            row["best_ratio"] = row["peer_best_ms"] / row["ours_best_ms"]
            row["peer_temp_mib"] = peer.about["temp_mib"].get(what)
            row["peer_chunk"] = peer.about["chunk"].get(what)
        rows.append(row)
    return rows


COLUMNS = {
    "layer": "layer",
    "": "what",
    "ours, ms": "ours_ms",
    "peer, ms": "peer_ms",
    "peer / ours": "ratio",
    "ours, best": "ours_best_ms",
    "peer, best": "peer_best_ms",
    "ours, temp MiB": "ours_temp_mib",
    "peer, temp MiB": "peer_temp_mib",
    "difference": "error",
}


def main(argv):
    del argv
    jax.config.update("jax_platforms", "cpu")
    origin = provenance()
    python = FLAGS.peer_python
    if python and not Path(python).exists():
        raise app.UsageError(f"--peer_python={python} does not exist. To create it:\n{CREATE}")
    if not python:
        print(f"No --peer_python: only our own layer is timed. To create the peer's environment:\n{CREATE}")
    rows, about = [], {}
    for name in FLAGS.layers:
        with ExitStack() as stack:
            peer = None
            if python:
                # Not resolved: a virtual environment's python is a link that must be called by its own name.
                python = str(Path(python).absolute())
                peer = stack.enter_context(started_peer(python, LAYERS[name], PEER_CHUNKS[name]))
                about[name] = peer.about
            ours = Ours(LAYERS[name], FLAGS.chunk)
            rows += rows_of(name, LAYERS[name], ours, peer, FLAGS.rounds)
    print(common.table(rows, COLUMNS))
    print(common.write(FLAGS.name, origin, rows, FLAGS.out, peer=about))


if __name__ == "__main__":
    flags.DEFINE_string("peer_python", "", "interpreter of an environment with mamba3-jax; empty: time only ours")
    flags.DEFINE_multi_enum("layers", list(LAYERS), list(LAYERS), "which layers")
    flags.DEFINE_integer("chunk", 0, "tokens a chunk of ours; 0: the op chooses", lower_bound=0)
    flags.DEFINE_integer("rounds", 7, "batches of calls of each side", lower_bound=1)
    common.define_result(name="layer_cpu")
    app.run(main, flags_parser=common.parse)

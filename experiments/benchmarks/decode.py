"""Generation: a token of the decode loop, the draw alone, and the prefill, beside the bytes that a token must move.

    python -m experiments.benchmarks.decode --name=decode_h200
    python -m experiments.benchmarks.decode --models=siso-1.5b --batches=1,128 --samplings=plain --what=decode
    python -m experiments.benchmarks.decode --models=tiny --batches=1,3         in small, on a CPU too
    python -m experiments.benchmarks.decode --config=experiments/ablations/state_size.py --name=decode_state_size \\
        --samplings=plain --what=decode --batches=128 --contexts=1024,4096,16384       the variants of an experiment

Models have random parameters, float32 as `mamba3_jax.load` gives them. `mamba3_jax.generate` runs `fused`, a layer in
five kernels (`mamba3_jax.decoding_layer`), or where that does not run `loop`; their logits are first compared with
those of `LanguageModel`, which they have to meet before they are timed. `former` is the loop as it was: a scan over
stacked layers, parameters cast in every token. The floor is the weights in the compute dtype read once and the state
read and written, at the bandwidth of a copy measured in the same run. `draw` is a token drawn of random logits, by
`mamba3_jax.sampling` and, as `sort`, as it was. A prefill in several pieces is first compared, by the state that it
leaves in the first layer, with the one in a single piece.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import common, ssm
from experiments.found import given_by
from launch.common import user_errors
from launch.plan import variant
from launch.provenance import provenance
from mamba3_jax import decoding, decoding_layer, generate
from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel, init_params, validate
from mamba3_jax.presets import PRESETS
from mamba3_jax.sampling import Sampling, draw

TINY = ModelConfig(vocab_size=256, d_model=32, pattern="MM", d_ff=64, d_state=16, head_dim=16, compute_dtype="bfloat16")
MODELS = PRESETS | {"tiny": TINY}
DEFAULT = {"gpu": ["siso-180m", "mimo-180m", "siso-1.5b"], "tpu": ["siso-180m"], "cpu": ["tiny"]}
SAMPLINGS = {
    "plain": Sampling(),
    "top_k": Sampling(top_k=50),
    "top_k+top_p": Sampling(top_k=50, top_p=0.95),
    "top_p": Sampling(top_p=0.95),
}
WHAT = ("decode", "draw", "prefill")
CHECKED = 16  # tokens before the one whose logits are compared
PIECE = 2048
# Rounding of the same numbers in another order, through all layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}

FLAGS = flags.FLAGS


@dataclasses.dataclass
class Program:
    """One function to time. `prepare` makes its arguments, the last of which is donated and fed back."""

    row: dict
    function: Callable
    prepare: Callable[[], tuple]
    tokens: int  # of a row, in one call
    calls: int = 1  # of the function, for those tokens

    def compile(self):
        with common.tracing():
            begin = time.perf_counter()
            arguments = jax.eval_shape(self.prepare)
            lowered = jax.jit(self.function, donate_argnums=len(arguments) - 1).lower(*arguments)
        compiled = lowered.compile()
        self.row |= {"compile_s": time.perf_counter() - begin, "temp_mib": common.temp_mib(compiled)}
        return compiled

    def time(self, compiled) -> None:
        *given, carried = self.prepare()

        def call():
            nonlocal carried
            for _ in range(self.calls):
                carried = compiled(*given, carried)
            return carried

        timing = common.measure(call, batch_seconds=0.5)
        a_token = 1e3 / self.tokens if self.row["what"] != "prefill" else 1e3
        self.row |= {"ms": timing.median * a_token, "best_ms": timing.best * a_token}
        self.row["tokens_per_second"] = self.row["batch"] * self.tokens / timing.median
        if "floor_ms" in self.row:
            self.row["over_floor"] = self.row["ms"] / self.row["floor_ms"]


@lru_cache(maxsize=1)  # of one model at a time
def params_of(model: str):
    return init_params(MODELS[model], jax.random.key(0))


@lru_cache(maxsize=2)  # of one model at a time, in both arrangements
def prepared_of(model: str, path: str = "loop"):
    return decoding.prepare(MODELS[model], params_of(model), fused=path == "fused")


def paths_of(model: str) -> list[str]:
    """Return the ways to decode that there are on this device, the former one last."""
    fused = decoding_layer.refused(MODELS[model]) is None
    return ["loop", *["fused"] * fused, "former"]


def carry_of(config: ModelConfig, batch: int, tokens: int, capacity: int, *, stacked: bool) -> generate.Carry:
    """Return the decode loop's carry before the first of `tokens`, with room for `capacity`."""
    return generate.Carry(
        step=jnp.int32(0),
        token_B=jnp.arange(batch, dtype=jnp.int32) % config.vocab_size,
        start_B=jnp.zeros(batch, bool),
        done_B=jnp.zeros(batch, bool),
        out_BT=jnp.zeros((batch, tokens), jnp.int32),
        state=LanguageModel(config, stacked).empty_state(batch, capacity),
    )


def again(carry: generate.Carry) -> generate.Carry:
    """Begin with the first place once more, from the state that is there."""
    return carry._replace(step=jnp.zeros_like(carry.step))


def loop(config: ModelConfig, sampling: Sampling, tokens: int, params, carry: generate.Carry) -> generate.Carry:
    """Decode `tokens` tokens as `generate` does."""
    key, until = jax.random.key(0), jnp.int32(tokens)
    return generate.decode(config, sampling, (), params, key, again(carry), until)


def former(config: ModelConfig, sampling: Sampling, tokens: int, params, carry: generate.Carry) -> generate.Carry:
    """Decode as `generate` did before it prepared parameters and unstacked the state."""
    model, key = LanguageModel(config), jax.random.key(0)

    def one(carry: generate.Carry):
        logits_BLV, state = model.apply({"params": params}, carry.token_B[:, None], carry.state, carry.start_B[:, None])
        logits_BV = logits_BLV[:, 0, : config.vocab_size]
        token_B = draw(jax.random.fold_in(key, carry.step), logits_BV, sampling)
        out_BT = carry.out_BT.at[:, carry.step].set(token_B)
        return carry._replace(step=carry.step + 1, token_B=token_B, out_BT=out_BT, state=state)

    return jax.lax.while_loop(lambda carry: carry.step < tokens, one, again(carry))


def sort_draw(key, logits_BV, sampling: Sampling):
    """Draw as `mamba3_jax.sampling` did before: of a sorted vocabulary."""
    vocab = logits_BV.shape[-1]
    logits_BK, ids_BK = jax.lax.top_k(logits_BV / sampling.temperature, min(sampling.top_k or vocab, vocab))
    p_BK = jax.nn.softmax(logits_BK)
    before_BK = jnp.cumsum(p_BK, axis=-1) - p_BK
    logits_BK = jnp.where((before_BK < sampling.top_p).at[:, 0].set(True), logits_BK, -jnp.inf)
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(logits_BV)))
    index_B = jax.vmap(jax.random.categorical)(keys_B, logits_BK)
    return jnp.take_along_axis(ids_BK, index_B[:, None], axis=1)[:, 0].astype(jnp.int32)


def draws(function: Callable, sampling: Sampling, count: int, logits_BV, token_B):
    """Draw `count` times of logits that are not the same twice."""

    def one(step, token_B):
        # As a loop that makes new logits would: nothing can be kept from one draw to the next.
        return function(jax.random.fold_in(jax.random.key(0), step), logits_BV + token_B[:, None] % 2, sampling)

    return jax.lax.fori_loop(0, count, one, token_B)


def state_bytes(config: ModelConfig, capacity: int = 1) -> int:
    """Count the bytes of the state of one sequence, with room for so many tokens."""
    return ssm.nbytes(jax.eval_shape(lambda: LanguageModel(config).empty_state(1, capacity)))


def contexts_of(config: ModelConfig, contexts: list[int]) -> list[int]:
    """Return the contexts at which the state has another size each, or [0]: it has one size."""
    return contexts if contexts and state_bytes(config, 2) > state_bytes(config, 1) else [0]


def floor_bytes(config: ModelConfig, batch: int, context: int = 0) -> int:
    """Count the bytes of a token: weights in the compute dtype, of the table only the rows, the state twice.

    Of a state that grows with the context all is read and one token's part is written.
    """
    params = jax.eval_shape(lambda: decoding.prepare(config, init_params(config, jax.random.key(0))))
    table = params.pop("embedding")["embedding"]
    state = state_bytes(config, max(1, context)) + state_bytes(config)
    return ssm.nbytes(params) + batch * (table.shape[1] * table.dtype.itemsize + state)


def check_logits(model: str, batch: int, path: str) -> float:
    """Return the relative error of the loop's logits after some tokens; ValueError where they are not the model's."""
    config, params = MODELS[model], params_of(model)
    plain = jax.jit(lambda params, tokens_BL, state: LanguageModel(config).apply({"params": params}, tokens_BL, state))
    tokens_BL = jax.random.randint(jax.random.key(1), (batch, CHECKED + 1), 0, config.vocab_size)
    state = LanguageModel(config).empty_state(batch, CHECKED + 1)
    for place in range(CHECKED):
        _, state = plain(params, tokens_BL[:, place : place + 1], state)
    want_BLV, _ = plain(params, tokens_BL[:, CHECKED:], state)
    state = jax.jit(partial(decoding.unstacked, config))(state)
    got_BV, _ = jax.jit(partial(decoding.step, config))(
        prepared_of(model, path), tokens_BL[:, CHECKED], state, jnp.zeros(batch, bool)
    )
    error = common.rel_rms(got_BV, want_BLV[:, 0, : config.vocab_size])
    return common.require({"logits": error}, TOLERANCE[config.compute_dtype], f"{model}, batch {batch}, {path}")


def decode_programs(
    model: str, batch: int, samplings: list[str], tokens: int, copy_gb_s: float, context: int = 0
) -> Iterator[Program]:
    """Yield the loop with each sampling, and as it was.

    `context`: tokens that caches have room for, all of which are read whatever they hold; 0: those decoded.
    """
    floor_ms = floor_bytes(MODELS[model], batch, context) / copy_gb_s / 1e6

    def prepare(path: str):
        stacked = path == "former"
        params = params_of(model) if stacked else prepared_of(model, path)
        return params, carry_of(MODELS[model], batch, tokens, max(tokens, context), stacked=stacked)

    for path in paths_of(model):
        function = former if path == "former" else loop
        for sampling in samplings[:1] if path == "former" else samplings:
            row = {"model": model, "what": "decode", "batch": batch, "path": path, "sampling": sampling}
            row |= {"context": context or None, "state_bytes": state_bytes(MODELS[model], context or 1)}
            yield Program(
                row=row | {"floor_ms": floor_ms},
                function=partial(function, MODELS[model], SAMPLINGS[sampling], tokens),
                prepare=partial(prepare, path),
                tokens=tokens,
            )


def draw_programs(model: str, batch: int, samplings: list[str], tokens: int) -> Iterator[Program]:
    """Yield the draw alone, with each sampling, now and as it was."""
    vocab = MODELS[model].vocab_size
    for sampling in samplings:
        for path, function in (("search", draw), ("sort", sort_draw)):
            if sampling == "plain" and path == "sort":
                continue
            yield Program(
                row={"model": model, "what": "draw", "batch": batch, "path": path, "sampling": sampling},
                function=partial(draws, function, SAMPLINGS[sampling], tokens),
                prepare=lambda: (
                    2 * jax.random.normal(jax.random.key(2), (batch, vocab)),
                    jnp.zeros(batch, jnp.int32),
                ),
                tokens=tokens,
            )


def prefill_programs(model: str, batch: int, length: int) -> Iterator[Program]:
    """Yield the prefill of rows of one length, in one piece and in pieces of `PIECE`."""
    config, length = MODELS[model], length if length < PIECE else length // PIECE * PIECE
    for piece in dict.fromkeys((length, min(PIECE, length))):
        tokens_BL = partial(jax.random.randint, jax.random.key(1), (batch, piece), 0, config.vocab_size)
        yield Program(
            row={"model": model, "what": "prefill", "batch": batch, "length": length, "path": f"pieces of {piece:,}"},
            function=partial(generate.prefill, LanguageModel(config)),
            prepare=lambda piece=piece, tokens_BL=tokens_BL: (
                params_of(model),
                tokens_BL(),
                jnp.zeros((batch, piece), bool),
                LanguageModel(config).empty_state(batch, length),
            ),
            tokens=length,
            calls=length // piece,
        )


def check_pieces(whole, pieces, model: str, batch: int, length: int, piece: int) -> float:
    """Return the largest relative error of the first layer's state after pieces; ValueError if it is another one."""
    config = MODELS[model]
    tokens_BL = jax.random.randint(jax.random.key(3), (batch, length), 0, config.vocab_size)
    start_BL = jnp.zeros((batch, length), bool)
    empty = partial(LanguageModel(config).empty_state, batch, length)
    want, got = whole(params_of(model), tokens_BL, start_BL, empty()), empty()
    for first in range(0, length, piece):
        part = slice(first, first + piece)
        got = pieces(params_of(model), tokens_BL[:, part], start_BL[:, part], got)

    # The first layer has the same input either way. Deeper ones multiply what bfloat16 rounds differently: of 24 layers
    # and 4,096 tokens the last state differed by 13%, and from float32's by 30% either way; in float32, by 2e-5.
    def of_first_layer(state):
        return jax.tree.map(lambda x: x[0].astype(jnp.float32), state["segment_0"]["block_0"])

    # Angles are compared by what they rotate: the last keys.
    errors = ssm.named_errors(of_first_layer(got), of_first_layer(want))
    errors = {name: error for name, error in errors.items() if "angle" not in name}
    return common.require(errors, 5 * TOLERANCE[config.compute_dtype], f"{model}, batch {batch}, prefill in pieces")


COLUMNS = {
    "model": "model",
    "": "what",
    "batch": "batch",
    "context": "context",
    "length": "length",
    "path": "path",
    "sampling": "sampling",
    "ms": "ms",
    "best": "best_ms",
    "tokens/s": "tokens_per_second",
    "floor, ms": "floor_ms",
    "over floor": "over_floor",
    "temp MiB": "temp_mib",
    "compile, s": "compile_s",
    "error": "error",
}


def programs_of(
    model: str,
    batches: list[int],
    samplings: list[str],
    tokens: int,
    prompt: int,
    copy_gb_s: float,
    contexts: list[int] | None = None,
):
    """Return the programs of a model, by what they do."""
    prefills = [prefill_programs(model, batch, max(prompt // batch, 1)) for batch in batches]
    places = itertools.product(batches, contexts_of(MODELS[model], contexts or []))
    return {
        "decode": [p for at in places for p in decode_programs(model, at[0], samplings, tokens, copy_gb_s, at[1])],
        "draw": list(draw_programs(model, max(batches), samplings, tokens)),
        "prefill": list(itertools.chain(*prefills)),
    }


def rows_of(model: str, programs: list[Program]) -> Iterator[dict]:
    """Yield a row a program, all of them compiled before one is timed."""
    decodes = dict.fromkeys((p.row["path"], p.row["batch"]) for p in programs if p.row["what"] == "decode")
    checked = [(path, batch) for path, batch in decodes if path != "former"]
    params_of(model)  # these are kept from now on: made while something is traced, they would be no arrays
    for path, _ in checked:
        prepared_of(model, path)
    compiled = common.compiled_all(Program.compile, programs, model)
    errors = {(path, batch): check_logits(model, batch, path) for path, batch in checked}
    whole = None
    for program, binary in zip(programs, compiled, strict=True):
        row = program.row
        if row["what"] == "decode":
            row["error"] = errors.get((row["path"], row["batch"]), 0.0)
        if row["what"] == "prefill":
            whole = binary if program.calls == 1 else whole
            piece = row["length"] // program.calls
            row["error"] = check_pieces(whole, binary, model, row["batch"], row["length"], piece)
        program.time(binary)
        yield row


def variants_of(path: str) -> dict[str, ModelConfig]:
    """Return the models of an experiment's file by the names of its variants; {} for no file."""
    if not path:
        return {}
    given, config = given_by(Path(path))
    variants = given.get("VARIANTS", {config.name: {}})
    models = {name: variant(config, name, fields).model for name, fields in variants.items()}
    for name, model in models.items():
        try:
            validate(model)
        except ValueError as error:
            raise ValueError(f"--config={path}, variant {name}: {error}") from None
    return models


def main(argv):
    del argv
    platform = jax.default_backend()
    with user_errors():
        own = variants_of(FLAGS.config)
    contexts, batches = common.numbers("contexts"), common.numbers("batches")
    MODELS.update(own)
    models = ssm.chosen("models", FLAGS.models or [*own] or DEFAULT[platform], MODELS)
    samplings = ssm.chosen("samplings", FLAGS.samplings or list(SAMPLINGS), SAMPLINGS)
    what = ssm.chosen("what", FLAGS.what or list(WHAT), WHAT)
    origin = provenance(FLAGS.commit)
    best = {"copy_gb_s": ssm.ceilings("float32")["copy_gb_s"]}
    rows = []
    for model in models:
        programs = programs_of(model, batches, samplings, FLAGS.tokens, FLAGS.prompt, best["copy_gb_s"], contexts)
        for row in rows_of(model, [program for each in what for program in programs[each]]):
            rows.append(row)
            common.show(row, COLUMNS)
            # After every row: a program that is stopped leaves what it has.
            path = common.write(FLAGS.name or f"decode_{platform}", origin, rows, FLAGS.out, ceilings=best)
    print(common.table(rows, COLUMNS))
    print(path)


if __name__ == "__main__":
    flags.DEFINE_list("models", [], "names in presets, or tiny; empty: those for this device, or all of --config")
    flags.DEFINE_string("config", "", "an experiment's file: its variants are models by their names too")
    flags.DEFINE_list("contexts", [], "tokens that attention caches have room for; empty: those decoded")
    flags.DEFINE_list("batches", ["1", "8", "128"], "rows at once")
    flags.DEFINE_list("samplings", [], f"of {', '.join(SAMPLINGS)}; empty: all")
    flags.DEFINE_list("what", [], f"of {', '.join(WHAT)}; empty: all")
    flags.DEFINE_integer("tokens", 64, "tokens decoded in a call", lower_bound=1)
    flags.DEFINE_integer("prompt", 32768, "tokens of the prompts of all rows", lower_bound=1)
    common.define_result(name="", empty="decode_PLATFORM", commit=True)
    app.run(main, flags_parser=common.parse)

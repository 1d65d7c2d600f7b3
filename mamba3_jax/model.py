"""The language model: embedding, scanned layers, norm, head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba3_jax.block import Block
from mamba3_jax.config import ModelConfig, check
from mamba3_jax.inputs import check_room, check_start, check_state, check_tokens, whole
from mamba3_jax.mixers import MIXERS, letters
from mamba3_jax.mixers.mixer import OBSERVED, length_context
from mamba3_jax.nn.initial import linear
from mamba3_jax.nn.norm import NORMS
from mamba3_jax.nn.precision import DTYPES
from mamba3_jax.ops import context as contexts
from mamba3_jax.ops.context import RUNS, Context
from mamba3_jax.ops.einsum import einsum
from mamba3_jax.ops.look_up import Split, look_up
from mamba3_jax.ops.tuned import device

REMATS = ("", "none", "rotation", "op", "block")


def segments(pattern):
    """Cut a pattern into segments [(unit, repeats), ...] whose units have the least total length.

    "MMMMMA" * 4 -> [("MMMMMA", 4)];  "MMMAMMM" -> [("M", 3), ("A", 1), ("M", 3)]. Only the units are compiled. Of cuts
    that are as good, the one with the fewest segments is returned. A pattern is a string of letters or a tuple of
    names, and its units are of the same type.
    """
    layers = len(pattern)
    best = [(0, 0)] + [(layers + 1, 0)] * layers  # for each prefix: total length of its units, number of segments
    last = [(0, 0)] * (layers + 1)  # for each prefix: where its last segment begins, and the size of that unit
    for begin in range(layers):
        length, count = best[begin]
        for end, size in enumerate(unit_sizes(pattern[begin:]), begin + 1):
            if (length + size, count + 1) <= best[end]:
                best[end], last[end] = (length + size, count + 1), (begin, size)
    cut, end = [], layers
    while end:
        begin, size = last[end]
        cut.append((pattern[begin : begin + size], (end - begin) // size))
        end = begin
    return cut[::-1]


def unit_sizes(pattern):
    """Yield, for each prefix of a pattern, the size of the shortest unit that it repeats a whole number of times."""
    borders, border = [0], 0  # for each prefix: its longest proper prefix that is also a suffix (Knuth, Morris, Pratt)
    yield from (1 for _ in pattern[:1])
    for index in range(1, len(pattern)):
        while border and pattern[index] != pattern[border]:
            border = borders[border - 1]
        border += pattern[index] == pattern[border]
        borders.append(border)
        size = index + 1 - border
        yield size if (index + 1) % size == 0 else index + 1


def mixer_names(pattern) -> list[str]:
    """Return the name in `MIXERS` of each layer of a pattern.

    Raises:
        ValueError: a letter or a name that no mixer has.
    """
    table = letters() if isinstance(pattern, str) else {name: name for name in MIXERS}
    for layer, entry in enumerate(pattern):
        if entry not in table:
            raise ValueError(f"pattern has {entry!r} at layer {layer}, wanted one of {sorted(table)}")
    return [table[entry] for entry in pattern]


def blocks(pattern) -> dict[tuple[str, str], str]:
    """Return the names in `MIXERS` by (segment, block), the first two keys of a layer's parameters and state."""
    return {
        (f"segment_{i}", f"block_{j}"): mixer
        for i, (unit, _) in enumerate(segments(pattern))
        for j, mixer in enumerate(mixer_names(unit))
    }


def turns_at_once(repeats: int) -> int:
    """Return how many repeats of a segment one iteration of the scan runs where `config.unroll` is 0.

    On GPUs, all of them: a loop copies what crosses its iterations, which took a sixth of a training step. Unrolling 12
    layers compiles 20 to 30 s longer on an H200. Elsewhere, one.
    """
    return repeats if device().platform == "gpu" else 1


def padded_vocab(config: ModelConfig) -> int:
    """Return the number of rows of the embedding: vocab_size rounded up to a multiple of pad_vocab_to."""
    return -(-config.vocab_size // config.pad_vocab_to) * config.pad_vocab_to


def validate(config: ModelConfig) -> None:
    """Raise ValueError, naming the value and the wish, for any combination that is not a model."""
    if not isinstance(config, ModelConfig):
        raise ValueError(f"config is {type(config).__name__}, wanted ModelConfig, which is `Config.model`")
    check(config, "config.model")
    for name, table in {"norm": NORMS, "compute_dtype": DTYPES, "remat": REMATS, "layout": RUNS}.items():
        if getattr(config, name) not in table:
            raise ValueError(f"{name}={getattr(config, name)!r} is not one of {sorted(table)}")
    for mixer in sorted(set(mixer_names(config.pattern))):
        MIXERS[mixer].check(config)


def table_split() -> Split:
    """Return how tokens and the embedding lie on the mesh in context, by the rules in context (`sharding.using`)."""
    return Split(*nn.logical_to_mesh_axes(("batch", "length")), *nn.logical_to_mesh_axes(("embed", "vocab")))


def check_splits_rows(config: ModelConfig, context: Context) -> None:
    """Raise ValueError for a mixer that cannot have its rows split over devices."""
    for mixer in sorted(set(mixer_names(config.pattern))):
        if not MIXERS[mixer].splits_rows:
            raise ValueError(f"{mixer} cannot split its rows over devices, wanted a mesh without {context.axis!r}")


def known_or_past(tokens_BL, config: ModelConfig):
    """Keep ids in [0, vocab_size) and replace all others by one past the table, whose look-up is NaN.

    A negative id would otherwise count from the table's end, and an id of the padding would find a vector.
    """
    tokens_BL = jnp.asarray(tokens_BL, jnp.int32)
    return jnp.where((tokens_BL >= 0) & (tokens_BL < config.vocab_size), tokens_BL, padded_vocab(config))


class Unit(nn.Module):
    """The layers that one segment repeats."""

    config: ModelConfig
    mixers: tuple[str, ...]

    @nn.compact
    def __call__(self, residual_BLD, state, start_BL):
        block = nn.remat(Block) if self.config.remat == "block" else Block
        new_state = {}
        for index, mixer in enumerate(self.mixers):
            name = f"block_{index}"
            before = None if state is None else state[name]
            residual_BLD, new_state[name] = block(self.config, mixer, name=name)(residual_BLD, before, start_BL)
        return residual_BLD, new_state


class Repeats(nn.Module):
    """The repeats of a segment, one after another, each with its own parameters and state: no scan, nothing stacked."""

    config: ModelConfig
    mixers: tuple[str, ...]
    repeats: int

    @nn.compact
    def __call__(self, residual_BLD, state, start_BL):
        new_state = {}
        for index in range(self.repeats):
            name = f"repeat_{index}"
            before = None if state is None else state[name]
            unit = Unit(self.config, self.mixers, name=name)
            residual_BLD, new_state[name] = unit(residual_BLD, before, start_BL)
            if residual_BLD.dtype != jnp.float32:
                # Round here, as a scan does between its steps: XLA would pass on the float32 value that it has.
                residual_BLD = jax.lax.optimization_barrier(residual_BLD)
        return residual_BLD, new_state


class LanguageModel(nn.Module):
    """logits, state = model(tokens, state, start): next-token logits after every token.

    Training, prefill in any number of pieces and decoding are this one call.

    Args of the call:
        tokens_BL: integers in [0, vocab_size); the rows that pad the table have no ids. Any other id is an error where
            its value is known, outside `jax.jit`. A compiled program returns NaN logits from that token to the end of
            its document, and never the logits of another token. NaN may reach other documents of the same row
            (`ops.ssm` says which; attention lets it reach all of them), but no other row. Loaders and commands check
            ids beforehand.
        state: what the tokens before left (`empty_state` or a returned one), or None to start from nothing.
        start_BL: bool, true at the first token of a document, or None. Documents do not see each other.
        capacity: for a call without a state: how many tokens in all the attention caches of the returned state have
            room for; None: the L of this call. Tokens that do not fit are an error where the state's values are known,
            and give NaN in a compiled program. Layers other than attention need no room.

    Returns:
        logits_BLV, float32, as wide as the padded vocabulary, and the state
        {"segment_i": {"block_j": the mixer's state, whose leading axis is the repeats}}.

    With `stacked` False, parameters and state are {"segment_i": {"repeat_r": {"block_j": ...}}} without that axis
    (`decoding.unstacked`): the state of each layer is then an array of its own, which a loop updates in place.

    Raises:
        ValueError: see `validate`; tokens that are not integers, a start that is not (B, L) of bool, a state of another
            model or of other rows; what the arguments above call an error.
    """

    config: ModelConfig
    stacked: bool = True

    def __call__(self, tokens_BL, state=None, start_BL=None, capacity: int | None = None):
        x_BLD, head_DV, state = self.features(tokens_BL, state, start_BL, capacity)
        dtype = DTYPES[self.config.compute_dtype]
        return einsum("bld,dv->blv", x_BLD, head_DV, dtype=dtype, out=jnp.float32), state

    @nn.compact
    def features(self, tokens_BL, state=None, start_BL=None, capacity: int | None = None):
        """Return (x_BLD, head_DV, state); x head are the logits, which a loss need not hold all at once."""
        config = self.config
        validate(config)
        check_tokens(tokens_BL, config.vocab_size)
        check_start(start_BL, tokens_BL.shape)
        check_state(self, state, tokens_BL.shape[0])
        capacity = None if capacity is None else whole("capacity", capacity, 0)
        if self.stacked:
            check_room(blocks(config.pattern), state, tokens_BL.shape[1], capacity)
        if capacity is not None:
            state = self.empty_state(tokens_BL.shape[0], capacity)
        context = length_context(config, tokens_BL.shape[1], state)
        if context is not None:
            check_splits_rows(config, context)
            tokens_BL = contexts.laid(context, tokens_BL)
            start_BL = None if start_BL is None else contexts.laid(context, start_BL)
        dtype = DTYPES[config.compute_dtype]
        embedding_VD = Embedding(padded_vocab(config), config.d_model, config.embedding_std, name="embedding")()
        residual_BLD = look_up(embedding_VD, known_or_past(tokens_BL, config), table_split())  # past the table: NaN
        residual_BLD = residual_BLD.astype(jnp.float32 if config.residual_in_fp32 else dtype)
        residual_BLD = nn.with_logical_constraint(residual_BLD, ("batch", "length", None))

        new_state = {}
        for index, (unit, repeats) in enumerate(segments(config.pattern)):
            name = f"segment_{index}"
            scanned = nn.scan(
                Unit,
                variable_axes={"params": 0, OBSERVED: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=repeats,
                unroll=min(config.unroll or turns_at_once(repeats), repeats),
                # This check traces the body once more, so initial values depend on it: it stays on for `init`. Kernels
                # that write in place fail in it.
                check_constancy_invariants=self.is_initializing(),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            before, mixers = None if state is None else state[name], tuple(mixer_names(unit))
            layers = scanned(config, mixers, name=name) if self.stacked else Repeats(config, mixers, repeats, name=name)
            residual_BLD, new_state[name] = layers(residual_BLD, before, start_BL)

        x_BLD = NORMS[config.norm](dtype, name="norm")(residual_BLD)
        if context is not None:
            x_BLD = contexts.in_order(context, x_BLD)
        head_DV = embedding_VD.T if config.tie_embeddings else Head(embedding_VD.shape, name="head")()
        return x_BLD, head_DV, new_state

    @nn.nowrap
    def empty_state(self, batch: int, capacity: int):
        """Return the state before any token, with room for `capacity` tokens in every attention cache."""
        validate(self.config)
        batch, capacity = whole("batch", batch, 1), whole("capacity", capacity, 0)

        def empty(unit, *repeats):
            names = enumerate(mixer_names(unit))
            state = {f"block_{j}": MIXERS[mixer].empty_state(self.config, batch, capacity) for j, mixer in names}
            # Copies, so that no array is there twice: a program that is donated the state may not be given one twice.
            return jax.tree.map(lambda x: jnp.array(jnp.broadcast_to(x, (*repeats, *x.shape))), state)

        return {
            f"segment_{i}": empty(unit, repeats)
            if self.stacked
            else {f"repeat_{r}": empty(unit) for r in range(repeats)}
            for i, (unit, repeats) in enumerate(segments(self.config.pattern))
        }


class Embedding(nn.Module):
    """The table of token vectors, N(0, std)."""

    rows: int
    width: int
    std: float

    @nn.compact
    def __call__(self):
        normal = nn.with_logical_partitioning(nn.initializers.normal(self.std), ("vocab", "embed"))
        return self.param("embedding", normal, (self.rows, self.width))


class Head(nn.Module):
    """The output projection of a model that does not tie it to the embedding."""

    shape: tuple[int, int]  # of the embedding: rows, width

    @nn.compact
    def __call__(self):
        rows, width = self.shape
        return self.param("kernel", nn.with_logical_partitioning(linear(width), ("embed", "vocab")), (width, rows))


def boxed_shapes(config: ModelConfig):
    """Return the parameter tree as shapes, with the logical axis names: nothing is computed."""
    validate(config)
    tokens_BL = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens_BL)["params"]


def init_params(config: ModelConfig, key):
    """Draw initial parameters (SPEC section 10), a plain nested dict of float32 arrays."""
    validate(config)
    init = jax.jit(lambda key: nn.meta.unbox(LanguageModel(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
    return init(key)

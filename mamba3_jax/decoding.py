"""A model as a decode loop runs it: every layer has its own arrays of parameters and state, and matrices are cast once.

The public trees are those of `LanguageModel`, stacked over the repeats of a segment; a decode loop converts them before
it begins. XLA then updates the state of each layer in place, where a scan over stacked states copies all of them for
each token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.extend import core

from mamba3_jax import decoding_layer
from mamba3_jax.block import Block
from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel, blocks, known_or_past, mixer_names, segments
from mamba3_jax.nn.norm import NORMS
from mamba3_jax.nn.precision import DTYPES
from mamba3_jax.ops.einsum import einsum


def unstacked(config: ModelConfig, tree):
    """Cut parameters or a state that are stacked over the repeats of a segment into one tree for each repeat."""
    cut = dict(tree)
    for index, (_, repeats) in enumerate(segments(config.pattern)):
        name = f"segment_{index}"
        cut[name] = {f"repeat_{r}": jax.tree.map(lambda x: x[r], tree[name]) for r in range(repeats)}  # noqa: B023
    return cut


def prepare(config: ModelConfig, params, *, fused: bool = True):
    """Return parameters as `step` takes them: unstacked, and cast to the compute dtype if they are only read in it.

    A tied head becomes an array of its own: the look-up reads rows of the table in float32, the head reads all of it
    in the compute dtype.

    Args:
        config: the model's.
        params: as `LanguageModel` has them.
        fused: whether layers become what `decoding_layer` reads, where it can run them.
    """
    fused = fused and on_one_device(params) and decoding_layer.refused(config) is None
    if config.tie_embeddings:
        params = params | {"head": params["embedding"]}
    cast = functools.partial(jax.tree.map, lambda x, dtype: x if x.dtype == dtype else x.astype(dtype))
    dtypes = read_dtypes(config, params)
    layers = {name: params[name] for name in params if name.startswith("segment")}
    whole = {name: params[name] for name in params if name not in layers}  # jit would copy those that are not cast

    def cut(layers):
        layers = unstacked(config, cast(layers, {name: dtypes[name] for name in layers}))
        return arranged(config, layers) if fused else layers

    return cast(whole, {name: dtypes[name] for name in whole}) | jax.jit(cut)(layers)


def arranged(config: ModelConfig, layers):
    """Return unstacked parameters in which every layer of Mamba-3 is a `decoding_layer.Layer`."""
    mixers = blocks(config.pattern)

    def of_block(segment: str, block: str, params):
        return decoding_layer.arranged(config, params) if mixers[segment, block] == "mamba3" else params

    def of_unit(segment: str, unit):
        return {block: of_block(segment, block, params) for block, params in unit.items()}

    segments = {name: repeats for name, repeats in layers.items() if name.startswith("segment")}
    return layers | {
        name: {repeat: of_unit(name, unit) for repeat, unit in repeats.items()} for name, repeats in segments.items()
    }


def on_one_device(params) -> bool:
    """Tell whether no array is spread over several devices; arrays that are being traced do not count."""
    known = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    return all(len(x.sharding.device_set) == 1 for x in known)


def copied(config: ModelConfig, params) -> int:
    """Count the bytes that `prepare` allocates at least: the layers and, if it is cast, the head, in compute dtype."""
    dtype = jnp.dtype(DTYPES[config.compute_dtype])
    parts = [params[name] for name in params if name.startswith("segment")]
    if dtype != jnp.float32:
        parts.append(params["embedding" if config.tie_embeddings else "head"])
    return dtype.itemsize * sum(x.size for x in jax.tree.leaves(parts))


def step(config: ModelConfig, params, token_B, state, start_B, *, stacked: bool = False, interpret: object = None):
    """Return (logits_BV, state) after one more token in every row.

    Args:
        config: the model's.
        params: from `prepare`; with `stacked`, the public ones.
        token_B: ids.
        state: unstacked; with `stacked`, the public one.
        start_B: bool, true at the first token of a document.
        stacked: whether parameters and state are the public trees.
        interpret: runs the kernels of arranged layers on any backend, slowly, for tests.
    """
    if any(map(is_arranged, jax.tree.leaves(params, is_leaf=is_arranged))):
        return fused_step(config, params, token_B, state, start_B, interpret)
    if config.tie_embeddings:
        # Transpose here and not in `prepare`: the product is then the same as that of `LanguageModel`.
        params = params | {"head": {"kernel": params["head"]["embedding"].T}}
    model = LanguageModel(dataclasses.replace(config, tie_embeddings=False), stacked)
    logits_BLV, state = model.apply({"params": params}, token_B[:, None], state, start_B[:, None])
    # The columns that pad the vocabulary belong to no token.
    return logits_BLV[:, 0, : config.vocab_size], state


def is_arranged(layer) -> bool:
    """Tell whether a layer is one of `decoding_layer`."""
    return isinstance(layer, decoding_layer.Layer)


def fused_step(config: ModelConfig, params, token_B, state, start_B, interpret: object = None):
    """Compute `step` where some layers are arranged for `decoding_layer`; the others run as `Block`s."""
    dtype, new_state = DTYPES[config.compute_dtype], {}
    # One jitted function for all layers, so that it is traced once.
    run = jax.jit(functools.partial(decoding_layer.step, config, interpret=interpret))
    residual_BD = jnp.take(params["embedding"]["embedding"], known_or_past(token_B, config), axis=0)
    for index, (unit, repeats) in enumerate(segments(config.pattern)):
        segment = f"segment_{index}"
        new_state[segment] = {f"repeat_{r}": {} for r in range(repeats)}
        for repeat, after in new_state[segment].items():
            for place, mixer in enumerate(mixer_names(unit)):
                block = f"block_{place}"
                layer, before = params[segment][repeat][block], state[segment][repeat][block]
                if is_arranged(layer):
                    residual_BD, after[block] = run(layer, residual_BD, before, start_B)
                    continue
                residual_BLD, after[block] = Block(config, mixer).apply(
                    {"params": layer}, residual_BD[:, None], before, start_B[:, None]
                )
                residual_BD = residual_BLD[:, 0]
    x_BD = NORMS[config.norm](dtype).apply({"params": params["norm"]}, residual_BD)
    head_DV = params["head"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    logits_BV = einsum("bd,dv->bv", x_BD, head_DV, dtype=dtype, out=jnp.float32)
    return logits_BV[:, : config.vocab_size], new_state


def read_dtypes(config: ModelConfig, params):
    """Return, for each parameter, the one dtype that a step casts it to wherever it reads it, or else its own dtype.

    They are read off the step's jaxpr, so that no list of names has to be kept in line with the modules.
    """
    state = jax.eval_shape(lambda: LanguageModel(config).empty_state(1, 1))
    token_B, start_B = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), bool)
    run = lambda params, token_B, state, start_B: step(config, params, token_B, state, start_B, stacked=True)  # noqa: E731
    jaxpr = jax.make_jaxpr(run)(params, token_B, state, start_B).jaxpr
    leaves, tree = jax.tree.flatten(params)
    found = readings(jaxpr, jaxpr.invars[: len(leaves)])
    only = [dtypes.pop() if len(dtypes) == 1 else x.dtype for x, dtypes in zip(leaves, found, strict=True)]
    return jax.tree.unflatten(tree, only)


def readings(jaxpr, variables) -> list[set]:
    """Return, for each variable, the dtypes that a jaxpr reads it in: those of casts, and its own for any other use."""
    found = {variable: set() for variable in variables}
    for equation in jaxpr.eqns:
        for place, variable in enumerate(equation.invars):
            if not isinstance(variable, core.Var) or variable not in found:
                continue
            if equation.primitive.name == "transpose":
                found[equation.outvars[0]] = found[variable]  # the same set: a read of the transpose reads the variable
            else:
                found[variable] |= readings_of(equation, place)
    for variable in jaxpr.outvars:
        if isinstance(variable, core.Var) and variable in found:
            found[variable].add(variable.aval.dtype)
    return [found[variable] for variable in variables]


def readings_of(equation, place: int) -> set:
    """Return the dtypes in which one equation reads an operand."""
    if equation.primitive.name == "convert_element_type":
        return {equation.outvars[0].aval.dtype}
    # Calls and scans: the variables of the inner jaxpr are the operands, one by one.
    for inner in equation.params.values():
        inner = getattr(inner, "jaxpr", inner)
        if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(equation.invars):
            return readings(inner, [inner.invars[place]])[0]
    return {equation.invars[place].aval.dtype}

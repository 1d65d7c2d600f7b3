"""A model as a decode loop runs it: each layer's parameters and state in arrays of their own, matrices already cast.

The public trees stay as `LanguageModel` has them, stacked over the repeats of a segment; a loop converts at its edges.
XLA then updates every layer's state in place, where a scan over stacked ones copies them all each token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.extend import core

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel, segments
from mamba3_jax.nn.precision import DTYPES


def unstacked(config: ModelConfig, tree):
    """Cut parameters or a state stacked over the repeats of a segment into one tree a repeat."""
    cut = dict(tree)
    for index, (_, repeats) in enumerate(segments(config.pattern)):
        name = f"segment_{index}"
        cut[name] = {f"repeat_{r}": jax.tree.map(lambda x: x[r], tree[name]) for r in range(repeats)}  # noqa: B023
    return cut


def prepare(config: ModelConfig, params):
    """Return parameters as `step` takes them: unstacked, and in the compute dtype those that are only read in it.

    A tied head becomes an array of its own: the look-up reads rows of the table in float32, the head reads all of it
    in the compute dtype.
    """
    if config.tie_embeddings:
        params = params | {"head": params["embedding"]}
    cast = functools.partial(jax.tree.map, lambda x, dtype: x if x.dtype == dtype else x.astype(dtype))
    dtypes = read_dtypes(config, params)
    layers = {name: params[name] for name in params if name.startswith("segment")}
    whole = {name: params[name] for name in params if name not in layers}  # outside jit what is not cast is not copied
    cut = jax.jit(lambda layers: unstacked(config, cast(layers, {name: dtypes[name] for name in layers})))
    return cast(whole, {name: dtypes[name] for name in whole}) | cut(layers)


def copied(config: ModelConfig, params) -> int:
    """Count the bytes that `prepare` takes at least: the layers, and what of the head is cast, in the compute dtype."""
    dtype = jnp.dtype(DTYPES[config.compute_dtype])
    parts = [params[name] for name in params if name.startswith("segment")]
    if dtype != jnp.float32:
        parts.append(params["embedding" if config.tie_embeddings else "head"])
    return dtype.itemsize * sum(x.size for x in jax.tree.leaves(parts))


def step(config: ModelConfig, params, token_B, state, start_B, *, stacked: bool = False):
    """Return (logits_BV, state) after one more token a row, from prepared parameters and an unstacked state."""
    if config.tie_embeddings:
        # Transposed here and not in `prepare`: the product is then that of `LanguageModel`.
        params = params | {"head": {"kernel": params["head"]["embedding"].T}}
    model = LanguageModel(dataclasses.replace(config, tie_embeddings=False), stacked)
    logits_BLV, state = model.apply({"params": params}, token_B[:, None], state, start_B[:, None])
    # The columns that pad the vocabulary belong to no token.
    return logits_BLV[:, 0, : config.vocab_size], state


def read_dtypes(config: ModelConfig, params):
    """Return the dtype of each parameter that a step casts it to wherever it reads it, or else its own.

    From the step's jaxpr, so that no list of names has to follow the modules.
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
    """Return the dtypes that a jaxpr reads each of some variables in: those of casts, and its own for any other use."""
    found = {variable: set() for variable in variables}
    for equation in jaxpr.eqns:
        for place, variable in enumerate(equation.invars):
            if not isinstance(variable, core.Var) or variable not in found:
                continue
            if equation.primitive.name == "transpose":
                found[equation.outvars[0]] = found[variable]  # the same set: what reads it reads the variable
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
    # Of calls and scans, whose inner variables are their operands one by one.
    for inner in equation.params.values():
        inner = getattr(inner, "jaxpr", inner)
        if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(equation.invars):
            return readings(inner, [inner.invars[place]])[0]
    return {equation.invars[place].aval.dtype}

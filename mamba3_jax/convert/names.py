"""The one table of names: official `state_dict` keys and our parameter paths, and how each tensor becomes the other.

A mixer's rows stand in its own file (`official_rows`); `mixers/official.py` explains what a row is.
"""

import itertools
from collections.abc import Mapping

import numpy as np

from mamba3_jax.config import ModelConfig, listed
from mamba3_jax.mixers import MIXERS
from mamba3_jax.mixers.official import Piece, Row, same, weight
from mamba3_jax.model import mixer_names, padded_vocab, segments


def norm_rows(official: str, path: str, model: ModelConfig) -> dict[str, Row]:
    """Return the rows of a norm: its weight, and the bias of a layer norm."""
    names = {"weight": "scale"} | ({"bias": "bias"} if model.norm == "layer" else {})
    return {f"{official}.{theirs}": same(f"{path}/{ours}", (model.d_model,)) for theirs, ours in names.items()}


def layer_rows(mixer: str, model: ModelConfig) -> dict[str, Row]:
    """Return the rows of a layer: official names under `backbone.layers.{i}.`, our paths under a block."""
    width, hidden = model.d_model, model.d_ff
    rows = norm_rows("norm", "norm1", model)
    rows |= {f"mixer.{name}": row.under("mixer/") for name, row in MIXERS[mixer].official_rows(model).items()}
    if hidden:
        value, gate = Piece("mlp/value", (width, hidden)), Piece("mlp/gate", (width, hidden))
        rows |= norm_rows("norm2", "norm2", model)
        rows["mlp.fc1.weight"] = weight(width, 2 * hidden, value, gate)
        rows["mlp.fc2.weight"] = weight(hidden, width, Piece("mlp/out", (hidden, width)))
    return rows


def outer_rows(model: ModelConfig) -> dict[str, Row]:
    """Return the rows outside of the layers. A tied head is the embedding under a second name."""
    width, rows = model.d_model, padded_vocab(model)
    embedding = same("embedding/embedding", (rows, width))
    head = embedding if model.tie_embeddings else weight(width, rows, Piece("head/kernel", (width, rows)))
    norm = norm_rows("backbone.norm_f", "norm", model)
    return {"backbone.embedding.weight": embedding} | norm | {"lm_head.weight": head}


def placed(model: ModelConfig) -> list[tuple[str, Row, str, int | None]]:
    """Return (official name, row, prefix of our paths, index on the repeat axis or None) of every tensor, in order."""
    layers, number = [], itertools.count()
    for index, (unit, repeats) in enumerate(segments(model.pattern)):
        for repeat in range(repeats):
            for block, mixer in enumerate(mixer_names(unit)):
                theirs, ours = f"backbone.layers.{next(number)}", f"segment_{index}/block_{block}/"
                layers += [(f"{theirs}.{name}", row, ours, repeat) for name, row in layer_rows(mixer, model).items()]
    first, *last = [(name, row, "", None) for name, row in outer_rows(model).items()]
    return [first, *layers, *last]


def official_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the official names and shapes."""
    return {name: row.shape for name, row, *_ in placed(model)}


def our_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return our parameter paths and shapes, the repeat axis included."""
    repeats = {}
    for _name, row, prefix, repeat in placed(model):
        for piece in row.pieces:
            repeats[prefix + piece.path] = (piece.shape, repeat)
    return {path: shape if repeat is None else (repeat + 1, *shape) for path, (shape, repeat) in repeats.items()}


def check(what: str, given: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one ValueError that counts missing, extra and misshapen arrays, lists some, and names a prefix as cause."""
    missing = {name: shape for name, shape in wanted.items() if name not in given}
    extra = {name: array.shape for name, array in given.items() if name not in wanted}
    lines = [f"missing {name} {shape}" for name, shape in missing.items()]
    lines += [f"extra {name} {shape}" for name, shape in extra.items()]
    lines += [
        f"{name} is {given[name].shape}, wanted {shape}"
        for name, shape in wanted.items()
        if name in given and given[name].shape != shape
    ]
    if lines:
        cause = prefix_cause(list(extra), wanted)
        raise ValueError(f"{what}: {len(lines)} tensors do not fit the config{cause}: {listed(lines, between='; ')}")


def prefix_cause(extra: list[str], wanted: Mapping) -> str:
    """Say which one prefix, added or removed, makes all extra names wanted ones; "" where none does."""
    first = extra[0] if extra else ""
    for prefix in (first[: place + 1] for place, letter in enumerate(first) if letter in "./"):
        if all(name.startswith(prefix) and name.removeprefix(prefix) in wanted for name in extra):
            return f" (all {len(extra)} extra names are right but for the prefix {prefix!r})"
    for prefix in (name.removesuffix(first) for name in wanted if first and name.endswith((f".{first}", f"/{first}"))):
        if all(prefix + name in wanted for name in extra):
            return f" (all {len(extra)} extra names are right but for a lacking prefix {prefix!r})"
    return ""


def flatten(tree: Mapping, prefix: str = "") -> dict[str, np.ndarray]:
    """Join keys: {"a": {"b": x}} -> {"a/b": x}."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def unflatten(flat: Mapping[str, np.ndarray]) -> dict:
    """Split keys: {"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def view(array: np.ndarray, row: Row, piece: Piece) -> np.ndarray:
    """Return a writable view of `array` in the layout that the piece has in the official tensor: outputs first."""
    if not row.inputs:
        return array.reshape(-1, *row.shape[1:])
    return array.reshape(row.inputs, -1).T[piece.columns]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether two arrays of one shape have one dtype and hold the same bits."""
    return a.dtype == b.dtype and np.array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{a.itemsize}"))


def to_params(tensors: Mapping[str, np.ndarray], model: ModelConfig) -> dict:
    """Return our parameters from an official state dict, in float32, which holds float16 and bfloat16 exactly.

    Raises:
        ValueError: tensors that are missing, extra or misshapen (the message counts all of them), or a tied head that
            is not the embedding.
    """
    rows = placed(model)
    check("official tensors", tensors, official_shapes(model))
    tied = [tensors[name] for name in ("backbone.embedding.weight", "lm_head.weight")]
    if model.tie_embeddings and not same_bits(*tied):
        raise ValueError("tie_embeddings is true, but lm_head.weight is not backbone.embedding.weight")
    flat = {path: np.empty(shape, np.float32) for path, shape in our_shapes(model).items()}
    for name, row, prefix, repeat in rows:
        first = 0
        for piece in row.pieces:
            target = flat[prefix + piece.path]
            target = view(target if repeat is None else target[repeat], row, piece)
            target[...] = tensors[name][first : first + len(target)]
            first += len(target)
    return unflatten(flat)


def to_state_dict(params: Mapping, model: ModelConfig) -> dict[str, np.ndarray]:
    """Return our parameters as an official state dict, in its order, in our dtypes; a tied head is one array, twice.

    Raises:
        ValueError: arrays that are missing, extra or misshapen; the message counts all of them.
    """
    flat = {path: np.asarray(array) for path, array in flatten(params).items()}
    check("parameters", flat, our_shapes(model))
    tensors = {}
    for name, row, prefix, repeat in placed(model):
        arrays = [flat[prefix + piece.path] for piece in row.pieces]
        arrays = arrays if repeat is None else [array[repeat] for array in arrays]
        stacked = np.concatenate([view(array, row, piece) for array, piece in zip(arrays, row.pieces, strict=True)])
        tensors[name] = stacked.reshape(row.shape)
    if model.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return tensors

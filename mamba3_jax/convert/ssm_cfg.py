"""Convert the official `ssm_cfg` to fields of `ModelConfig` and back, for each class of layers that `layer` names."""

import math
from typing import NamedTuple

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mamba2 import Mamba2
from mamba3_jax.mixers.mamba3 import Mamba3
from mamba3_jax.mixers.mixer import Mixer


class Layer(NamedTuple):
    """One official class of layers, and what its keys are here."""

    mixer: type[Mixer]
    keys: dict  # every key that it reads, with the official default
    fields: dict[str, str]  # key -> the field of `ModelConfig` that has its value
    must: tuple[str, ...]  # keys that change what is computed, of which our layer has only the default


# Both classes read these.
KEYS = {
    "d_state": 128,
    "expand": 2,
    "headdim": 64,
    "ngroups": 1,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init_floor": 1e-4,
}
FIELDS = {
    "d_state": "d_state",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
}
CLASSES = {
    "Mamba3": Layer(
        mixer=Mamba3,
        keys=KEYS
        | {
            "rope_fraction": 0.5,
            "A_floor": 1e-4,
            "is_outproj_norm": False,
            "is_mimo": False,
            "mimo_rank": 4,
            "chunk_size": 64,  # performance only
            "fuse_pregate_headwise_norm": True,  # a kernel choice
            "dropout": 0.0,  # read and ignored by the official layer
        },
        fields=FIELDS | {"rope_fraction": "rope_fraction", "A_floor": "a_floor", "is_outproj_norm": "out_norm"},
        must=(),
    ),
    "Mamba2": Layer(
        mixer=Mamba2,
        keys=KEYS
        | {
            "d_conv": 4,
            "d_ssm": None,  # expand * d_model
            "D_has_hdim": False,
            "rmsnorm": True,
            "norm_before_gate": False,
            "dt_limit": [0.0, math.inf],
            "bias": False,
            "conv_bias": True,
            "conv_init": None,  # this and the next give initial values, which are replaced by the weights that are read
            "A_init_range": [1, 16],
            "chunk_size": 256,  # performance only
            "use_mem_eff_path": True,  # a kernel choice
            "sequence_parallel": True,  # has an effect over several processes only
        },
        fields=FIELDS | {"d_conv": "d_conv"},
        must=("D_has_hdim", "rmsnorm", "norm_before_gate", "dt_limit", "bias", "conv_bias"),
    ),
}


def check_must(given: dict, must: dict, where: str) -> None:
    """Raise ValueError, naming the key, for the first value that is not what it must be."""
    for key, wanted in must.items():
        if given[key] != wanted:
            raise ValueError(f"{where}.{key} is {given[key]!r}; only {wanted!r} is supported")


def fields_of(layer: Layer, ssm: dict, d_model: int) -> dict:
    """Return the fields of `ModelConfig` for an `ssm_cfg` that has every key, with a value of its kind.

    Raises:
        ValueError: an option that our layer does not have, or sizes that do not fit each other.
    """
    where = "config.json: ssm_cfg"
    check_must(ssm, {key: layer.keys[key] for key in layer.must}, where)
    check_sizes(ssm, d_model, where)
    # JSON may have a 1 for our 1.0, and a 2.0 for our 2
    fields = {ours: type(layer.keys[key])(ssm[key]) for key, ours in layer.fields.items()}
    return fields | ({"mimo_rank": ssm["mimo_rank"]} if ssm.get("is_mimo") else {})


def check_sizes(ssm: dict, d_model: int, where: str) -> None:
    """Raise ValueError for sizes that no official layer can have."""
    if ssm.get("rope_fraction", 0.5) not in (0.5, 1.0):
        raise ValueError(f"{where}.rope_fraction is {ssm['rope_fraction']}, wanted 0.5 or 1.0")
    if ssm.get("is_mimo") and ssm["mimo_rank"] < 1:
        raise ValueError(f"{where}.mimo_rank is {ssm['mimo_rank']}, wanted at least 1")
    if ssm["expand"] != int(ssm["expand"]) or int(ssm["expand"]) * d_model % ssm["headdim"]:
        raise ValueError(
            f"{where}.expand is {ssm['expand']}, wanted a whole number that makes "
            f"expand * {d_model} a multiple of headdim {ssm['headdim']}"
        )
    inner = int(ssm["expand"]) * d_model
    if ssm.get("d_ssm") not in (None, inner):  # the official layer would have a feed-forward in the other channels
        raise ValueError(f"{where}.d_ssm is {ssm['d_ssm']!r}; only null and {inner}, all channels, are supported")
    if inner // ssm["headdim"] % ssm["ngroups"]:
        heads = inner // ssm["headdim"]
        raise ValueError(f"{where}.ngroups is {ssm['ngroups']}, wanted a divisor of the {heads} heads")


def ssm_of(name: str, model: ModelConfig) -> dict:
    """Return the `ssm_cfg` of the layers of a `ModelConfig` that are of the official class `name`."""
    ssm = {"layer": name} | {key: getattr(model, ours) for key, ours in CLASSES[name].fields.items()}
    if name != "Mamba3":
        return ssm
    rank = {"mimo_rank": model.mimo_rank} if model.mimo_rank else {}
    chunk = max(64 // max(model.mimo_rank, 1), 16)  # the size that the official layer's warning asks for
    return ssm | {"is_mimo": model.mimo_rank > 0, "chunk_size": chunk} | rank

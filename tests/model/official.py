"""Official layer parameters (SPEC section 10) by our names, for the recorded layers; gradients map the same way."""

import numpy as np

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.choices import sizes

# official layer_config key -> ours; chunk_size is a performance parameter
FIELDS = {
    "d_state": "d_state",
    "headdim": "head_dim",
    "expand": "expand",
    "ngroups": "n_groups",
    "rope_fraction": "rope_fraction",
    "is_outproj_norm": "out_norm",
    "A_floor": "a_floor",
}


def layer_config(case: dict, **changes) -> ModelConfig:
    """The config of a recorded layer."""
    official = case["layer_config"]
    fields = {ours: official[theirs] for theirs, ours in FIELDS.items() if theirs in official}
    rank = official["mimo_rank"] if official.get("is_mimo") else 0
    return ModelConfig(d_model=case["d_model"], mimo_rank=rank, **fields, **changes)


def layer_params(config: ModelConfig, arrays: dict, prefix: str) -> dict:
    """Our parameters from those recorded as `prefix + official name`."""
    size = sizes(config)
    official = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
    d_in, shared = size.heads * size.head_dim, size.rank * size.groups * size.d_state
    order = np.cumsum([d_in, d_in, shared, shared, size.heads, size.heads, size.heads])
    z, x, k, q, dt, a, trap, angle = np.split(official.pop("in_proj.weight").T, order, axis=1)
    per_head = (config.d_model, 2, size.heads, size.head_dim)
    params = {
        "in_zx": np.stack([z, x], axis=1).reshape(per_head),
        "in_dt_a_trap": np.stack([dt, a, trap], axis=1),
        "in_kq_angle": np.concatenate([k, q, angle], axis=1),
        "out": official.pop("out_proj.weight").T.reshape(size.heads, size.head_dim, config.d_model),
        "k_bias": official.pop("B_bias"),
        "q_bias": official.pop("C_bias"),
        "k_norm": official.pop("B_norm.weight"),
        "q_norm": official.pop("C_norm.weight"),
        "skip": official.pop("D"),
    }
    for theirs, ours in {"mimo_x": "v_rank", "mimo_z": "gate_rank", "mimo_o": "out_rank"}.items():
        if theirs in official:
            params[ours] = official.pop(theirs)
    if "norm.weight" in official:
        params["norm"] = official.pop("norm.weight").reshape(size.heads, size.head_dim)
    return params | official  # dt_bias has our name already; anything else is an error of shape in Flax

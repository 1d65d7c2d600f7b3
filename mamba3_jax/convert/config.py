"""Convert the official `config.json` to `ModelConfig` and back. Keys and defaults are those of `MambaConfig` and `MHA`.

Those of `Mamba3` and `Mamba2` stand in ssm_cfg.py. A key that changes what is computed and has no counterpart here is
an error; a key that only picks a kernel or initial values is dropped.
"""

import math

from mamba3_jax.config import LAYERS, ModelConfig, listed
from mamba3_jax.convert.ssm_cfg import CLASSES, Layer, check_must, fields_of, ssm_of
from mamba3_jax.mixers import MIXERS
from mamba3_jax.mixers.attention import Attention, head_counts
from mamba3_jax.model import mixer_names, validate

MLP_MULTIPLE = 128  # the official feed-forward rounds its width up to this

MODEL_KEYS = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,  # a kernel choice
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
DEFAULT_CLASS = "Mamba1"  # the official class of layers where ssm_cfg names none
ATTENTION_KEYS = {
    "num_heads": None,  # required
    "num_heads_kv": None,  # num_heads
    "head_dim": None,  # d_model / num_heads
    "mlp_dim": 0,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "softmax_scale": None,
    "causal": False,
    "d_conv": 0,
    "rotary_emb_dim": 0,
    "rotary_emb_base": 10000.0,
    "rotary_emb_interleaved": False,
}
WHOLE, POSITIVE, NUMBER, FLAG = (
    "a whole number from 0 up",
    "a positive whole number",
    "a positive number",
    "true or false",
)
# What kind of value the keys that we compute with must have
KINDS = {
    **dict.fromkeys(["d_intermediate", "mimo_rank", "d_conv"], WHOLE),
    **dict.fromkeys(["d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"], POSITIVE),
    **dict.fromkeys(["d_state", "headdim", "ngroups", "num_heads", "num_heads_kv", "head_dim"], POSITIVE),
    **dict.fromkeys(["expand", "rope_fraction", "dt_min", "dt_max", "dt_init_floor", "A_floor"], NUMBER),
    **dict.fromkeys(["rms_norm", "residual_in_fp32", "tie_embeddings", "is_outproj_norm", "is_mimo"], FLAG),
    **dict.fromkeys(["qkv_proj_bias", "out_proj_bias"], FLAG),
}
# The values that an attention layer must have for ours to compute the same
ATTENTION_MUST = {"causal": True, "d_conv": 0, "mlp_dim": 0, "rotary_emb_dim": 0, "softmax_scale": None}


def filled(given: dict, keys: dict, where: str) -> dict:
    """Return `given` over the official defaults.

    Raises:
        ValueError: no object, a key that the official code does not read, or a value that is not of its kind.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}, wanted an object")
    unknown = sorted(set(given) - set(keys))
    if unknown:
        raise ValueError(f"{where} has unknown keys [{listed(map(repr, unknown))}]; known are {sorted(keys)}")
    for key, value in given.items():
        may_lack = key in keys and keys[key] is None and value is None
        if key in KINDS and not may_lack and not is_kind(value, KINDS[key]):
            raise ValueError(f"{where}: {key} is {value!r}, wanted {KINDS[key]}")
    return keys | given


def is_kind(value, kind: str) -> bool:
    """Tell whether a JSON value is of a kind of `KINDS`."""
    if kind == FLAG or isinstance(value, bool):
        return kind == FLAG and isinstance(value, bool)
    if kind == NUMBER:
        return isinstance(value, int | float) and value > 0 and math.isfinite(value)
    return isinstance(value, int) and value >= (kind == POSITIVE)


def layer_class(official: dict) -> Layer:
    """Return the class of a config's layers, looking at no other key.

    Raises:
        ValueError: a config.json of another program, or a class that is none of `CLASSES`.
    """
    if "model_type" in official or "architectures" in official:
        held = {key: official.get(key) for key in ("model_type", "architectures")}
        raise ValueError(
            f"config.json is of Hugging Face transformers ({held}), wanted that of the official MambaLMHeadModel, "
            f"with d_model, n_layer and ssm_cfg"
        )
    ssm = official.get("ssm_cfg", {})
    if not isinstance(ssm, dict):
        raise ValueError(f"config.json: ssm_cfg is {ssm!r}, wanted an object")
    name = ssm.get("layer", DEFAULT_CLASS)
    if name not in list(CLASSES):
        default = "" if "layer" in ssm else ", the default,"
        raise ValueError(f"config.json: ssm_cfg.layer{default} is {name!r}, wanted {' or '.join(map(repr, CLASSES))}")
    return CLASSES[name]


def from_official(official: dict) -> ModelConfig:
    """Return the `ModelConfig` that computes what an official `config.json` says.

    Raises:
        ValueError: an unknown key, a value that is not of its kind, a layer that is none of `CLASSES`, an option that
            ours does not have, or sizes that do not fit each other.
    """
    layer = layer_class(official)
    model = filled(official, MODEL_KEYS, "config.json")
    ssm = filled(model["ssm_cfg"], {"layer": DEFAULT_CLASS} | layer.keys, "config.json: ssm_cfg")
    fields = fields_of(layer, ssm, model["d_model"])
    layers, attends = model["n_layer"], attention_layers(model)
    if layers > LAYERS:
        raise ValueError(f"config.json: n_layer is {layers}, wanted at most {LAYERS}")
    converted = ModelConfig(
        vocab_size=model["vocab_size"],
        pad_vocab_to=model["pad_vocab_size_multiple"],
        d_model=model["d_model"],
        pattern="".join((Attention if index in attends else layer.mixer).letter for index in range(layers)),
        d_ff=-(-model["d_intermediate"] // MLP_MULTIPLE) * MLP_MULTIPLE,
        tie_embeddings=model["tie_embeddings"],
        norm="rms" if model["rms_norm"] else "layer",
        residual_in_fp32=model["residual_in_fp32"],
        **fields,
        **(attention_from_official(model) if attends else {}),
    )
    validate(converted)
    return converted


def attention_layers(model: dict) -> list[int]:
    """Return `attn_layer_idx`; ValueError where one is not the number of a layer."""
    layers, attends = model["n_layer"], model["attn_layer_idx"] or []
    if not isinstance(attends, list) or not all(is_kind(index, WHOLE) for index in attends):
        raise ValueError(f"config.json: attn_layer_idx is {attends!r}, wanted a list of layers 0 to {layers - 1}")
    if beyond := [index for index in attends if index >= layers]:
        raise ValueError(f"config.json: attn_layer_idx {beyond} are not layers 0 to {layers - 1}")
    return attends


def attention_from_official(model: dict) -> dict:
    """Return the attention fields of `ModelConfig`; ValueError for what our attention does not have."""
    given = filled(model["attn_cfg"], ATTENTION_KEYS, "config.json: attn_cfg")
    check_must(given, ATTENTION_MUST, "config.json: attn_cfg")
    heads = given["num_heads"]
    if not heads:
        raise ValueError("config.json: attn_cfg.num_heads is missing, but attn_layer_idx names attention layers")
    kv_heads = given["num_heads_kv"] or heads
    if heads % kv_heads:
        raise ValueError(f"config.json: attn_cfg.num_heads_kv is {kv_heads}, wanted a divisor of num_heads {heads}")
    if given["qkv_proj_bias"] != given["out_proj_bias"]:
        raise ValueError("config.json: attn_cfg.qkv_proj_bias and out_proj_bias differ; only both or none is supported")
    if given["head_dim"] is None and model["d_model"] % heads:
        raise ValueError(f"config.json: d_model {model['d_model']} is not a multiple of attn_cfg.num_heads {heads}")
    return {
        "attn_heads": heads,
        "attn_kv_heads": kv_heads,
        "attn_head_dim": given["head_dim"] or model["d_model"] // heads,
        "attn_bias": given["out_proj_bias"],
    }


def to_official(model: ModelConfig) -> dict:
    """Return the official `config.json` of a `ModelConfig`; `from_official` of it computes the same model.

    Raises:
        ValueError: a choice that the official code does not have; the message names it.
    """
    mixers = mixer_names(model.pattern)
    for mixer in dict.fromkeys(mixers):
        if MIXERS[mixer].official is None:
            have = [name for name, other in MIXERS.items() if other.official is not None]
            raise ValueError(f"layers of mixer {mixer!r} have no official counterpart; only those of {have} have")
        for key, wanted in MIXERS[mixer].official.items():
            if getattr(model, key) != wanted:
                raise ValueError(f"{key}={getattr(model, key)!r} has no official counterpart; only {wanted!r} has")
    if model.d_ff % MLP_MULTIPLE:
        raise ValueError(f"d_ff={model.d_ff} has no official counterpart; only multiples of {MLP_MULTIPLE} have")
    attends = [index for index, mixer in enumerate(mixers) if mixer == "attention"]
    heads, kv_heads = head_counts(model)
    attention = {
        "num_heads": heads,
        "num_heads_kv": kv_heads,
        "head_dim": model.attn_head_dim,
        "qkv_proj_bias": model.attn_bias,
        "out_proj_bias": model.attn_bias,
        "causal": True,
    }
    return {
        "d_model": model.d_model,
        "d_intermediate": model.d_ff,
        "n_layer": len(model.pattern),
        "vocab_size": model.vocab_size,
        "ssm_cfg": ssm_of(class_of(mixers), model),
        "attn_layer_idx": attends,
        "attn_cfg": attention if attends else {},
        "rms_norm": model.norm == "rms",
        "residual_in_fp32": model.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": model.pad_vocab_to,
        "tie_embeddings": model.tie_embeddings,
    }


def class_of(mixers: list[str]) -> str:
    """Return the one official class of all layers but attention; the first of `CLASSES` if all are attention."""
    held = [name for name, layer in CLASSES.items() if layer.mixer in [MIXERS[mixer] for mixer in mixers]]
    if len(held) > 1:
        raise ValueError(f"layers of {' and '.join(held)} in one model have no official counterpart; only one kind has")
    return [*held, *CLASSES][0]

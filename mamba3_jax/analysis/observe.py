"""Observe each layer on real tokens: decay, step, weights, rotation, the state's norm and rank, the gradient's norm.

Mixers show arrays by name (`Mixer.observe`), which come out of the model's own program. What a mixer does not show is
absent, and not computed in some other way:

    dt            (B, L, H), or Mamba-1's (B, L, I)    length of a step
    log_a         (B, L, H)                            log of a step's decay
    a             (I, N)                               Mamba-1's rates: log_a = dt a, one for each entry of the state
    gamma, beta   (B, L, H)                            weights of the token's own and of the previous token's input
    angle         (B, L, 1 or H, S)                    radians per unit dt
    step          quaternions (B, L, H, S)             rotation of a token
    b             (B, L, H)                            the delta rule's strength

Every token multiplies a state matrix by exp(log_a + i rotation), plane by plane; with the delta rule, by a (1 - b)
along the key and by a elsewhere. The eigenvalues are these numbers.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.config import Config
from mamba3_jax.data.batch import Batch
from mamba3_jax.decoding import unstacked
from mamba3_jax.evaluate.language import edges
from mamba3_jax.evaluate.score import positions
from mamba3_jax.mixers import MIXERS
from mamba3_jax.mixers.mixer import OBSERVED
from mamba3_jax.model import LanguageModel, mixer_names, segments
from mamba3_jax.train.step import gradients

PLACES = 32  # places in a row at which the state is looked at
TOKENS = 4096  # about how many tokens quantities are kept of, evenly spaced in each piece of a row
ENTRIES = 256  # entries of Mamba-1's state that are looked at, evenly spaced
QUANTITIES = ("dt", "log_a", "gamma", "beta", "lambda", "rotation", "delta")  # what a layer may have for every token
OF_STATE = ("norm", "rank")  # what a layer may have for its state


class Layer(NamedTuple):
    """One layer on some rows; a mixer without heads counts as one head."""

    mixer: str
    tokens: dict[str, np.ndarray]  # those of `QUANTITIES` that it has, (B, L, H, ...), at about `TOKENS` tokens
    d_state: int  # columns of the state; 0: the layer has no state matrix
    norm_BCH: np.ndarray | None  # of the state after every piece of the row; None: the layer has no state matrix
    rank_BH: np.ndarray | None  # effective rank of the last of these states
    gradient: float  # norm of the gradient of the rows' mean loss in the layer's parameters


def observe(config: Config, model: LanguageModel, params, batch: Batch) -> list[Layer]:
    """Return every layer on these rows, run in pieces with the state carried; a last piece not full is left out."""
    rows, length = batch.tokens_BL.shape
    piece = max(1, length // PLACES)
    every = min(piece, -(-rows * length // TOKENS))
    run, state, parts = jax.jit(functools.partial(look, model, every)), model.empty_state(rows, length), []
    for first in range(0, length - piece + 1, piece):
        tokens_BL, start_BL = (x[:, first : first + piece] for x in (batch.tokens_BL, batch.start_BL))
        state, shown = run(params, tokens_BL, start_BL, state)
        parts.append(jax.device_get(shown))
    return [
        layer_of(mixer, pieces, matrix, gradient)
        for mixer, pieces, matrix, gradient in zip(
            mixer_names(model.config.pattern),
            zip(*parts, strict=True),
            memories(model.config, jax.device_get(state)),
            gradient_norms(config, params, batch),
            strict=True,
        )
    ]


def look(model: LanguageModel, every: int, params, tokens_BL, start_BL, state):
    """Return the state after some tokens and, by layer, quantities at each `every`th and the state's norm (B, H)."""
    state, shown = shown_by(model, params, tokens_BL, start_BL, state)
    layers = [{name: array[:, ::every] for name, array in quantities(layer).items()} for layer in shown]
    for layer, h_BHPN in zip(layers, memories(model.config, state), strict=True):
        if h_BHPN is not None:
            layer["norm"] = jnp.sqrt(jnp.sum(jnp.square(h_BHPN), axis=(-2, -1)))
    return state, layers


def shown_by(model: LanguageModel, params, tokens_BL, start_BL, state):
    """Return the state after some tokens, and the arrays that every layer shows, as its mixer names them."""
    (_, state), found = model.apply({"params": params}, tokens_BL, state, start_BL, mutable=[OBSERVED])
    blocks = by_layer(model.config, found.get(OBSERVED, {}))
    return state, [{name: array for name, (array,) in block.get("mixer", {}).items()} for block in blocks]


def by_layer(config, tree) -> list[dict]:
    """Return every layer's part, in order, of a tree that is stacked over the repeats of segments."""
    whole = {f"segment_{index}": {} for index in range(len(segments(config.pattern)))} | tree
    cut, layers = unstacked(config, whole), []
    for index, (unit, repeats) in enumerate(segments(config.pattern)):
        parts = [cut[f"segment_{index}"][f"repeat_{repeat}"] for repeat in range(repeats)]
        layers += [part.get(f"block_{block}", {}) for part in parts for block in range(len(unit))]
    return layers


def memories(config, state) -> list:
    """Return the state matrices (B, H, P, N) of every layer, None for one without them."""
    found = [
        MIXERS[mixer].memory(of_layer)
        for mixer, of_layer in zip(mixer_names(config.pattern), by_layer(config, state), strict=True)
    ]
    return [h[:, None] if h is not None and h.ndim == 3 else h for h in found]


def quantities(shown: dict) -> dict:
    """Return those of `QUANTITIES`, (B, L, H, ...), that follow from the arrays that a mixer shows."""
    found = {name: shown[name] for name in ("dt", "log_a", "gamma", "beta") if name in shown}
    if "a" in shown:
        dt_BLI, a_IN = shown["dt"], shown["a"]
        place_E = np.unique(np.linspace(0, a_IN.size - 1, min(ENTRIES, a_IN.size)).astype(int))
        a_E, channel_E = a_IN.reshape(-1)[place_E], place_E // a_IN.shape[1]
        found |= {"dt": dt_BLI[:, :, None], "log_a": (dt_BLI[..., channel_E] * a_E)[:, :, None]}
    if "beta" in shown:
        found["lambda"] = shown["gamma"] / (shown["gamma"] + shown["beta"])
    if "angle" in shown:
        found["rotation"] = shown["angle"] * shown["dt"][..., None]
    if "step" in shown:
        found["rotation"] = jnp.arccos(jnp.clip(shown["step"].w, -1, 1))
    if "b" in shown:
        found["delta"] = shown["b"]
    return found


def eigenvalues(tokens: dict[str, np.ndarray], d_state: int) -> np.ndarray:
    """Return exp(log_a +- i rotation) of every token, (B, L, H, K) complex; of equal ones each once.

    Entries of the state that do not rotate have exp(log_a).
    """
    if "log_a" not in tokens:
        return np.zeros((0, 0, 0, 0), complex)
    log_a = tokens["log_a"].reshape(*tokens["log_a"].shape[:3], -1).astype(complex)
    if "delta" in tokens:
        return np.exp(log_a) * np.stack([np.ones_like(tokens["delta"]), 1 - tokens["delta"]], axis=-1)
    if "rotation" not in tokens:
        return np.exp(log_a)
    phase = tokens["rotation"]
    phase = np.concatenate([phase, -phase], axis=-1)
    if phase.shape[-1] < d_state:
        phase = np.concatenate([phase, np.zeros_like(phase[..., :1])], axis=-1)
    return np.exp(log_a + 1j * phase)


def some_eigenvalues(layer: Layer, count: int) -> np.ndarray:
    """Return `count` of a layer's eigenvalues, drawn at random: evenly spaced ones would be those of few planes."""
    return np.random.default_rng(0).permutation(eigenvalues(layer.tokens, layer.d_state).ravel())[:count]


def layer_of(mixer: str, pieces: tuple[dict, ...], h_BHPN, gradient: float) -> Layer:
    """Put what was kept of a row's pieces together."""
    joined = {name: np.concatenate([part[name] for part in pieces], axis=1) for name in QUANTITIES if name in pieces[0]}
    has_state = h_BHPN is not None
    return Layer(
        mixer=mixer,
        tokens=joined,
        d_state=h_BHPN.shape[-1] if has_state else 0,
        norm_BCH=np.stack([part["norm"] for part in pieces], axis=1) if has_state else None,
        rank_BH=effective_rank(h_BHPN) if has_state else None,
        gradient=gradient,
    )


def effective_rank(h_PN: np.ndarray) -> np.ndarray:
    """Return exp(-sum p log p), p the singular values over their sum (Roy and Vetterli 2007); 0 for a zero matrix."""
    values = np.linalg.svd(h_PN, compute_uv=False)
    total = values.sum(axis=-1, keepdims=True)
    p = values / np.where(total > 0, total, 1)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0)


def gradient_norms(config: Config, params, batch: Batch) -> list[float]:
    """Return the norm of the mean loss's gradient in the parameters of each layer, its feed-forward included."""
    whole = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulate=1))
    norm = lambda part: jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(part)))  # noqa: E731

    def norms(params, batch):
        grads, _ = gradients(whole, params, batch)
        layers = {name: grads[name] for name in grads if name.startswith("segment")}
        return [norm(layer) for layer in by_layer(config.model, layers)]

    return [float(x) for x in jax.device_get(jax.jit(norms)(params, batch))]


def norms_by_position(norm_BCH: np.ndarray, start_BL: np.ndarray) -> list[dict]:
    """Return each head's mean norm of the state, in doubling buckets (from, to) of the document's tokens so far."""
    length, piece = start_BL.shape[1], max(1, start_BL.shape[1] // PLACES)
    position_BC = positions(start_BL)[:, piece - 1 :: piece][:, : norm_BCH.shape[1]]
    cuts = edges(length)
    found = []
    for first, end in itertools.pairwise(cuts):
        inside_BC = (position_BC >= first) & (position_BC < end)
        if inside_BC.any():
            found.append({"from": first, "to": end, "norm": norm_BCH[inside_BC].mean(axis=0).tolist()})
    return found


def summary(layers: list[Layer], start_BL: np.ndarray) -> list[dict]:
    """Return what a report says of every layer: the spread of its heads' quantities over tokens, and what is absent."""
    found = []
    for index, layer in enumerate(layers):
        has = {"norm": layer.norm_BCH, "rank": layer.rank_BH}
        absent = [name for name in QUANTITIES if name not in layer.tokens]
        absent += [name for name in OF_STATE if has[name] is None]
        norms = [] if layer.norm_BCH is None else norms_by_position(layer.norm_BCH, start_BL)
        facts = {"layer": index, "mixer": layer.mixer, "gradient_norm": layer.gradient, "absent": absent}
        eigenvalues_BLHK = eigenvalues(layer.tokens, layer.d_state)
        heads = [of_head(layer, head, eigenvalues_BLHK[:, :, head]) for head in range(eigenvalues_BLHK.shape[2])]
        found.append(facts | {"norm_by_position": norms, "heads": heads})
    return found


def of_head(layer: Layer, head: int, eigenvalues_BLK: np.ndarray) -> dict:
    """Return a head: its decay horizon 1 / -mean(log_a) in tokens, and the spreads of its quantities (|rotation|)."""
    mean = -float(layer.tokens["log_a"][:, :, head].mean(dtype=np.float64))
    facts = {"head": head, "horizon": 1 / mean if mean else math.inf}
    own = {name: array[:, :, head] for name, array in layer.tokens.items()}
    facts |= {name: spread(abs(array) if name == "rotation" else array) for name, array in own.items()}
    facts["eigenvalue"] = {"modulus": spread(abs(eigenvalues_BLK)), "phase": spread(np.angle(eigenvalues_BLK))}
    if layer.norm_BCH is not None:
        facts |= {"norm": float(layer.norm_BCH[:, -1, head].mean()), "rank": float(layer.rank_BH[:, head].mean())}
    return facts


def spread(array: np.ndarray) -> dict:
    """Return the mean, the median, and the 5th and 95th percentiles."""
    low, median, high = np.quantile(array, (0.05, 0.5, 0.95)).tolist()
    return {"mean": float(array.mean(dtype=np.float64)), "p5": low, "p50": median, "p95": high}


def number(head: dict, name: str) -> float:
    """Return a head's number, or the median of a spread; NaN for what is absent or not finite."""
    found = head.get(name)
    found = found["p50"] if isinstance(found, dict) else found
    return found if found is not None and math.isfinite(found) else math.nan

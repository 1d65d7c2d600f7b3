"""Predict, from the trained length alone, how far past it a model follows a group's running product.

A layer that follows a product by rotations, with z_t the rotation of token t and a_t its decay, adds at every token
what makes the past telescope: from w_t = c - a_t z_t c follows h_t = c - (a_1 .. a_t) (z_1 .. z_t) c. So what the state
knows of the product is its memory of the row's beginning. In the op's own frame, where keys rotate and the state does
not, this memory stands still and decays by a_1 .. a_t, beside what later tokens add. Two things end it:

  - forgetting: the memory becomes too small for a readout that was trained at the sizes of the trained length;
  - angles: the errors of rotations add up, token by token, until a product looks like another.

`predictions` asks the model itself which comes first: it takes the states that rows of the trained length leave, lets
their memory of the beginning decay, or turn, or both, as it would over k more tokens, and has the last token read them.
`restored` asks the other way round: rows that are too long are read again with the memory as large as at the trained
length. The simple rule beside them, `half_step`, says where angles alone have missed half a step between two products.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.analysis import half_step
from mamba3_jax.analysis.observe import memories, shown_by
from mamba3_jax.config import DataConfig
from mamba3_jax.data import Batch, loader
from mamba3_jax.data.synthetic import GROUPS, TASKS
from mamba3_jax.evaluate import tasks
from mamba3_jax.mixers import MIXERS
from mamba3_jax.mixers.choices import pairing
from mamba3_jax.model import LanguageModel, mixer_names, segments
from mamba3_jax.ops.rotary import rotate, to_planes

ROWS = 512  # rows that predictions are made from, at most
OCTAVES = 5  # how far past the trained length predictions reach, at eight lengths an octave
MEASURED = (1, 1.25, 1.5, 1.75, 2, 3, 4, 8)  # lengths to measure at, as multiples of the trained one
HALF = 0.5  # a model fails where accuracy is less than this part of the way from chance to always right
CAUSES = {"forgetting": (1, 0), "angles": (0, 1), "both": (1, 1)}  # (the memory decays, the memory turns)


def group_of(source: str) -> str:
    """Return the name in `GROUPS` of the group whose running product a task asks for; "" for other tasks."""
    name = "Z2" if source == "parity" else source.removesuffix("_generators")
    return name if name in GROUPS else ""


def horizon(model: LanguageModel, params, data: DataConfig, lengths: Sequence[int] = ()) -> dict | None:
    """Return where a model fails on words over a group, measured and predicted; None for other data.

    Args:
        model: a `LanguageModel`.
        params: its parameters.
        data: the task; the last of its `task_lengths` is the trained one, from whose rows predictions are made.
        lengths: to measure at; () is `MEASURED` times the trained one.

    Returns:
        A dict of trained; measured, the scores by length; fails, the length at which the last answer is halfway to
        chance (the first length, if accuracy is below that there; inf if it never is); predicted, see `predictions`;
        and restored, see `restored`.
    """
    if not (name := group_of(data.source)):
        return None
    trained, chance = data.task_lengths[-1], TASKS[data.source].chance
    measured = tasks.evaluate(model, params, data, lengths=lengths or [int(trained * times) for times in MEASURED])

    def batch(length: int) -> Batch:
        rows = dataclasses.replace(tasks.of_setting(data, length), batch=min(ROWS, data.valid_rows))
        return next(loader(rows, "valid", vocab_size=model.config.vocab_size))

    order = len(GROUPS[name].names) if name.startswith("Z") else 0
    return {
        "trained": trained,
        "measured": measured,
        "fails": crossing([(score["length"], score["scaled_last"]) for score in measured]),
        "predicted": predictions(model, params, batch(trained), chance, order),
        "restored": [restored(model, params, batch(x), chance, trained) for x in (3 * trained // 2, 2 * trained)],
    }


def crossing(points: Sequence[tuple[float, float]]) -> float:
    """Return the length at which accuracy falls under `HALF`, interpolated linearly between lengths; see `horizon`."""
    before = None
    for length, accuracy in points:
        if accuracy < HALF:
            if before is None:
                return float(length)
            share = (before[1] - HALF) / (before[1] - accuracy)
            return before[0] + share * (length - before[0])
        before = (length, accuracy)
    return math.inf


class Change(NamedTuple):
    """What one more token does to the memory of the beginning in a layer."""

    log_a_H: jax.Array  # by which it decays
    angle_HS: jax.Array | None  # error of its rotation, radians; None: the layer does not rotate planes by angles


def predictions(model: LanguageModel, params, batch: Batch, chance: float, order: int) -> dict:
    """Return, for each of `CAUSES`, scaled accuracies of the last token by length, and where they fall under `HALF`.

    The memory of the beginning is the mean state over the rows that begin with the same token: what other tokens add
    has mean 0, since elements are uniform. After k more tokens it stands for the memory in a row of length + k.

    Args:
        model: a `LanguageModel`.
        params: its parameters.
        batch: rows of the trained length.
        chance: accuracy of a guess.
        order: n if sums in the cyclic group Z_n are asked for, which says what angles should be; 0: another group.

    Returns:
        {"forgetting": {"fails", "points"}, ...}, and "half_step" with its own `fails` and the planes that it is about.
        What cannot be predicted is {"absent": why}.
    """
    length, (before, state, shown) = batch.tokens_BL.shape[1], before_last(model, params, batch)
    if why := no_memory(model, shown):
        return {name: {"absent": why} for name in (*CAUSES, "half_step")}
    planes = planes_of(model, state, shown, before, order) if order else []
    changes, chosen, read = changes_of(shown, planes), half_step.carriers(planes, order), reader(model, batch, chance)
    found = {"half_step": half_step.prediction(chosen, shown, order)}
    lengths = sorted({round(length * 2 ** (step / 8)) for step in range(8 * OCTAVES + 1)})
    for cause, (decays, turns) in CAUSES.items():
        if turns and not chosen:
            found[cause] = {"absent": found["half_step"]["absent"]}
            continue
        more = [(x, x - length) for x in lengths]
        points = [(x, read(params, state, changes, decays * k, turns * k)) for x, k in more]
        found[cause] = {"fails": crossing(points), "points": points}
    return found


def restored(model: LanguageModel, params, batch: Batch, chance: float, trained: int) -> dict:
    """Return scaled accuracies of the last token of rows past the trained length: as it is, and with memory restored.

    The memory of the beginning is scaled back to its size at the trained length, in heads whose horizon is over a
    quarter of that length: in faster ones what is left of it is less than the noise of the mean.
    """
    length, (_, state, shown) = batch.tokens_BL.shape[1], before_last(model, params, batch)
    if why := no_memory(model, shown):
        return {"absent": why}
    changes = [Change(jnp.where(x.log_a_H > -4 / trained, x.log_a_H, 0), None) for x in changes_of(shown, [])]
    read = reader(model, batch, chance)
    as_it_is, scaled_back = (read(params, state, changes, k, 0) for k in (0, trained - length))
    return {"length": length, "as_it_is": as_it_is, "scaled_back": scaled_back}


def before_last(model: LanguageModel, params, batch: Batch) -> tuple[Batch, dict, list[dict]]:
    """Return rows without their last token, the state that these leave, and what every layer shows."""
    before = Batch._make(x[:, :-1] for x in batch)
    return before, *jax.jit(functools.partial(shown_by, model))(params, before.tokens_BL, before.start_BL, None)


def no_memory(model: LanguageModel, shown: list[dict]) -> str:
    """Return why the memory of the beginning is not known, which is so if a layer does not only decay it; else ""."""
    for mixer, layer in zip(mixer_names(model.config.pattern), shown, strict=True):
        if "log_a" not in layer or "b" in layer:
            return f"the memory of {mixer} is not one that decays head by head and else stands still"
    return ""


def reader(model: LanguageModel, batch: Batch, chance: float):
    """Return a function that moves the memory (`with_memory_moved`) and gives the last token's scaled accuracy then."""

    @jax.jit
    def right(params, state, changes, decayed, turned):
        moved = with_memory_moved(model, state, changes, decayed, turned, batch.tokens_BL[:, 0])
        logits_BLV, _ = model.apply({"params": params}, batch.tokens_BL[:, -1:], moved, None)
        likeliest_B = jnp.argmax(logits_BLV[:, 0, : model.config.vocab_size], axis=-1)
        return (jnp.mean(likeliest_B == batch.targets_BL[:, -1]) - chance) / (1 - chance)

    return lambda *given: float(right(*given))


def with_memory_moved(model: LanguageModel, state, changes: list[Change], decayed, turned, first_B):
    """Return the state with the memory of the beginning decayed by `decayed` and turned by `turned` more tokens.

    A query sees keys by the angle between them, so an error of rotations makes the memory appear turned back by it.
    """
    new, layer = {}, 0
    for index, (unit, repeats) in enumerate(segments(model.config.pattern)):
        name, new[f"segment_{index}"] = f"segment_{index}", {}
        for place, mixer in enumerate(mixer_names(unit)):
            before = state[name][f"block_{place}"]
            own = changes[layer + place : layer + len(unit) * repeats : len(unit)]
            change = jax.tree.map(lambda *each: jnp.stack(each), *own)  # of the repeats
            h = MIXERS[mixer].memory(before)  # (repeats, B, H, P, N)
            memory = beginning(h, first_B)
            after = jnp.exp(decayed * change.log_a_H)[:, None, :, None, None] * memory
            if change.angle_HS is not None:
                after = rotate(after, -turned * change.angle_HS[:, None, :, None], pairing(model.config))
            new[name][f"block_{place}"] = jax.tree.map(lambda x: h - memory + after if x is h else x, before)  # noqa: B023
        layer += len(unit) * repeats
    return new


def beginning(h, first_B):
    """Return the mean of h (..., B, H, P, N) over the rows that begin with the same token, in each of them."""
    alike_BB = (first_B[:, None] == first_B).astype(h.dtype)
    return jnp.einsum("bc,...chpn->...bhpn", alike_BB / alike_BB.sum(axis=1, keepdims=True), h, precision="highest")


def changes_of(shown: list[dict], planes: list[dict]) -> list[Change]:
    """Return every layer's change by one token: its mean decay, and the drift of `planes` that tell products apart."""
    drift = {
        (plane["layer"], plane["head"], plane["plane"]): plane["drift"] for plane in planes if half_step.tells(plane)
    }
    changes = []
    for index, layer in enumerate(shown):
        angle_HS = None
        if "angle" in layer:
            sizes = (layer["log_a"].shape[2], layer["angle"].shape[3])
            angle_HS = np.array([drift.get((index, *at), 0.0) for at in np.ndindex(sizes)], np.float32).reshape(sizes)
        changes.append(Change(log_a_H=layer["log_a"].mean(axis=(0, 1)), angle_HS=angle_HS))
    return changes


def planes_of(model: LanguageModel, state, shown: list[dict], batch: Batch, order: int) -> list[dict]:
    """Return every plane that rotates by angles: where it is, how much it remembers, its angles' errors in Z_n."""
    found = []
    for index, (layer, h_BHPN) in enumerate(zip(shown, memories(model.config, state), strict=True)):
        if "angle" in layer:
            rotation_BLHS = np.asarray(layer["angle"] * layer["dt"][..., None], np.float64)
            errors = half_step.angle_errors(rotation_BLHS, np.asarray(batch.tokens_BL), order)
            first_B, planes = jnp.asarray(batch.tokens_BL[:, 0]), rotation_BLHS.shape[3]
            memory_HS, whole_HS = (
                energy_HS(to_planes(x, planes, pairing(model.config)), planes)
                for x in (beginning(h_BHPN, first_B), h_BHPN)
            )
            for head, plane in np.ndindex(memory_HS.shape):
                share = float(memory_HS[head, plane] / whole_HS[head, plane]) if whole_HS[head, plane] else 0.0
                place = {"layer": index, "head": head, "plane": plane, "memory": share}
                found.append(place | errors.of_plane(head, plane))
    return found


def energy_HS(x_BHPN, planes: int) -> np.ndarray:
    """Return the mean square of every plane of (B, H, P, N) in plane order."""
    x_BHPN = np.square(np.asarray(x_BHPN))
    return (x_BHPN[..., :planes] + x_BHPN[..., planes : 2 * planes]).mean(axis=(0, 2))

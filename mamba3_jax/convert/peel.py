"""Undo what savers add around the official tensors or leave out: all that is known is listed here, and printed if met.

Wrappers are the dicts that a training loop saves around its state dict. Prefixes come from modules around the model.
Buffers are tensors that are not weights. Savers that refuse shared memory leave a tied head out.
"""

from collections.abc import Callable, Mapping

import numpy as np

from mamba3_jax.config import listed

WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
# Entries beside a wrapped state dict that may hold tensors; none of these is a weight of the model.
BESIDE = {
    "amp_scaling_state",
    "callbacks",
    "cuda_rng_state",
    "grad_scaler",
    "loops",
    "lr_scheduler",
    "lr_schedulers",
    "native_amp_scaling_state",
    "optim",
    "optimizer",
    "optimizer_state_dict",
    "optimizer_states",
    "optimizers",
    "random_rng_state",
    "rng_state",
    "scaler",
    "scheduler",
    "torch_rng_state",
}
# Parts that DataParallel, torch.compile, FSDP, activation checkpoints and Lightning modules add to a tensor's name. No
# official name has one of them as a part.
WRAPPED = ("module", "_orig_mod", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Last parts of the names of buffers, which are computed or counted, not learned. The last two are left by a profiler.
BUFFERS = (
    "inv_freq",
    "cos_cached",
    "sin_cached",
    "position_ids",
    "num_batches_tracked",
    "n_averaged",
    "total_ops",
    "total_params",
)
TIED = ("backbone.embedding.weight", "lm_head.weight")


def unwrap(held, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Take the dict of tensors that a file holds out of the `WRAPPERS` around it.

    Raises:
        ValueError: there is no dict of tensors, there are two, or there are tensors of unknown use beside it.
    """
    for _ in WRAPPERS:  # as deep as they can be stacked, and no deeper: a dict can hold itself
        inside = [key for key in WRAPPERS if isinstance(held, dict) and has_tensors(held.get(key), nested=True)]
        if not inside:
            break
        if len(inside) > 1:
            raise ValueError(f"which of {inside} is the model? Wanted one of them")
        beside = [key for key in held if key != inside[0]]
        if unknown := [repr(key) for key in beside if key not in BESIDE and has_tensors(held[key])]:
            raise ValueError(f"tensors of unknown use stand beside {inside[0]!r}: {listed(unknown)}")
        ignored = f", without {listed(map(repr, beside))} beside it" if beside else ""
        say(f"took the tensors out of {inside[0]!r}{ignored}")
        held = held[inside[0]]
    if not isinstance(held, dict):
        raise ValueError(f"wanted a dict of tensors, it holds {type(held).__name__}")
    if strangers := [repr(key) for key, value in held.items() if not isinstance(value, np.ndarray)]:
        raise ValueError(f"wanted a dict of tensors; {len(strangers)} are not tensors: {listed(strangers)}")
    if odd := [repr(key) for key in held if not isinstance(key, str)]:
        raise ValueError(f"wanted tensors by name; these names are not strings: {listed(odd)}")
    return dict(held)


def has_tensors(held, nested: bool = False) -> bool:
    """Tell whether there is a tensor anywhere in lists, tuples and dicts; `nested`: only if the outermost is a dict."""
    if nested and not isinstance(held, dict):
        return False
    left, seen = [held], set()
    while left:
        value = left.pop()
        if isinstance(value, np.ndarray):
            return True
        if id(value) not in seen and isinstance(value, list | tuple | dict):
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
    return False


def peel(tensors: Mapping, wanted: Mapping, tied: bool, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Return the tensors under their official names, without buffers, with both names of a tied head.

    Args:
        tensors: as a file has them.
        wanted: the official names of the model; a name that is none of them, peeled or not, stays as it is.
        tied: whether the head is the embedding.
        say: called with a line for everything that is done.

    Raises:
        ValueError: two names that are one without their prefixes.
    """
    peeled, sources, dropped, count = {}, {}, set(), 0
    for name, tensor in tensors.items():
        parts = name.split(".")
        short = ".".join(part for part in parts if part not in WRAPPED)
        target = short if short in wanted else name
        if target in peeled:
            raise ValueError(f"{sources[target]} and {name} are both {target}: which is the model's?")
        peeled[target], sources[target] = tensor, name
        if target != name:
            dropped, count = dropped | set(parts) & set(WRAPPED), count + 1
    if count:
        parts = " and ".join(f"{part}." for part in WRAPPED if part in dropped)
        say(f"dropped {parts} from {count} names")
    buffers = [name for name in peeled if name.split(".")[-1] in BUFFERS and name not in wanted]
    if buffers:
        say(f"ignored {len(buffers)} buffers ({listed(buffers)})")
    peeled = {name: tensor for name, tensor in peeled.items() if name not in buffers}
    absent = [name for name in TIED if name not in peeled]
    if tied and len(absent) == 1:
        (there,) = set(TIED) - set(absent)
        peeled[absent[0]] = peeled[there]
        say(f"took {absent[0]}, which is not in the file, from {there}, to which it is tied")
    return peeled

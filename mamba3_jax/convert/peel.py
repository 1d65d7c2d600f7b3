"""What savers put around the official tensors or leave out. All that is known is listed here, and what is done is said.

Wrappers are the dicts that a training loop saves around its state dict; prefixes come from modules around the model;
buffers are tensors that no weight is; a tied head is left out by savers that refuse shared memory.
"""

from collections.abc import Callable, Mapping

import numpy as np

from mamba3_jax.config import listed

WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
# What may hold tensors beside a wrapped state dict: none of them is a weight of the model.
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
# Names that DataParallel, torch.compile, FSDP, activation checkpoints and Lightning modules put into a tensor's. No
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
    """Return the dict of tensors in what a file holds, out of the `WRAPPERS` around it.

    Raises:
        ValueError: no dict of tensors there, two of them, or tensors beside it that are not known.
    """
    for _ in WRAPPERS:  # as deep as they can be stacked; a dict can hold itself
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
    """Whether a tensor is anywhere in lists, tuples and dicts; `nested`: in a dict, which a tensor alone is not."""
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
        say: takes a line for all that is done.

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

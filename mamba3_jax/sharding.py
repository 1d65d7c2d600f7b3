"""Where arrays live: a mesh of devices, and the rules from logical axis names to its axes."""

import contextlib
import math
import re

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import boxed_shapes
from mamba3_jax.ops.sharded import Axes, axes_of

# Logical axes that are split, and the axes of the mesh that split them; any other axis is whole on every device. What
# heads share (the columns of in_kq_angle, norms) is not here: tensor parallelism replicates it. `embed` is the model's
# width in a parameter. By it fsdp splits all large parameters, their gradients and the optimizer's moments. In
# activations that axis has no name, since fsdp splits their rows. On TPUs a device's part of `embed` should be a
# multiple of 128, the lanes of a register: else XLA sums whole gradients over fsdp instead of scattering them.
RULES = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ff": ("tensor",),
    "vocab": ("tensor",),
}
AXES = tuple(dict.fromkeys(axis for axes in RULES.values() for axis in axes))
SIZE = re.compile(r"-1|[1-9]\d*(x[1-9]\d*)?")  # of an axis in a specification; 2x8: over 2 slices, 8 devices in each
# The logical axes behind the letters in the names of a state's arrays, such as ssm_BHPN.
LETTERS = {"B": "batch", "H": "heads", "K": "kv_heads", "I": "ff"}


def make_mesh(spec: str, devices=None) -> Mesh:
    """Return the mesh of "axis:size, ..." over all devices, e.g. "data:-1" or "fsdp:2,tensor:4"; -1 takes what is left.

    On a torus an axis may take parts of the physical axes. Several slices of TPUs, or hosts of GPUs, are joined by a
    network that is slower than the links inside one. A size says which axis lies over them: "fsdp:2x8" lies over 2
    slices, with 8 devices in each. `data` lies over the slices that no size names.

    Raises:
        ValueError: an unknown axis, or sizes whose product is not the number of devices or of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, over = _sizes(spec, len(devices))
    # jaxlib gives TPUs the number of their slice, GPUs that of their host (or NVLink domain), and CPUs none.
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices % math.prod(over.values()) or ("data" in over and math.prod(over.values()) != slices):
        raise ValueError(f"mesh={spec!r} is over {math.prod(over.values())} slices, and the devices are of {slices}")
    over.setdefault("data", slices // math.prod(over.values()))
    if sizes.get("data", 1) % over["data"]:
        data = f"data={sizes.get('data', 1)} is not a multiple of the {over['data']} slices that it would lie over"
        raise ValueError(f"mesh={spec!r}: {data}; fsdp:{over['data']}x4, say, lays fsdp over them, 4 in each")
    across = [over.get(name, 1) for name in sizes]
    within = [size // parts for size, parts in zip(sizes.values(), across, strict=True)]
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _sizes(spec: str, n_devices: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the size of each axis of a specification, and over how many slices an axis lies, for those that say it."""
    sizes, over = {}, {}
    for part in spec.split(","):
        name, _, size = part.strip().partition(":")
        if name not in AXES or name in sizes or not SIZE.fullmatch(size):
            axes = ", ".join(AXES)
            raise ValueError(f"mesh={spec!r}: {part.strip()!r} is not axis:size with an axis of {axes}, each once")
        sizes[name] = math.prod(map(int, size.split("x")))
        if "x" in size:
            over[name] = int(size.partition("x")[0])
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh={spec!r} has more than one -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: n_devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != n_devices:
        raise ValueError(f"mesh={spec!r} does not make up the {n_devices} devices there are")
    return sizes, over


def rules(mesh: Mesh) -> tuple[tuple[str, Axes], ...]:
    """Return `RULES` for flax, with only those axes that this mesh has; a logical axis that has none is not split.

    For a mesh without any of the axes there are no rules, and flax constrains nothing.
    """
    if not set(AXES) & set(mesh.axis_names):
        return ()
    return tuple((name, _one_or_all(axis for axis in RULES[name] if axis in mesh.axis_names)) for name in RULES)


def without(axes: Axes, axis: str) -> Axes:
    """Return the axes without one of them."""
    return _one_or_all(other for other in axes_of(axes) if other != axis)


def _one_or_all(axes) -> Axes:
    axes = tuple(axes)
    return axes if len(axes) > 1 else next(iter(axes), None)


def parts(mesh: Mesh, name: str) -> int:
    """Return into how many parts a logical axis is split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES[name])


def spec_of(names, mesh: Mesh) -> PartitionSpec:
    """Return how an array is split whose axes have these logical names; None: the axis has no name.

    Raises:
        ValueError: one axis of the mesh would split two axes of the array.
    """
    split, by = dict(rules(mesh)), {}
    for name in names:
        for axis in RULES.get(name, ()):
            if axis in mesh.axis_names and axis in by:
                raise ValueError(f"{by[axis]!r} and {name!r} are axes of one array, and both are split over {axis!r}")
            by[axis] = name
    return PartitionSpec(*(split.get(name) for name in names))


def split_over(mesh: Mesh, *names: str | None) -> NamedSharding:
    """Return the sharding of arrays whose first axes have these logical names; later axes are not split."""
    spec = list(spec_of(names, mesh))
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


@contextlib.contextmanager
def using(mesh: Mesh):
    """Constrain what is traced inside to the mesh: `with using(mesh): step(...)`, where step is under jax.jit."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh)):
        yield mesh


def param_shardings(config: ModelConfig, mesh: Mesh):
    """Return the tree of parameters with a NamedSharding for each.

    Raises:
        ValueError: the mesh does not divide an axis of a parameter.
    """
    boxed = boxed_shapes(config)

    def place(path, names, shape):
        try:
            return sharding_of(names, shape.shape, mesh)
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {error}") from None

    names = nn.get_partition_spec(boxed)
    return jax.tree_util.tree_map_with_path(
        place, names, nn.meta.unbox(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def sharding_of(names, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return the sharding of one array.

    Raises:
        ValueError: the mesh does not divide an axis; see `spec_of` too.
    """
    spec = spec_of(names, mesh)
    for name, size in zip(names, shape, strict=True):
        if name in RULES and size % parts(mesh, name):
            over = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES[name] if axis in mesh.axis_names)
            raise ValueError(f"{name!r} is an axis of {size}, not a multiple of the mesh's {over}")
    return NamedSharding(mesh, spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays (B, L, ...): tokens, targets, weights, start, logits."""
    return split_over(mesh, "batch", "length")


def state_shardings(state, mesh: Mesh):
    """Return the tree of a model's state, given by its shapes, with a NamedSharding for each array.

    Rows and heads are split. The letters of a field's name are its last axes; axes before them are repeats. An array
    without letters is not split, nor is an axis that the mesh does not divide, such as fewer rows than devices.
    """

    def place(path, array):
        letters = getattr(path[-1], "name", "").rpartition("_")[2]
        letters = letters if letters.isupper() else ""
        names = [None] * (array.ndim - len(letters)) + [LETTERS.get(letter) for letter in letters]
        pairs = zip(names, array.shape, strict=True)
        return split_over(mesh, *(name if name and size % parts(mesh, name) == 0 else None for name, size in pairs))

    return jax.tree_util.tree_map_with_path(place, state)


def loading(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Return (index, count) of a process (None: this one) among those that load different rows of a batch.

    Processes whose devices hold the same rows load the same. Where the rows of two overlap in part, all load all rows.
    """
    rows = [axis for axis in RULES["batch"] if axis in mesh.axis_names]
    held: dict[int, set[tuple[int, ...]]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        by_axis = dict(zip(mesh.axis_names, place, strict=True))
        held.setdefault(device.process_index, set()).add(tuple(by_axis[axis] for axis in rows))
    groups = sorted({tuple(sorted(places)) for places in held.values()})
    if sum(map(len, groups)) != parts(mesh, "batch") or len({len(group) for group in groups}) > 1:
        return 0, 1
    own = held[jax.process_index() if process is None else process]
    return groups.index(tuple(sorted(own))), len(groups)

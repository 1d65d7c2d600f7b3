"""Where arrays live: a mesh of devices, and the rules from logical axis names to its axes."""

import contextlib
import math

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import boxed_shapes

# Logical axes that are split, each over one axis of the mesh; every other is whole on every device. What heads share
# (the columns of in_kq_angle, norms, the state) is not here: tensor parallelism replicates it.
RULES = {"batch": "data", "heads": "tensor", "kv_heads": "tensor", "ff": "tensor", "vocab": "tensor"}


def make_mesh(spec: str, devices=None) -> Mesh:
    """Return the mesh of "axis:size, ..." over all devices, e.g. "data:-1" or "data:2,tensor:4"; -1 takes what is left.

    Raises:
        ValueError: an unknown axis, or sizes that do not make up the devices there are.
    """
    devices = jax.devices() if devices is None else devices
    axes = sorted(set(RULES.values()))
    sizes = {}
    for part in spec.split(","):
        name, _, size = part.strip().partition(":")
        if name not in axes or name in sizes or not size.lstrip("-").isdigit() or (int(size) < 1 and int(size) != -1):
            raise ValueError(f"mesh={spec!r}: {part.strip()!r} is not axis:size with an axis of {axes}, each once")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh={spec!r} has more than one -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh={spec!r} does not make up the {len(devices)} devices there are")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)


def rules(mesh: Mesh) -> tuple[tuple[str, str | None], ...]:
    """`RULES` for flax: a logical axis whose mesh axis is not in this mesh is not split.

    A mesh that splits none has no rules: flax then constrains nothing.
    """
    if not set(RULES.values()) & set(mesh.axis_names):
        return ()
    return tuple((name, axis if axis in mesh.axis_names else None) for name, axis in RULES.items())


@contextlib.contextmanager
def using(mesh: Mesh):
    """Inside, what is traced is constrained to the mesh: `with using(mesh): step(...)`, step under jax.jit."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh)):
        yield mesh


def param_shardings(config: ModelConfig, mesh: Mesh):
    """Return a NamedSharding for every parameter, in the shape of the parameter tree.

    Raises:
        ValueError: an axis that its mesh axis does not divide.
    """
    shapes = boxed_shapes(config)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh, rules(mesh))

    def check(path, shape, sharding):
        for size, axis in zip(shape.shape, sharding.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"{name} has an axis of {size}, not a multiple of {axis}={mesh.shape[axis]}")

    jax.tree_util.tree_map_with_path(check, nn.meta.unbox(shapes), shardings)
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch: tokens, targets, weights, start, logits."""
    return NamedSharding(mesh, PartitionSpec(dict(rules(mesh)).get("batch")))


def state_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a model's state: first the repeats, then the batch."""
    return NamedSharding(mesh, PartitionSpec(None, dict(rules(mesh)).get("batch")))

"""Add up what must be in memory at once, before anything is allocated, and compare it with what is free.

The sums have only what is certain to exist; kernels and compilers take more. What does not fit here cannot run.
"""

import math
from collections.abc import Callable
from pathlib import Path

import jax

from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.model import padded_vocab
from mamba3_jax.ops.cross_entropy import TILE
from mamba3_jax.presets import parameter_count

CGROUPS = Path("/sys/fs/cgroup")


def fit(parts: dict[str, int], where: str, free: int | None) -> None:
    """Raise ValueError, with the sum and its parts, where parts in bytes are more than is free; None: not known."""
    total = sum(parts.values())
    if free is not None and total > free:
        listed = ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)
        raise ValueError(f"not enough memory: {readable(total)} needed on {where}, {readable(free)} free: {listed}")


def fit_device(parts: dict[str, int]) -> None:
    """Raise ValueError, as `fit` does, where the parts do not fit into each of this process's devices."""
    device, count = jax.local_devices()[0], jax.local_device_count()
    where = f"each {device.device_kind}"
    if device.platform == "cpu":
        where = "this machine" if count == 1 else f"each of this machine's {count} devices"
    fit(parts, where, free_on_device())


def free_on_device() -> int | None:
    """Return the bytes that are free on each of this process's devices; CPU devices share the host's. None: unknown."""
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    free = free_on_host() if device.platform == "cpu" else None
    return free if free is None else free // jax.local_device_count()


def of_program(compiled) -> int:
    """Count the bytes that a compiled program holds on a device at once: arguments, results and temporaries."""
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return held + plan.temp_size_in_bytes


def of_device() -> int | None:
    """Return the bytes of a device that this process may use; None where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else None


def readable(size: int) -> str:
    """Write 1234567 as 1.23 MB."""
    power = min((len(str(size)) - 1) // 3, 6)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"


def free_on_host() -> int | None:
    """Return the bytes that the system and its control groups leave to this process; None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for _, controllers, path in groups:
        if controllers in ("", "memory"):
            root = CGROUPS / controllers
            folder = root / path.lstrip("/")
            for group in (folder, *folder.parents):  # a group's limit holds for the groups below it too
                free += free_in(group)
                if group == root:
                    break
    return min(free, default=None)


def free_in(group: Path) -> list[int]:
    """Return [the bytes that a control group leaves], [] where it has no limit. The cache of files counts as free."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = int((group / limit).read_text()), int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # the group is of the other version of control groups, or its limit is "max"
            continue
        return [max(0, most - taken + int(stat.get(cache, 0)))]
    return []


def on_a_device(shapes) -> int:
    """Count the bytes of a tree of shapes on one device: of an array that has a sharding those of a shard."""

    def held(x):
        sharding = getattr(x, "sharding", None)
        return math.prod(sharding.shard_shape(x.shape) if sharding else x.shape) * x.dtype.itemsize

    return sum(map(held, jax.tree.leaves(shapes)))


def training(config: Config, state, batch) -> dict[str, int]:
    """Count the bytes of one training step on one device, from the shapes of state and batch with shardings."""
    model = config.model
    *_, rows, length = batch.tokens_BL.sharding.shard_shape(batch.tokens_BL.shape)
    tensor = dict(batch.tokens_BL.sharding.mesh.shape).get("tensor", 1)
    runs = math.prod(state.step.sharding.shard_shape(state.step.shape))  # of a population, those on one device
    tokens = runs * (rows // config.optimizer.accumulate) * length
    width = 4 if model.residual_in_fp32 or model.compute_dtype == "float32" else 2
    parameters = on_a_device(state.params)
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer state": on_a_device(state.opt_state),
        "batch": on_a_device(batch),
        "logits": min(tokens * padded_vocab(model) // tensor, TILE) * 4,
        "inputs of the layers": tokens * model.d_model * len(model.pattern) * width,
    }


def validation(config: Config, hosts: int) -> dict[str, int]:
    """Count the bytes of the validation batches that each host keeps; 0 for text, which is not read yet."""
    train, data = config.train, config.data
    batches = min(train.eval_batches, -(-data.valid_rows // data.batch)) if data.source in TASKS else 0
    return {"validation batches": batches * data.batch // hosts * data.length * 13 if train.eval_every else 0}


def parameters(config: ModelConfig) -> dict[str, int]:
    """Count the bytes of the parameters alone, whole on one device."""
    return {"parameters": 4 * parameter_count(config)}


def fitting_rows(rows: int, needed: Callable[[int], dict[str, int]]) -> int:
    """Halve rows until what they need fits into each device; ValueError, as `fit` has it, where one row does not."""
    free = free_on_device()
    while rows > 1 and free is not None and sum(needed(rows).values()) > free:
        rows //= 2
    fit_device(needed(rows))
    return rows


def carrying(model, rows: int, length: int, piece: int = 1) -> dict[str, int]:
    """Count the bytes, beside the parameters, of running rows of `length` tokens in pieces with the state carried."""
    return {
        "state": on_a_device(jax.eval_shape(lambda: model.empty_state(rows, length))),
        "ids": rows * length * 4,
        "logits": rows * piece * padded_vocab(model.config) * 4,
    }

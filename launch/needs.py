"""Compile a step for TPUs that need not be there, and say what its program needs of each of them. Nothing runs."""

import functools
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch import hlo, tpu
from mamba3_jax import decoding, memory
from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.model import LanguageModel, segments
from mamba3_jax.sharding import make_mesh, param_shardings, parts, split_over, state_shardings, using
from mamba3_jax.train.fit import Failed, fitting, validate
from mamba3_jax.train.flops import flops_per_token
from mamba3_jax.train.step import batch_shapes, state_shapes, train_step

# The part of the width that fsdp leaves each device should be a multiple of this. With 64 or 192, v5e's compiler summed
# the gradients of matrices whose last axis is the width on every device, which sends twice what scattering them does;
# with 128 and 256 it scattered all.
LANES = 128


def measured(config: Config, topology: str, what: str = "train") -> dict:
    """Compile the step, and return what it needs of each device: GB, GFLOP, and times in ms.

    `collectives` has a row for each kind and number of devices that share an array: how often it runs, the GB of the
    whole arrays, the GB that a device sends, and whether they go to other slices (`dcn`).

    Raises:
        ValueError: there is no such topology, mesh or config, or what must be in memory at once does not fit.
        Failed: the program does not fit into memory.
    """
    mesh = make_mesh(config.train.mesh, tpu.devices_of(topology))
    validate(config, mesh)
    chip, begin = tpu.chip_of(topology), time.perf_counter()
    program, remat = PROGRAMS[what](config, mesh, chip)
    seconds, plan, text = time.perf_counter() - begin, program.memory_analysis(), hlo.Program(program.as_text())
    row = {
        "devices": mesh.size,
        "remat": remat,
        "width": config.model.d_model // fsdp if (fsdp := parts(mesh, "embed")) > 1 else None,
        "compile_s": seconds,
        "arguments_gb": plan.argument_size_in_bytes / 1e9,
        "outputs_gb": plan.output_size_in_bytes / 1e9,
        "aliased_gb": plan.alias_size_in_bytes / 1e9,
        "temporaries_gb": plan.temp_size_in_bytes / 1e9,
        "peak_gb": plan.peak_memory_in_bytes / 1e9,  # by the compiler's plan, in which not all is there at once
        "held_gb": memory.of_program(program) / 1e9,
        "kernels": sorted({re.sub(r"[.\d]+$", "", name) for name in text.kernels()}),
        "gflop": text.operations() / 1e9,
        "hbm_gb": text.cost().hbm_bytes / 1e9,
        "collectives": _added(text.collectives()),
    }
    return row | roofline(row, model_gflop(config, what) / mesh.size, chip)


def _added(collectives: list[hlo.Collective]) -> list[dict]:
    """Return a row for each kind, number of devices and network, the one that sends most first."""
    rows = {}
    for each in collectives:
        nothing = {"kind": each.kind, "devices": each.devices, "dcn": each.dcn, "times": 0, "gb": 0.0, "sent_gb": 0.0}
        row = rows.setdefault((each.kind, each.devices, each.dcn), nothing)
        row["times"] += each.times
        row["gb"] += each.times * each.array_bytes / 1e9
        row["sent_gb"] += each.sent / 1e9
    return sorted(rows.values(), key=lambda row: -row["sent_gb"])


def model_gflop(config: Config, what: str) -> float:
    """Return what the mathematics of a step needs, in GFLOP over all devices."""
    tokens = config.data.batch * (config.data.length if what == "train" else 1)
    passes = 1 if what == "train" else 1 / 3  # forward alone
    return passes * tokens * flops_per_token(config.model, config.data.length) / 1e9


def roofline(row: dict, gflop: float, chip: tpu.Chip) -> dict:
    """Return the least time that each resource takes, in ms, and the MFU if all work at once or one after the other.

    Args:
        row: a device's `gflop`, `hbm_gb` and `collectives`; those between slices cross the data center's network.
        gflop: what the mathematics needs of a device.
        chip: the device's peaks.
    """
    sent, abroad = (sum(each["sent_gb"] for each in row["collectives"] if each["dcn"] is dcn) for dcn in (False, True))
    times = {
        "compute_ms": row["gflop"] / chip.tera_flops,
        "hbm_ms": 1e3 * row["hbm_gb"] / chip.gb_s,
        "ici_ms": 1e3 * sent / chip.ici_gb_s,
        "dcn_ms": 1e3 * abroad / chip.dcn_gb_s if abroad else 0.0,
    }
    needed = gflop / chip.tera_flops
    return times | {
        "model_gflop": gflop,
        "sent_gb": sent,
        "dcn_gb": abroad,
        "limit": max(times, key=times.get).removesuffix("_ms"),
        "mfu_at_once": needed / max(times.values()),
        "mfu_in_turn": needed / sum(times.values()),
    }


def training(config: Config, mesh: Mesh, chip: tpu.Chip):
    """Return (program, remat) of the step as `Trainer` compiles it."""
    shapes, batch = state_shapes(config, mesh), batch_shapes(config.data, mesh)
    where = f"each of {mesh.size} devices {mesh.devices.flat[0].device_kind}"
    memory.fit(memory.training(config, shapes, batch), where, int(chip.hbm_gb * 2**30))
    with using(mesh):
        return fitting(lambda run: functools.partial(train_step, run), config, shapes, batch, limit=None)


def decode(config: Config, mesh: Mesh, chip: tpu.Chip):
    """Return (program, "") of `decoding.step` as `generate` runs it: on prepared parameters, the state in place."""
    model, rows = config.model, config.data.batch
    shardings = _prepared(model, mesh)
    params = jax.eval_shape(functools.partial(decoding.prepare, model), state_shapes(config, mesh).params)
    state = jax.eval_shape(lambda: LanguageModel(model, stacked=False).empty_state(rows, config.data.length))
    given = {"token_B": jax.ShapeDtypeStruct((rows,), jnp.int32), "start_B": jax.ShapeDtypeStruct((rows,), bool)}
    params, state, given = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        (params, state, given),
        (shardings, state_shardings(state, mesh), dict.fromkeys(given, split_over(mesh, "batch"))),
    )
    held = {"parameters": memory.on_a_device(params), "state": memory.on_a_device(state)}
    memory.fit(held, f"each of {mesh.size} devices", int(chip.hbm_gb * 2**30))
    step = jax.jit(functools.partial(decoding.step, model), donate_argnums=2)
    try:
        with using(mesh):
            return step.lower(params, given["token_B"], state, given["start_B"]).compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Failed(f"decoding data.batch={rows} does not fit: {str(error).splitlines()[0]}") from error


def _prepared(config: ModelConfig, mesh: Mesh) -> dict:
    """Return the shardings of prepared parameters: those of the public ones, without the axis of repeats."""
    public = param_shardings(config, mesh)
    shardings = public | ({"head": public["embedding"]} if config.tie_embeddings else {})
    for index, (_, repeats) in enumerate(segments(config.pattern)):
        name = f"segment_{index}"
        one = jax.tree.map(lambda stacked: NamedSharding(mesh, PartitionSpec(*stacked.spec[1:])), public[name])
        shardings[name] = {f"repeat_{repeat}": one for repeat in range(repeats)}
    return shardings


PROGRAMS = {"train": training, "decode": decode}


def lines(row: dict) -> list[str]:
    """Return a row of `measured` as lines for a reader."""

    def size(gb: float) -> str:
        return memory.readable(round(gb * 1e9))

    kinds = ", ".join(
        f"{name} {size(row[f'{name}_gb'])}" for name in ("arguments", "outputs", "aliased", "temporaries")
    )
    exchanged = [
        f"{each['kind']} of {each['devices']}{' slices' if each['dcn'] else ''}, {each['times']} x: "
        f"{size(each['gb'])}, {size(each['sent_gb'])} sent"
        for each in row["collectives"]
    ]
    remat = f", remat={row['remat']!r}" if row["remat"] else ""
    times = {name: f"{row[f'{name}_ms']:.3g}" for name in ("compute", "hbm", "ici", "dcn")}
    abroad = f", {times['dcn']} between slices" if row["dcn_gb"] else ""
    narrow = (
        f"fsdp         leaves a device {row['width']} of the width; of multiples of {LANES} XLA scatters all gradients"
    )
    return [
        f"compiled in {row['compile_s']:.1f} s{remat}; of each of {row['devices']} devices, a step:",
        f"memory       {size(row['peak_gb'])} at the peak: {kinds}",
        f"kernels      {', '.join(row['kernels']) or 'none'}",
        f"operations   {row['gflop'] / 1e3:.3g} TFLOP of products, {row['model_gflop'] / 1e3:.3g} that the model needs",
        f"HBM          {size(row['hbm_gb'])} read and written",
        *(f"{'collectives' if not i else '':<12} {line}" for i, line in enumerate(exchanged or ["none"])),
        *([narrow] if row["width"] and row["width"] % LANES else []),
        f"least time   {times['compute']} ms compute, {times['hbm']} HBM, {times['ici']} interconnect{abroad}: "
        f"{row['limit']} limits",
        f"MFU at most  {row['mfu_at_once']:.1%} if all is at once, {row['mfu_in_turn']:.1%} if one after the other",
    ]

"""What limits a training step at 256, 4,096 and 32,768 chips, and the mesh to choose: arithmetic on recorded programs.

    python -m experiments.benchmarks.table     draws it from what experiments.benchmarks.pods has recorded

In a step a device has T tokens, of a model of P parameters. S slices of d f t devices each are a mesh of data S d, fsdp
f and tensor t. F is a device's peak, B the bandwidth of its HBM, W what it can send a second over all of its links, and
N what it can send to other slices (`launch/tpu.py` has their sources). The least times are, in seconds,

    compute   c T / F
    HBM       h T / B
    ICI       (a P/t (f-1)/f + 8 P/(f t) (d-1)/d + g T 2 (t-1)) / W
    DCN       k 8 P/(d f t) (S-1)/S / N

The coefficients are read from recorded programs. The one for that chip has c (operations a token), h (bytes a token), m
(bytes of temporaries a token) and a (bytes a parameter that are exchanged over fsdp). A program with the axis tensor
has g (bytes of activations a token that are summed over it). One of several slices has k (how often a device's part of
the gradients crosses slices); without such a program k is 1. Gradients are float32 and summed over data in a ring: 8
bytes a parameter.

A mesh is possible if it fits into memory, 16 P/(f t) + m T bytes with moments and gradients, has a row of 2,048 tokens
for each of its S d f groups, and leaves each device a multiple of `LANES` of the width. Of these the one is taken whose
longest time is the least. Compute covers what is sent from that T on from which it takes longer. The times are bounds:
the links of one axis are taken for all links of a chip, and latency is left out.
"""

import itertools
import math
from typing import NamedTuple

import jax
from flax.core import meta

from launch import tpu
from launch.needs import LANES
from mamba3_jax.model import boxed_shapes
from mamba3_jax.presets import PRESETS

MODEL, LENGTH = "siso-1.5b", 2048
# Tokens of a step by the number of chips. They are assumed: how large a batch the model can use is not known here.
TOKENS = {256: 2**19, 4096: 2**22, 32768: 2**24}
SLICE = {"v5e": 256, "v6e": 256, "v5p": 4096, "tpu7x": 4096}  # chips of the largest slice that is used
DEVICES = {"tpu7x": 2}  # of a chip where they are not one
HELD = 0.9  # of a device's memory, for what `memory_gb` counts
SIZES = [2**power for power in range(9)]


class Program(NamedTuple):
    """The coefficients of a recorded program, of one device."""

    chip: str
    flop: float  # c: a token
    hbm: float  # h: bytes a token
    temporaries: float  # m: bytes a token
    fsdp: float  # a: bytes a parameter
    tensor: float | None  # g: bytes a token; None: it has no such axis
    slices: float | None  # k; None: it has one slice


class Mesh(NamedTuple):
    """How many slices there are, and the sizes of the axes in each."""

    slices: int
    data: int
    fsdp: int
    tensor: int

    def __str__(self) -> str:
        sizes = {"data": self.slices * self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        return ",".join(f"{name}:{size}" for name, size in sizes.items() if size > 1)


def parameters() -> int:
    """Count the parameters of `MODEL`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(meta.unbox(boxed_shapes(PRESETS[MODEL]))))


def read(row: dict, n_parameters: int) -> Program:
    """Return the coefficients of a row of `pods`.

    A collective is of the axis tensor if its groups are as large as that axis, else of data if they are as large as
    data, else of fsdp. Those of data are not read: the formula has them.
    """
    axes = {name: int(size) for name, size in (axis.split(":") for axis in row["mesh"].split(","))}
    slices, one = tpu.slices_of(row["topology"])
    fsdp, tensor = axes["fsdp"], axes.get("tensor", 1)
    data = axes.get("data", 1) // slices
    tokens = row["batch"] * row["length"] / row["devices"]
    sent = {"fsdp": 0.0, "tensor": 0.0, "dcn": 0.0}
    for each in row["collectives"]:
        axis = "dcn" if each.get("dcn") else "tensor" if each["devices"] == tensor > 1 else "fsdp"
        if axis != "fsdp" or each["devices"] != data or data == 1:
            sent[axis] += 1e9 * each["sent_gb"]
    share = n_parameters / tensor * (fsdp - 1) / fsdp
    crossing = 8 * n_parameters / (row["devices"] / slices) * (slices - 1) / slices
    return Program(
        chip=one.partition(":")[0],
        flop=1e9 * row["gflop"] / tokens,
        hbm=1e9 * row["hbm_gb"] / tokens,
        temporaries=1e9 * row["temporaries_gb"] / tokens,
        fsdp=sent["fsdp"] / share,
        tensor=sent["tensor"] / (tokens * 2 * (tensor - 1)) if tensor > 1 else None,
        slices=sent["dcn"] / crossing if slices > 1 else None,
    )


def programs(rows: list[dict]) -> dict[str, Program]:
    """Return of each chip the program of one slice with the highest MFU; g and k are others' where it has none."""
    n_parameters = parameters()
    wanted = [row for row in rows if row["model"] == MODEL and row["length"] == LENGTH and "failed" not in row]
    wanted.sort(key=lambda row: row["mfu_in_turn"])
    found = [read(row, n_parameters) for row in wanted]
    tensor = next((program.tensor for program in found if program.tensor), None)
    slices = next((program.slices for program in found if program.slices), 1.0)
    best = {program.chip: program for program in found if program.slices is None}
    return {
        name: best[name]._replace(tensor=best[name].tensor or tensor, slices=slices)
        for name in tpu.CHIPS
        if name in best
    }


def times(program: Program, mesh: Mesh, tokens: float, n_parameters: int) -> dict[str, float]:
    """Return the least time of each resource, ms, with so many tokens a device."""
    chip, held = tpu.CHIPS[program.chip], n_parameters / (mesh.fsdp * mesh.tensor)
    ici = program.fsdp * n_parameters / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp
    ici += 8 * held * (mesh.data - 1) / mesh.data
    if mesh.tensor > 1:
        ici += program.tensor * tokens * 2 * (mesh.tensor - 1)
    dcn = program.slices * 8 * held / mesh.data * (mesh.slices - 1) / mesh.slices
    return {
        "compute_ms": program.flop * tokens / chip.tera_flops / 1e9,
        "hbm_ms": program.hbm * tokens / chip.gb_s / 1e6,
        "ici_ms": ici / chip.ici_gb_s / 1e6,
        "dcn_ms": dcn / chip.dcn_gb_s / 1e6,
    }


def covered(program: Program, mesh: Mesh, n_parameters: int) -> float | None:
    """Return from how many tokens a device on compute takes longer than what is sent; None: it never does."""
    nothing, one = (times(program, mesh, tokens, n_parameters) for tokens in (0, 1))
    needed = []
    for network in ("ici_ms", "dcn_ms"):
        gained = one["compute_ms"] - (one[network] - nothing[network])
        if gained <= 0:
            return None
        needed.append(nothing[network] / gained)
    return max(needed)


def memory_gb(program: Program, mesh: Mesh, tokens: float, n_parameters: int) -> float:
    """Return the GB that a device holds: parameters, two moments, gradients and temporaries."""
    return (16 * n_parameters / (mesh.fsdp * mesh.tensor) + program.temporaries * tokens) / 1e9


def meshes(program: Program, chips: int, tokens: int, n_parameters: int) -> list[Mesh]:
    """Return the meshes that are possible, see the module."""
    devices = chips * DEVICES.get(program.chip, 1)
    slices = max(1, chips // SLICE[program.chip])
    width, room = PRESETS[MODEL].d_model, HELD * tpu.CHIPS[program.chip].hbm_gb * 2**30 / 1e9
    found = []
    for fsdp, tensor in itertools.product(SIZES, SIZES[:4]):
        mesh = Mesh(slices, devices // slices // (fsdp * tensor), fsdp, tensor)
        groups = mesh.slices * mesh.data * fsdp
        if (tensor > 1 and not program.tensor) or not mesh.data or (fsdp > 1 and width % (fsdp * LANES)):
            continue
        if tokens / groups >= LENGTH and memory_gb(program, mesh, tokens / devices, n_parameters) < room:
            found.append(mesh)
    return found


def table(rows: list[dict]) -> list[dict]:
    """Return a row for each number of chips and each chip whose program is recorded."""
    n_parameters, found = parameters(), []
    for (chips, tokens), program in itertools.product(TOKENS.items(), programs(rows).values()):
        devices = chips * DEVICES.get(program.chip, 1)
        row = {"chips": f"{chips:,} {program.chip}", "tokens": f"{tokens / 2**20:g} M", "each": tokens // devices}
        fitting = meshes(program, chips, tokens, n_parameters)
        if not fitting:
            found.append(row | {"limit": "no mesh has a row for each group and fits"})
            continue
        took = {mesh: times(program, mesh, tokens / devices, n_parameters) for mesh in fitting}
        mesh = min(fitting, key=lambda mesh: (max(took[mesh].values()), sum(took[mesh].values())))
        enough = covered(program, mesh, n_parameters)
        needed = 6 * n_parameters * tokens / devices / tpu.CHIPS[program.chip].tera_flops / 1e9
        found.append(
            row
            | {"slices": mesh.slices, "mesh": str(mesh)}
            | {name: least or None for name, least in took[mesh].items()}
            | {"memory": memory_gb(program, mesh, tokens / devices, n_parameters)}
            | {"limit": max(took[mesh], key=took[mesh].get).removesuffix("_ms")}
            | {"at_once": f"{needed / max(took[mesh].values()):.0%}"}
            | {"in_turn": f"{needed / sum(took[mesh].values()):.0%}"}
            | {"covered": f"{enough * devices / 2**20:.3g} M" if enough is not None else "never"}
        )
    return found


COLUMNS = {
    "chips": "chips",
    "slices": "slices",
    "tokens a step": "tokens",
    "of a device": "each",
    "mesh": "mesh",
    "GB": "memory",
    "compute ms": "compute_ms",
    "HBM ms": "hbm_ms",
    "ICI ms": "ici_ms",
    "DCN ms": "dcn_ms",
    "limit": "limit",
    "MFU at once": "at_once",
    "in turn": "in_turn",
    "compute covers from": "covered",
}
READ = {
    "chip": "chip",
    "MFLOP a token": "flop",
    "HBM kB a token": "hbm",
    "temporaries kB a token": "temporaries",
    "fsdp B a parameter": "fsdp",
    "tensor kB a token": "tensor",
    "gradients over slices": "slices",
}


def read_table(rows: list[dict]) -> list[dict]:
    """Return what was read of each program, in the units of `READ`."""
    scales = {"flop": 1e6, "hbm": 1e3, "temporaries": 1e3, "tensor": 1e3}
    return [
        {name: value / scales.get(name, 1) if isinstance(value, float) else value for name, value in each.items()}
        for each in (program._asdict() for program in programs(rows).values())
    ]

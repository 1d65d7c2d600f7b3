"""The training step of the paper's models compiled for pods of TPUs: what fits, what it moves, what limits it.

    python -m experiments.benchmarks.pods                                     what the result file has not yet
    python -m experiments.benchmarks.pods --topologies=v5e:16x16 --models=siso-1.5b --lengths=2048 --anew

Nothing runs; `launch.needs` says what each figure is. A step takes minutes to compile, and its row is written at once;
a step that does not fit or does not compile has a row that says why. Rows of another jax or compiler are taken again.
"""

import collections
import dataclasses
from pathlib import Path

import jax
from absl import app, flags

from experiments.benchmarks import common, ssm
from launch import tpu
from launch.common import user_errors
from launch.needs import measured
from launch.provenance import load, provenance
from mamba3_jax.config import Config, DataConfig, TrainConfig
from mamba3_jax.presets import PRESETS
from mamba3_jax.train.fit import Failed

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Step:
    """One program: the training step of a model on a mesh of a topology."""

    model: str
    topology: str
    mesh: str
    batch: int
    length: int
    remat: str

    def config(self) -> Config:
        return Config(
            name=self.model,
            model=dataclasses.replace(PRESETS[self.model], remat=self.remat),
            data=DataConfig(batch=self.batch, length=self.length),
            train=TrainConfig(mesh=self.mesh),
        )


# (mesh, batch, remat) by the length of a row and the topology, for each size of model. Of the large model a device of
# 16 GB gets 2,048 tokens, a larger one 4,096 or more; a longer row is split over as many devices as that takes, by the
# axis sequence. fsdp leaves each device a multiple of 128 of the width, else XLA sums whole gradients instead of
# scattering them. The compiler for tpu7x fails with 131,072 tokens of rank 4 on a device (a constant that does not fit
# into its instruction) and not with half as many.
LARGE = {
    2048: {
        "v5e:16x16": ("data:4,fsdp:16,tensor:4", 256, "block"),
        "v5p:4x4x4": ("data:4,fsdp:16", 256, "none"),
        "v6e:8x8": ("data:4,fsdp:16", 128, "block"),
        "tpu7x:2x2x4": ("data:2,fsdp:16", 128, "none"),
    },
    32768: {
        "v5e:16x16": ("fsdp:16,sequence:16", 16, "block"),
        "v5p:4x4x4": ("data:4,fsdp:16", 64, "block"),
        "v6e:8x8": ("fsdp:16,sequence:4", 16, "block"),
        "tpu7x:2x2x4": ("data:2,fsdp:16", 32, "block"),
    },
    1048576: {
        "v5e:16x16": ("fsdp:4,sequence:64", 4, "block"),
        "v5p:4x4x4": ("fsdp:4,sequence:16", 4, "block"),
        "v6e:8x8": ("fsdp:2,sequence:32", 2, "block"),
        "tpu7x:2x2x4": ("fsdp:2,sequence:16", 2, "block"),
    },
}
SMALL = {
    2048: {
        "v5e:16x16": ("data:128,fsdp:2", 1024, "none"),
        "v5p:4x4x4": ("data:32,fsdp:2", 1024, "none"),
        "v6e:8x8": ("data:32,fsdp:2", 512, "none"),
        "tpu7x:2x2x4": ("data:16,fsdp:2", 512, "none"),
    },
    32768: {
        "v5e:16x16": ("data:16,fsdp:2,sequence:8", 32, "block"),
        "v5p:4x4x4": ("data:32,fsdp:2", 64, "none"),
        "v6e:8x8": ("data:32,fsdp:2", 64, "block"),
        "tpu7x:2x2x4": ("data:16,fsdp:2", 32, "none"),
    },
    1048576: {
        "v5e:16x16": ("data:2,fsdp:2,sequence:64", 4, "block"),
        "v5p:4x4x4": ("data:2,fsdp:2,sequence:16", 4, "block"),
        "v6e:8x8": ("data:2,fsdp:2,sequence:16", 4, "block"),
        "tpu7x:2x2x4": ("data:2,sequence:16", 2, "block"),
    },
}
SIZES = {"1.5b": LARGE, "180m": SMALL}


def differs(step: Step) -> int:
    """Count the things in which a step differs from the large SISO model's with rows of 2,048 tokens on v5e."""
    kind, size = step.model.split("-")
    return (kind != "siso") + (size != "1.5b") + (step.length != 2048) + (step.topology != "v5e:16x16")


def steps() -> list[Step]:
    """Return all steps, those that say most first.

    First comes the large SISO model on v5e, then what differs from it in one thing, then that model on two slices, then
    what differs in more. The last ones are on other meshes: fsdp alone, 4,096 chips, tensor in place of sequence.
    """
    found = [
        Step(f"{kind}-{size}", topology, mesh, batch, length=length, remat=remat)
        for size in SIZES
        for kind in ("siso", "mimo")
        for length, meshes in SIZES[size].items()
        for topology, (mesh, batch, remat) in meshes.items()
    ]
    found.sort(key=differs)
    near = [step for step in found if differs(step) < 2]
    whole = dataclasses.replace(found[0], topology="v5p:4x4x4", mesh="fsdp:64", remat="none")
    two = dataclasses.replace(found[0], topology="2xv5e:16x16", mesh="data:8,fsdp:16,tensor:4", batch=512)
    many = dataclasses.replace(found[0], topology="v5p:16x16x16", mesh="data:256,fsdp:16", batch=4096)
    by_tensor = [
        dataclasses.replace(step, mesh=step.mesh.replace("sequence", "tensor"))
        for step in found
        if step.model.startswith("siso") and step.length == 32768 and "sequence" in step.mesh
    ]
    return [*near, two, *found[len(near) :], whole, many, *by_tensor]


def row_of(step: Step) -> dict:
    """Compile one step and return its row; the row of one that cannot be compiled says why."""
    row = dataclasses.asdict(step)
    try:
        return row | measured(step.config(), step.topology)
    except (Failed, ValueError, jax.errors.JaxRuntimeError) as error:  # the last: the compiler itself failed
        return row | {"failed": common.one_line(error)}


def recorded(origin: dict, directory: str) -> dict[Step, dict]:
    """Return the rows of the result file by step; {} where there is none, or it is of another jax or compiler.

    Raises:
        ValueError: the file is damaged.
    """
    before = common.read("pods", directory) or {}
    if any(before.get(key) != origin[key] for key in ("jax", "libtpu")):
        return {}
    names = [field.name for field in dataclasses.fields(Step)]
    try:
        return {Step(**{name: row[name] for name in names}): row for row in before["rows"]}
    except (KeyError, TypeError) as error:
        path = Path(directory or common.RESULTS) / "pods.json"
        raise ValueError(f"{path} has a damaged row ({type(error).__name__}: {error}): move it away") from None


COLUMNS = {
    "model": "model",
    "topology": "topology",
    "mesh": "mesh",
    "rows": "batch",
    "length": "length",
    "remat": "remat",
    "compile s": "compile_s",
    "load": "load_before",
    "arguments": "arguments_gb",
    "temporaries": "temporaries_gb",
    "peak": "peak_gb",
    "TFLOP": "tflop",
    "HBM": "hbm_gb",
    "gathered": "all-gather",
    "scattered": "reduce-scatter",
    "reduced": "all-reduce",
    "permuted": "collective-permute",
    "sent": "sent_gb",
    "compute ms": "compute_ms",
    "HBM ms": "hbm_ms",
    "ICI ms": "ici_ms",
    "to slices": "dcn_gb",
    "DCN ms": "dcn_ms",
    "limit": "limit",
    "MFU at once": "at_once",
    "in turn": "in_turn",
    "failed": "failed",
}


def drawn(rows: list[dict]) -> list[dict]:
    """Return rows for the table: of each kind of collective the GB that a device sends, MFU in percent."""
    return [row if "failed" in row else row | _drawn(row) for row in rows]


def _drawn(row: dict) -> dict:
    sent = collections.Counter()
    for each in row["collectives"]:
        if not each.get("dcn"):  # what crosses slices has a column of its own; older rows have no such key
            sent[each["kind"]] += each["sent_gb"]
    in_percent = {name: f"{row[f'mfu_{name}']:.0%}" for name in ("at_once", "in_turn")}
    return sent | in_percent | {"tflop": row["gflop"] / 1e3, "dcn_gb": row.get("dcn_gb") or None}


def main(argv):
    del argv
    compiler = common.prepare_tpu()
    wanted = steps()
    for flag, field in (("models", "model"), ("topologies", "topology"), ("lengths", "length")):
        known = {str(getattr(step, field)) for step in steps()}
        chosen = ssm.chosen(flag, FLAGS[flag].value or known, known)
        wanted = [step for step in wanted if str(getattr(step, field)) in chosen]
    origin = provenance() | compiler
    with user_errors():
        rows = recorded(origin, FLAGS.out)
    for step in wanted:
        if step in rows and not FLAGS.anew:
            continue
        begun = {"commit": origin["commit"], "date": origin["date"], "load_before": load()}
        rows[step] = row_of(step) | begun
        common.show(*drawn([rows[step]]), COLUMNS)
        order = [each for each in steps() if each in rows]
        chips = {name: dataclasses.asdict(chip) for name, chip in tpu.CHIPS.items()}
        common.write("pods", origin, [rows[each] for each in order], FLAGS.out, chips=chips)


if __name__ == "__main__":
    flags.DEFINE_list("models", [], "presets; empty: all that there are steps of")
    flags.DEFINE_list("topologies", [], "empty: all that there are steps of")
    flags.DEFINE_list("lengths", [], "tokens of a row; empty: all that there are steps of")
    flags.DEFINE_bool("anew", False, "compile also the steps that the result file has")
    common.define_result()
    app.run(main, flags_parser=common.parse)

"""Look inside a checkpoint: what each layer and head does on held-out data.

    python -m launch.inspect --workdir=DIR [--step=N] [--other=DIR] [--layer=N] [--rows=8] [--length=N] [--out=DIR]
                             [--valid_glob=GLOB] [--tokenizer=tokenizer.json] [--eos=TOKEN]

Prints a line a layer, or with --layer a line a head of that layer: the decay horizon 1 / -log_a in tokens, dt, lambda,
the rotation a token, the norm and effective rank of the state, the gradient's norm; "-" is what a mixer does not have.
If the model was trained on words over a group, it also measures where the model fails, and predicts that from rows of
the trained length: `analysis/horizon.py` says how. --other shows a second checkpoint beside the first, on the same
rows. All of it goes to OUT (DIR/inspection/step_N by default) as inspection.json and pictures. DIR may be a directory
in the official layout.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from launch.common import define_path, fail, run, user_errors
from launch.data import held_out
from launch.provenance import provenance
from mamba3_jax import checkpoint, files, memory
from mamba3_jax.analysis import observe
from mamba3_jax.analysis.horizon import CAUSES, horizon
from mamba3_jax.config import Config, DataConfig
from mamba3_jax.data import loader, tokenizer_copy
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import language, tasks
from mamba3_jax.finite import or_null
from mamba3_jax.load import build, load_run
from mamba3_jax.model import LanguageModel

WORKDIR = define_path("workdir", None, "a workdir, or a directory in the official layout", required=True)
OTHER = define_path("other", None, "another one, to stand beside it on the same rows")
STEP = flags.DEFINE_integer("step", None, "which checkpoint of --workdir; default the newest")
LAYER = flags.DEFINE_integer("layer", None, "print each head of this layer, the first is 0")
ROWS = flags.DEFINE_integer("rows", 8, "how many rows of held-out data", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", None, "tokens a row; default the trained length")
OUT = define_path("out", None, "where the report and the pictures go; default inspection/step_N in the workdir")
VALID_GLOB = define_path("valid_glob", None, "text files to look at instead of the run's own")
TOKENIZER = define_path("tokenizer", None, "tokenizer.json instead of the checkpoint's own")
EOS = flags.DEFINE_string("eos", None, "the token, or its id, that ends a document; default as data.eos of the config")

POINTS = 400  # eigenvalues that are drawn of a layer
# Columns of the table: which quantity of a head, its width and format.
COLUMNS = {"horizon": "9.1f", "dt": "8.4f", "lambda": "7.3f", "rotation": "9.4f", "norm": "8.2f", "rank": "6.1f"}


class Run(NamedTuple):
    """A checkpoint to look into."""

    name: str
    config: Config
    model: LanguageModel
    params: dict


def load(path: str, step: int | None) -> Run:
    """Return the checkpoint of a workdir or an official directory."""
    config, params = load_run(path, step=step)
    steps = checkpoint.all_steps(path)
    at = step if step is not None else steps[-1] if steps else 0
    return Run(name=f"{path}, step {at}", config=config, model=build(config), params=params)


def check(runs: list[Run], data: DataConfig, length: int) -> None:
    """Raise ValueError for a layer that is not there, a checkpoint of other data, and rows too large for memory."""
    first, *others = runs
    for other in others:
        sources = [run.config.data.source for run in (first, other)]
        if sources[0] != sources[1] and set(sources) & set(TASKS):
            raise ValueError(f"--other={OTHER.value} was trained on {sources[1]}, wanted {sources[0]} as --workdir")
        sizes = [run.config.model.vocab_size for run in (first, other)]
        named = other.config.data.tokenizer
        if sizes[0] != sizes[1] or (named and tokenizer_copy.differ(data.tokenizer, named)):
            raise ValueError(f"--other={OTHER.value} has another vocabulary than --workdir={WORKDIR.value}")
    for each in runs:
        layers = len(each.config.model.pattern)
        if LAYER.value is not None and not 0 <= LAYER.value < layers:
            raise ValueError(f"--layer={LAYER.value} is not a layer of {each.name}: wanted 0 to {layers - 1}")
        memory.fit_device(memory.carrying(each.model, ROWS.value, length))


def rows_of(data: DataConfig) -> DataConfig:
    """Return the data in rows of --length; a row of a task is one document."""
    if data.source in TASKS:
        (setting,) = tasks.settings_of(data, [LENGTH.value or data.task_lengths[-1]])
        rows = tasks.of_setting(data, *setting)
        return dataclasses.replace(rows, batch=min(ROWS.value, data.valid_rows))
    (length,) = language.check_lengths([LENGTH.value or data.length])
    return dataclasses.replace(data, length=length, batch=ROWS.value)


def table(found: dict[str, list[dict]]) -> str:
    """Return a line for each layer and checkpoint: the medians over its heads, and the range of their horizons."""
    names = list(found)
    heads = "".join(f"{name:>{int(how.split('.')[0]) + 2}}" for name, how in COLUMNS.items())
    lines = [f"layer  {'mixer':15}{heads}  gradient  horizons"]
    for layer in range(max(map(len, found.values()))):
        for index, name in enumerate(names):
            if layer < len(found[name]):
                own = found[name][layer]
                cells = [
                    cell([observe.number(head, what) for head in own["heads"]], how) for what, how in COLUMNS.items()
                ]
                ends = [observe.number(head, "horizon") for head in own["heads"]]
                span = f"{min(ends):.1f} .. {max(ends):.1f}" if ends else "-"
                line = f"{layer:5d}{mark(index, names)} {own['mixer']:15}{''.join(cells)}"
                lines.append(f"{line}  {own['gradient_norm']:8.2e}  {span}")
    return "\n".join(lines)


def table_of_heads(found: dict[str, list[dict]], layer: int) -> str:
    """Return a line a head of one layer."""
    names = list(found)
    heads = "".join(f"{name:>{int(how.split('.')[0]) + 2}}" for name, how in COLUMNS.items())
    lines = [f" head  {'mixer':15}{heads}"]
    for index, name in enumerate(names):
        own = found[name][layer]
        for head in own["heads"]:
            cells = "".join(cell([observe.number(head, what)], how) for what, how in COLUMNS.items())
            lines.append(f"{head['head']:5d}{mark(index, names)} {own['mixer']:15}{cells}")
        if not own["heads"]:
            lines.append(f"    -{mark(index, names)} {own['mixer']:15}has no heads with a state")
    return "\n".join(lines)


def mark(index: int, names: list[str]) -> str:
    """Return the letter of a checkpoint, where there are several."""
    return "ABC"[index] if len(names) > 1 else " "


def cell(values: list[float], how: str) -> str:
    """Return the median of the finite values, "-" for none, two characters wider than the format."""
    width, known = int(how.split(".")[0]) + 2, [value for value in values if math.isfinite(value)]
    return f"{format(float(np.median(known)), how).strip() if known else '-':>{width}}"


def absences(layers: list[dict]) -> list[str]:
    """Return a sentence for each mixer that lacks something."""
    absent = {layer["mixer"]: layer["absent"] for layer in layers}
    return [f"{mixer} has no {', '.join(names)}" for mixer, names in absent.items() if names]


def said(found: dict) -> list[str]:
    """Return the lines about a horizon: where the model fails, where it was predicted to, and what carries the sum."""
    predicted = found["predicted"]

    def where(fails: float) -> str:
        if math.isinf(fails):
            return "no length asked"
        return f"{fails:.0f} or before" if fails == found["trained"] else f"{fails:.0f}"

    by = [
        f"{cause} {where(predicted[cause]['fails'])}" if "fails" in predicted[cause] else f"{cause} absent"
        for cause in (*CAUSES, "half_step")
    ]
    lines = [
        f"trained to {found['trained']}, it fails (the last answer is halfway to chance) at {where(found['fails'])}",
        f"predicted from length {found['trained']}: {', '.join(by)}",
    ]
    lines += sorted({f"absent: {part['absent']}" for part in predicted.values() if "absent" in part})
    lines += [
        f"at length {part['length']} scaled accuracy is {part['as_it_is']:.2f}, and {part['scaled_back']:.2f} with the "
        f"memory of the beginning as large as at {found['trained']}"
        for part in found["restored"]
        if "length" in part
    ]
    for plane in predicted["half_step"].get("planes", []):
        lines.append(
            f"layer {plane['layer']} head {plane['head']} plane {plane['plane']} tells {plane['products']} apart: "
            f"{plane['drift']:+.4f} radians a token off, {plane['spread']:.4f} sqrt(L) about it, "
            f"half a step at {plane['fails']:.0f}"
        )
    lengths = [score["length"] for score in found["measured"]]
    lines.append(f"  length {''.join(f'{length:7d}' for length in lengths)}")
    scores = [score["scaled_last"] for score in found["measured"]]
    lines.append(f"measured {''.join(f'{score:7.2f}' for score in scores)}")
    return lines


def main(_argv):
    with user_errors():
        runs = [load(WORKDIR.value, STEP.value)] + ([load(OTHER.value, None)] if OTHER.value else [])
        data = held_out(runs[0].config, VALID_GLOB.value, TOKENIZER.value, EOS.value)
        rows = rows_of(data)
        check(runs, data, rows.length)
        batch = next(loader(rows, "valid", vocab_size=runs[0].config.model.vocab_size))
        step = runs[0].name.rpartition(" ")[2]
        folder = Path(OUT.value or f"{WORKDIR.value}/inspection/step_{step}").expanduser()

    origin, names = provenance(), [each.name for each in runs]
    names = names if len(set(names)) == len(names) else [f"{'AB'[i]}: {name}" for i, name in enumerate(names)]
    layers = {
        name: observe.observe(each.config, each.model, each.params, batch)
        for name, each in zip(names, runs, strict=True)
    }
    found = {name: observe.summary(own, batch.start_BL) for name, own in layers.items()}
    print(f"{len(batch.tokens_BL)} rows of {rows.length} tokens of {data.source}, held out")
    for index, name in enumerate(names):
        print(" ".join([*(["AB"[index]] if len(names) > 1 else []), name]))
    print(table(found) if LAYER.value is None else table_of_heads(found, LAYER.value), flush=True)
    print("\n".join(sorted({line for own in found.values() for line in absences(own)})), flush=True)
    horizons = {
        name: each_found
        for name, each in zip(names, runs, strict=True)
        if (each_found := horizon(each.model, each.params, data))
    }
    for name, each_found in horizons.items():
        print("\n".join(["", name, *said(each_found)]), flush=True)
    report = {
        **origin,
        "data": dataclasses.asdict(rows),
        "checkpoints": [{"name": name, "layers": found[name], "horizon": horizons.get(name)} for name in names],
    }
    write(folder, report, drawn(layers, found, horizons))
    print(f"written to {folder}")


def drawn(layers: dict, found: dict, horizons: dict) -> dict[str, bytes]:
    """Return the pictures by name."""
    from mamba3_jax.analysis import pictures  # matplotlib is slow to import, and a mistake is told without it

    eigenvalues = {name: [observe.some_eigenvalues(layer, POINTS) for layer in own] for name, own in layers.items()}
    made = {
        "eigenvalues": pictures.eigenvalues(eigenvalues),
        "layers": pictures.by_layer(found),
        "state": pictures.state_by_position(found),
    }
    return made | ({"horizon": pictures.horizons(horizons)} if horizons else {})


def write(folder: Path, report: dict, images: dict[str, bytes]) -> None:
    """Write the report and the pictures; where that fails, the table has been printed."""
    try:
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "inspection.json", or_null(report))
        for name, image in images.items():
            files.replace(folder / f"{name}.png", image)
    except OSError as error:
        fail(f"{error}; --out=DIR writes it elsewhere")


if __name__ == "__main__":
    run(main, alone=True)

"""Official PyTorch layout -> Orbax workdir, and back; which way is seen from the source.

    python -m launch.convert --source=PATH --target=PATH [--step=N] [--dtype=bfloat16] [--files=pytorch_model.bin]
                             [--tokenizer=tokenizer.json]

A workdir made from official files remembers, in official.json, their config.json, dtypes and file names, and is written
back bit for bit. The target must not exist, and appears whole or not at all.

Official files may be sharded (with their index.json), lack a tied head, stand in a wrapper (state_dict, model, module;
Lightning's too) or under prefixes (module., _orig_mod., model.), beside buffers: what was peeled is printed and
remembered, and is not put around them again when they are written back.
"""

import contextlib
import os
import shutil
from pathlib import Path

from absl import flags

from launch.common import define_path, run, user_errors
from mamba3_jax import checkpoint, convert
from mamba3_jax.convert.files import DTYPES, FORMATS
from mamba3_jax.load import load_run, run_config

SOURCE = define_path("source", None, "directory to read: a workdir, or the official layout", required=True)
TARGET = define_path("target", None, "directory to write; it must not exist", required=True)
STEP = flags.DEFINE_integer("step", None, "checkpoint of a workdir; default the newest")
DTYPE = flags.DEFINE_enum("dtype", "", ["", *DTYPES], "of official tensors; default as they came, or float32")
FILES = flags.DEFINE_list("files", None, f"which of {', '.join(FORMATS)} to write; default as they came")
TOKENIZER = define_path("tokenizer", None, "tokenizer.json to record in the workdir")


@contextlib.contextmanager
def whole(target: Path):
    """A directory to fill, renamed to `target` at the end and removed if anything goes wrong."""
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_workdir(source: Path, target: Path) -> None:
    """Official layout -> workdir, at step 0."""
    model, params, origin = convert.read(source)
    config = run_config(source, model)
    if TOKENIZER.value:
        config.data.tokenizer = str(Path(TOKENIZER.value).resolve(strict=True))
    with whole(target) as partial:
        checkpoint.save_model(partial, config, params)
        checkpoint.write_config(partial, config)
        origin.save(partial)
    say_peeled(source, origin)


def to_official(source: Path, target: Path) -> None:
    """Workdir -> official layout."""
    unknown = sorted(set(FILES.value or []) - set(FORMATS))
    if unknown:
        raise ValueError(f"--files has {unknown}, wanted some of {list(FORMATS)}")
    config, params = load_run(source, step=STEP.value)
    origin = convert.Origin.load(source)
    with whole(target) as partial:
        convert.write(partial, config.model, params, origin, DTYPE.value, FILES.value)
    if origin is not None:
        say_peeled(f"{target}: written plain; when {source} was made", origin)


def say_peeled(where, origin: convert.Origin) -> None:
    """Prints what of the official files is not in the workdir, nor will be in what is written back."""
    if origin.peeled:
        print(f"{where}: {'; '.join(origin.peeled)}")


def main(_argv):
    with user_errors():
        source, target = Path(SOURCE.value).expanduser(), Path(TARGET.value).expanduser().absolute()
        if target.exists():
            raise ValueError(f"--target={target} exists already; nothing is overwritten")
        official = convert.is_official(source)
        for name in ("step", "dtype", "files") if official else ("tokenizer",):
            if flags.FLAGS[name].present:
                raise ValueError(f"--{name} has no meaning for {source}, which is {'official' if official else 'ours'}")
        (to_workdir if official else to_official)(source, target)
    print(f"{source} ({'official' if official else 'workdir'}) -> {target}")


if __name__ == "__main__":
    run(main)

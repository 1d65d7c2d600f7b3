"""Convert the official PyTorch layout to an Orbax workdir, and back; the source decides which way.

    python -m launch.convert --source=PATH --target=PATH [--step=N] [--dtype=bfloat16] [--files=pytorch_model.bin]
                             [--tokenizer=tokenizer.json] [--eos=TOKEN]

A workdir made from official files remembers, in official.json, their config.json, dtypes and file names, and is written
back bit for bit. The source's tokenizer.json, or the one that --tokenizer names, is copied along. The target must not
exist, and appears whole or not at all.

Official files may be sharded (with their index.json), may lack a tied head, and may hold their tensors in a wrapper
(state_dict, model, module; Lightning's too), under prefixes (module., _orig_mod., model.) and beside buffers. What was
peeled off is printed and remembered, and is not put back when they are written again.
"""

import contextlib
import os
import shutil
from pathlib import Path

from absl import flags

from launch.common import define_path, run, user_errors, warn
from launch.data import codec_of
from mamba3_jax import checkpoint, convert
from mamba3_jax.convert.files import DTYPES, FORMATS
from mamba3_jax.data import tokenizer_copy
from mamba3_jax.load import load_run, run_config

SOURCE = define_path("source", None, "directory to read: a workdir, or the official layout", required=True)
TARGET = define_path("target", None, "directory to write; it must not exist", required=True)
STEP = flags.DEFINE_integer("step", None, "checkpoint of a workdir; default the newest")
DTYPE = flags.DEFINE_enum("dtype", "", ["", *DTYPES], "of official tensors; default as they came, or float32")
FILES = flags.DEFINE_list("files", None, f"which of {', '.join(FORMATS)} to write; default as they came")
TOKENIZER = define_path("tokenizer", None, "bytes, or the tokenizer.json to copy; default the source's own")
EOS = flags.DEFINE_string(
    "eos", None, "the token, or its id, that ends a document; default what is beside the tokenizer"
)


@contextlib.contextmanager
def whole(target: Path):
    """Yield a directory to fill, which is renamed to `target` at the end, or removed if anything goes wrong."""
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_workdir(source: Path, target: Path) -> None:
    """Convert the official layout to a workdir, at step 0."""
    model, params, origin = convert.read(source)
    config = run_config(source, model)
    if TOKENIZER.value:
        named = TOKENIZER.value
        config.data.tokenizer = named if named == "bytes" else str(Path(named).resolve(strict=True))
    if TOKENIZER.value or EOS.value:
        config.data.eos = EOS.value or ""
        codec_of(config.data, model.vocab_size)
    with whole(target) as partial:
        checkpoint.save_model(partial, config, params)
        checkpoint.write_config(partial, config)
        tokenizer_copy.keep(partial, config.data.tokenizer)
        origin.save(partial)
    say_peeled(source, origin)


def to_official(source: Path, target: Path) -> None:
    """Convert a workdir to the official layout."""
    unknown = sorted(set(FILES.value or []) - set(FORMATS))
    if unknown:
        raise ValueError(f"--files has {unknown}, wanted some of {list(FORMATS)}")
    config, params = load_run(source, step=STEP.value)
    origin = convert.Origin.load(source)
    with whole(target) as partial:
        convert.write(partial, config.model, params, origin, DTYPE.value, FILES.value)
        if tokenizer_copy.is_file(config.data.tokenizer):
            tokenizer_copy.write(partial, Path(config.data.tokenizer))
        elif config.data.tokenizer not in ("", "bytes"):
            warn(f"the tokenizer {config.data.tokenizer} is not there: {target} has none")
    if origin is not None:
        say_peeled(f"{target}: written plain; when {source} was made", origin)


def say_peeled(where, origin: convert.Origin) -> None:
    """Print which parts of the official files are not in the workdir, and so not in what is written back either."""
    if origin.peeled:
        print(f"{where}: {'; '.join(origin.peeled)}")


def main(_argv):
    with user_errors():
        source, target = Path(SOURCE.value).expanduser(), Path(TARGET.value).expanduser().absolute()
        if target.exists():
            raise ValueError(f"--target={target} exists already; nothing is overwritten")
        official = convert.is_official(source)
        for name in ("step", "dtype", "files") if official else ("tokenizer", "eos"):
            if flags.FLAGS[name].present:
                raise ValueError(f"--{name} has no meaning for {source}, which is {'official' if official else 'ours'}")
        (to_workdir if official else to_official)(source, target)
    print(f"{source} ({'official' if official else 'workdir'}) -> {target}")


if __name__ == "__main__":
    run(main, alone=True)

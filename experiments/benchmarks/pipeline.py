"""What the input pipeline gives: text tokenised at the start of a run, and batches of packed rows from then on.

    python -m experiments.benchmarks.pipeline
    python -m experiments.benchmarks.pipeline --of=tasks --name=tasks_cpu      batches of the generated tasks instead

The text is the standard library's own source; the tokenizer.json is a byte-level BPE trained on it here, without a
download. Floors: of tokenising, the package `tokenizers` alone (of bytes, `str.encode`); of a batch, its 13 bytes a
token copied once. Seconds of the processor stand beside those of the clock, which other programs stretch. `digest` is
of the first batches: what makes them faster must not change it.
"""

import resource
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from absl import app, flags
from tokenizers import Tokenizer

from experiments.benchmarks import common
from experiments.corpus import byte_level_bpe
from launch.provenance import provenance
from mamba3_jax.config import DataConfig
from mamba3_jax.data import loader, tokenizer
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.data.text import files, read

BATCH, LENGTH, VOCABULARY = 16, 2048, 16384
TASK_BATCH, TASK_LENGTH = 256, 160  # the paper's batch and longest row
DIGESTED, WARM_UP = 50, 5

FLAGS = flags.FLAGS


def train_tokenizer(path: Path) -> str:
    """Write a byte-level BPE of the training files; returns the path."""
    model, trainer = byte_level_bpe(VOCABULARY)
    model.train([str(file) for file in files(DataConfig(), "train").values()], trainer)
    model.save(str(path))
    return str(path)


def timed(function, calls: int = 1) -> tuple[dict, object]:
    """Seconds a call by the clock and of the processor, all threads and ended children together; the last result."""
    used = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # noqa: E731
    begin, before = time.perf_counter(), used()
    for _ in range(calls):
        result = function()
    return {"s": (time.perf_counter() - begin) / calls, "cpu_s": (used() - before) / calls}, result


def tokenising(name: str, config: DataConfig) -> dict:
    """Time `encode_all` on the training text, and what it cannot do without on the same text."""
    codec, texts = tokenizer(config), list(read(files(config, "train")))
    taken, found = timed(lambda: [ids_T for ids_T, _ in codec.encode_all(texts)])
    if name == "bytes":
        floor, want = timed(lambda: [text.encode() for text in texts])
        same = [ids_T.tobytes() == spelt for ids_T, spelt in zip(found, want, strict=True)]
    else:
        alone = Tokenizer.from_file(config.tokenizer)
        floor, want = timed(lambda: alone.encode_batch(texts, add_special_tokens=False))
        same = [ids_T.tolist() == one.ids for ids_T, one in zip(found, want, strict=True)]
    if not all(same):
        raise ValueError(f"{name}: {same.count(False)} texts have other ids than the floor's; no time is reported")
    tokens, size = sum(map(len, found)), sum(len(text.encode()) for text in texts)
    return {"tokenizer": name, "what": "tokenise", "tokens": tokens, "bytes": size, **rates(tokens, taken, floor)}


def rates(tokens: int, taken: dict, floor: dict) -> dict:
    """Milliseconds, of the floor too, and tokens a second by the clock and of the processor."""
    return {
        "ms": 1e3 * taken["s"],
        "cpu_ms": 1e3 * taken["cpu_s"],
        "floor_ms": 1e3 * floor["s"],
        "floor_cpu_ms": 1e3 * floor["cpu_s"],
        "tokens_per_second": tokens / taken["s"],
        "tokens_per_cpu_second": tokens / taken["cpu_s"],
    }


def batches(name: str, config: DataConfig) -> dict:
    """Time the next batch of a loader that has its text in memory or makes it up, and a copy of as many bytes."""
    data = loader(config, "train", vocab_size=tokenizer(config).vocab_size)
    digest = 0
    for _ in range(DIGESTED):
        for array in next(data):
            digest = zlib.crc32(np.ascontiguousarray(array).tobytes(), digest)
    data.set_state(data.get_state() | {"position": 0})
    for _ in range(WARM_UP):
        batch = next(data)
    calls = FLAGS.batches
    taken, _ = timed(lambda: next(data), calls)
    floor, _ = timed(lambda: [array.copy() for array in batch], calls)
    tokens = config.batch * config.length
    row = {"tokenizer": name, "what": "batches", "tokens": tokens, "digest": f"{digest:08x}"}
    return row | rates(tokens, taken, floor)


def texts() -> list[dict]:
    """Time the pipeline of text, with bytes and with a tokenizer.json."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bytes", "BPE"):
            path = "bytes" if name == "bytes" else train_tokenizer(Path(folder, "tokenizer.json"))
            config = DataConfig(tokenizer=path, batch=BATCH, length=LENGTH)
            rows += [tokenising(name, config), batches(name, config)]
    return rows


def tasks() -> list[dict]:
    """Time every generated task, a whole document a row, scored at all tokens that have a target."""
    shape = {"batch": TASK_BATCH, "length": TASK_LENGTH, "task_lengths": (TASK_LENGTH,), "task_steps": (0,)}
    return [batches(name, DataConfig(source=name, labels=task.labels[0], **shape)) for name, task in TASKS.items()]


OF = {"text": texts, "tasks": tasks}


COLUMNS = {
    "tokenizer": "tokenizer",
    "": "what",
    "tokens": "tokens",
    "ms": "ms",
    "floor, ms": "floor_ms",
    "processor, ms": "cpu_ms",
    "floor": "floor_cpu_ms",
    "tokens/s": "tokens_per_second",
    "tokens/s of a core": "tokens_per_cpu_second",
    "digest": "digest",
}


def main(argv):
    del argv
    origin, rows = provenance(), OF[FLAGS.of]()
    print(common.table(rows, COLUMNS))
    print(common.write(FLAGS.name, origin, rows, FLAGS.out))


if __name__ == "__main__":
    flags.DEFINE_enum("of", "text", list(OF), "what is timed")
    flags.DEFINE_integer("batches", 500, "how many are timed", lower_bound=1)
    common.define_result(name="pipeline_cpu")
    app.run(main, flags_parser=common.parse)

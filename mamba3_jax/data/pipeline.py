"""From rows to this host's batches: order, sharding, workers, position."""

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading

import grain
import numpy as np
from absl import flags

from mamba3_jax.config import DataConfig, check
from mamba3_jax.data.batch import Batch
from mamba3_jax.data.packing import Rows
from mamba3_jax.data.synthetic import TASKS, synthetic_rows
from mamba3_jax.data.text import text_rows, texts
from mamba3_jax.data.tfds_text import tfds_rows, tfds_texts

SOURCES = {"text": text_rows, "tfds": tfds_rows}  # and every task, by its name
TEXTS = {"text": texts, "tfds": tfds_texts}
SPLITS = ("train", "valid")
ENDLESS = 2**52  # rows: Grain computes lengths in float64


class Loader:
    """An iterator over this host's part of the batches of a split.

    Its position is one number, the next batch's: it does not depend on the number of hosts or workers, so a run may
    resume with others of these.
    """

    def __init__(self, numbers: grain.MapDataset, rows: Rows, workers: int, vocab_size: int, identity: dict):
        """Make a loader; `numbers` has the numbers of the rows of each batch."""
        self._numbers, self._rows, self._batches = numbers, rows, numbers.map(rows.gather)
        self._workers, self._vocab_size, self._identity = workers, vocab_size, identity
        self._position, self._iterator = 0, None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._from_position())
        # A copy, as a worker's arrays live in shared memory that ends with the iterator.
        batch = Batch._make(map(np.array, next(self._iterator)))
        for name, ids in (("token", batch.tokens_BL), ("target", batch.targets_BL[batch.weights_BL != 0])):
            for extreme in (ids.min(initial=0), ids.max(initial=0)):
                if not 0 <= extreme < self._vocab_size:
                    raise ValueError(
                        f"{name} id {extreme} is out of range: the model's vocabulary is {self._vocab_size}"
                    )
        self._position += 1
        return batch

    @property
    def batches(self) -> int:
        """Count all that there are; of the split "train" far more than anyone takes."""
        return len(self._numbers)

    def target_bytes(self) -> np.ndarray | None:
        """Count the bytes of text that the targets of the last batch spell (B, L), an end one; None: it is no text."""
        spelt = self._rows.target_bytes
        return spelt(self._numbers[self._position - 1]) if spelt else None

    def _from_position(self) -> grain.IterDataset:
        # Tokens are in memory: threads would only fight over the interpreter's lock.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = self._batches[self._position :].to_iter_dataset(options)
        if not self._workers:
            return dataset
        if not flags.FLAGS.is_parsed():  # outside an absl program; Grain's workers read their flags
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=self._workers)
        return dataset.mp_prefetch(options, worker_init_fn=_live_and_die_with_main)

    def get_state(self) -> dict:
        """Return, as JSON, the number of batches given so far and what they were cut from."""
        return {"position": self._position, **self._identity}

    def set_state(self, state: dict) -> None:
        """Go on with the batch after those that `get_state` had counted; ValueError where the data is not the same."""
        for name, have in self._identity.items():
            if state.get(name) != have:
                raise ValueError(f"cannot resume: the data had {name} {state.get(name)}, this run has {have}")
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """End the worker processes, if any."""
        if self._iterator is not None and self._workers:
            self._iterator.close()
        self._iterator = None


def _live_and_die_with_main(worker: int, workers: int) -> None:
    """Make a worker ignore SIGINT and SIGTERM, and exit when the main process does.

    A signal to the whole process group (Ctrl-C) is for the main process, which saves and then ends its workers. A main
    process that is killed ends none: without the watch they would wait for ever for it to take the next batch.
    """
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def sources() -> dict:
    """Give what makes the rows of a split, (config, split) -> Rows, by the name that `data.source` may have."""
    return SOURCES | dict.fromkeys(TASKS, synthetic_rows)


def identities(config: DataConfig) -> dict[str, str]:
    """Return the identity of the rows of each split; {} for a generated task, of which the config says all."""
    if config.source in TASKS:
        return {}
    return {split: _identity(split, **dataclasses.asdict(config)) for split in SPLITS}


@functools.lru_cache  # a sweep asks of each variant more than once, and keeps few corpora in memory
def _identity(split: str, **fields) -> str:
    config = DataConfig(**fields)
    _check(config, split, (0, 1))
    return sources()[config.source](config, split).identity


def loader(config: DataConfig, split: str, *, vocab_size: int, host: tuple[int, int] = (0, 1)) -> Loader:
    """Return this host's rows of each batch of `split`.

    "train" never ends and visits the rows of each epoch in an order drawn from (seed, epoch). "valid" is one pass, its
    last batch filled up with rows of weight 0, in a fixed order that spreads the first few batches over all files.
    Batch j of all hosts together is the same set of rows for any number of hosts. `host` is (index, count).
    """
    _check(config, split, host)
    rows = sources()[config.source](config, split)
    identity = {
        "split": split,
        "content": rows.identity,
        **{n: getattr(config, n) for n in ("length", "batch", "seed")},
    }
    return Loader(_numbers(rows, config, split, host), rows, config.workers, vocab_size, identity)


def documents(config: DataConfig) -> list[str]:
    """Return the text of every held-out document, in an order whose first few are spread over all, as in `loader`.

    Raises:
        ValueError: a task, or data that has no text.
    """
    if config.source not in TEXTS:
        raise ValueError(f"data.source={config.source!r} has no documents of text, wanted {' or '.join(TEXTS)}")
    found = list(TEXTS[config.source](config, "valid"))
    stride = _stride(max(len(found), 1))
    return [found[i * stride % len(found)] for i in range(len(found))]


def _numbers(rows: Rows, config: DataConfig, split: str, host: tuple[int, int]) -> grain.MapDataset:
    """Return the row numbers of each of this host's batches."""
    index, hosts = host
    if rows.count is None:
        # Counted off a batch at a time: Grain's way, a row at a time, takes as long as a small task's rows themselves.
        batch = config.batch
        steps = grain.MapDataset.range(ENDLESS // batch)
        return steps.map(lambda step: np.arange(step * batch + index, (step + 1) * batch, hosts))
    return _order(rows, config, split)[index:ENDLESS:hosts].batch(config.batch // hosts)


def _order(rows: Rows, config: DataConfig, split: str) -> grain.MapDataset:
    """Return the row numbers of rows that have a count, in the order of visit."""
    if split == "train":
        return grain.MapDataset.range(rows.count).shuffle(seed=config.seed).repeat()
    stride = _stride(rows.count)
    filled = -(-rows.count // config.batch) * config.batch
    return grain.MapDataset.range(filled).map(lambda i: i * stride % rows.count if i < rows.count else i)


def _stride(count: int) -> int:
    """Return a step near the golden section of `count` that visits every row: any prefix lies evenly over the whole."""
    stride = max(1, round(count * 0.618))
    while np.gcd(stride, count) != 1:
        stride += 1
    return stride


def _check(config: DataConfig, split: str, host: tuple[int, int]) -> None:
    check(config, "config.data")
    index, hosts = host
    if config.source not in sources():
        raise ValueError(f"data.source={config.source!r} is not one of {', '.join(sorted(sources()))}")
    if split not in SPLITS:
        raise ValueError(f"{split=} is not one of {', '.join(SPLITS)}")
    if config.batch % hosts:
        raise ValueError(f"data.batch={config.batch} is not a multiple of the {hosts} hosts")
    if not 0 <= index < hosts:
        raise ValueError(f"{host=} is not (index, count) with 0 <= index < count")

"""Read text datasets of TensorFlow Datasets from their array_record files, without TensorFlow."""

import functools
from collections.abc import Iterator
from pathlib import Path

from mamba3_jax.config import DataConfig
from mamba3_jax.data.packing import Corpus, Rows, concatenate, rows
from mamba3_jax.data.token_cache import cached
from mamba3_jax.data.vocabulary import tokenizer


def _source(name: str, directory: str, split: str, key: str):
    """Return the examples of a prepared dataset; ValueError that lists what exists for a wrong name, split or field."""
    import tensorflow_datasets as tfds  # takes seconds, which runs on other data save

    folder = Path(directory or tfds.core.constants.DATA_DIR).expanduser()
    there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not name:
        raise ValueError(f"data.tfds_name is empty; {folder} has {', '.join(there) or 'nothing'}")
    try:
        builder = tfds.builder(name, data_dir=str(folder))
    except tfds.core.DatasetNotFoundError:  # its message lists every dataset in the world
        builder = None
    if builder is None or not builder.is_prepared():
        raise ValueError(
            f"data.tfds_name={name!r} is not prepared in {folder}, which has {', '.join(there) or 'nothing'}: "
            "run `tfds build --file_format=array_record`, or set data.tfds_dir"
        )
    if key not in builder.info.features:
        raise ValueError(f"data.tfds_key={key!r} is not a field of {name}: {', '.join(builder.info.features)}")
    try:
        return tfds.data_source(name, split=split, data_dir=str(folder), download=False)
    except NotImplementedError as error:
        raise ValueError(f"{name} in {folder} cannot be read at random: {str(error).splitlines()[0]}") from None
    except ValueError:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}") from None


def _texts(source, key: str, what: str) -> Iterator[str]:
    for begin in range(0, len(source), 256):
        block = range(begin, min(begin + 256, len(source)))
        for number, example in zip(block, source.__getitems__(block), strict=True):
            text = example[key]
            try:
                if text:
                    yield text.decode() if isinstance(text, bytes) else str(text)
            except UnicodeDecodeError as error:
                raise ValueError(f"{what}, example {number}: {key} is not UTF-8 text: {error.reason}") from None


def tfds_texts(config: DataConfig, split: str) -> Iterator[str]:
    """Yield the documents of a split, the `tfds_key` of each example."""
    name, directory, split, key = _fields(config, split)
    return _texts(_source(name, directory, split, key), key, f"{name}, split {split}")


@functools.lru_cache(maxsize=4)
def _corpus(tokenizer_name: str, eos: str, name: str, directory: str, split: str, key: str) -> Corpus:
    codec, what = tokenizer(DataConfig(tokenizer=tokenizer_name, eos=eos)), f"{name}, split {split}"
    source = _source(name, directory, split, key)
    paths = [Path(path) for path in source.dataset_info.splits[split].filepaths]
    tokenise = lambda: concatenate(codec.encode_all(_texts(source, key, what)), codec, what)  # noqa: E731
    return cached(paths, codec, {"split": split, "key": key}, tokenise)


def tfds_rows(config: DataConfig, split: str) -> Rows:
    """Return the rows of a split, an example's `tfds_key` a document. Kept in memory, and beside the dataset."""
    return rows(_corpus(config.tokenizer, config.eos, *_fields(config, split)), config.length)


def _fields(config: DataConfig, split: str) -> tuple[str, str, str, str]:
    """Return the dataset's name, its directory, its own name for a split, and the field of the text."""
    part = config.tfds_train_split if split == "train" else config.tfds_valid_split
    return config.tfds_name, config.tfds_dir, part, config.tfds_key

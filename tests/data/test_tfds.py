"""A dataset that the test itself prepares in the TFDS format: no download, no TensorFlow."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mamba3_jax import data
from mamba3_jax.config import DataConfig
from mamba3_jax.data import loader, pipeline, tfds_text, token_cache
from mamba3_jax.data.pipeline import identities
from mamba3_jax.data.tfds_text import tfds_rows
from mamba3_jax.data.vocabulary import HuggingFace
from tests.data.test_vocabulary import SPECIAL, train

TEXTS = {"train": [f"example {i} é" * (i % 4 + 1) for i in range(300)], "validation": ["one", "", "two"]}


class TinyText(tfds.core.GeneratorBasedBuilder):
    __module__ = "tiny_text"  # a module inside a package sends TFDS looking for its checksums, with a library it lacks
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {split: self._generate_examples(split) for split in TEXTS}

    def _generate_examples(self, split):
        for i, text in enumerate(TEXTS[split]):
            yield i, {"text": text, "label": i}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    TinyText(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return str(directory)


def config(directory, **fields):
    return DataConfig(**{"source": "tfds", "tfds_name": "tiny_text", "tfds_dir": directory, "length": 32, **fields})


def documents(fields, split):
    """The texts back from the rows of a split."""
    rows = tfds_rows(fields, split)
    whole = rows.gather(np.arange(rows.count))
    real = np.flatnonzero(whole.tokens_BL)[-1] + 1
    return bytes(whole.tokens_BL.ravel()[:real].tolist()).decode().split("\0")


def test_examples_are_documents(directory):
    assert sorted(documents(config(directory), "train")) == sorted(TEXTS["train"])
    assert sorted(documents(config(directory), "valid")) == ["one", "two"]
    assert sorted(data.documents(config(directory))) == ["one", "two"]
    half = documents(config(directory, tfds_train_split="train[:50%]"), "train")
    assert len(half) == 150
    assert set(half) <= set(TEXTS["train"])
    assert "tensorflow" not in sys.modules


def test_tokens_are_kept_beside_the_dataset(directory, tmp_path, monkeypatch):
    """Of each part of it apart, and read without tokenising."""
    monkeypatch.setattr(token_cache, "WORTH", 0)
    path = train(tmp_path / "tokenizer.json", SPECIAL)
    parts = [config(directory, tfds_train_split=part, tokenizer=path) for part in ("train", "train[:50%]")]
    made = identities(parts[0])["train"], identities(parts[1])["train"]
    assert made[0] != made[1]
    monkeypatch.setattr(HuggingFace, "encode_all", None)
    tfds_text._corpus.cache_clear()
    pipeline._identity.cache_clear()
    assert made == (identities(parts[0])["train"], identities(parts[1])["train"])
    assert len(list(Path(directory).rglob("*.npz"))) == 3  # and of the validation split


def test_loads(directory):
    batch = next(loader(config(directory, batch=3), "train", vocab_size=256))
    assert batch.tokens_BL.shape == (3, 32)
    assert batch.weights_BL.sum() > 80


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tfds_name": "tiny_txt"}, r"data.tfds_name='tiny_txt' is not prepared in .* which has .*tiny_text"),
        ({"tfds_name": "lm1b"}, r"data.tfds_name='lm1b' is not prepared in"),
        ({"tfds_name": ""}, "data.tfds_name is empty"),
        ({"tfds_train_split": "training"}, "tiny_text has no split 'training'; it has train, validation"),
        ({"tfds_key": "txt"}, "data.tfds_key='txt' is not a field of tiny_text: .*text"),
    ],
)
def test_mistakes_are_named(directory, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        loader(config(directory, **fields), "train", vocab_size=256)
    assert "\n" not in str(error.value)


def test_globs_of_a_config_file_are_nothing_to_a_dataset(directory):
    plain = identities(config(directory))
    assert plain == {split: tfds_rows(config(directory), split).identity for split in ("train", "valid")}
    assert identities(config(directory, train_glob="absent.jsonl", valid_glob="absent.jsonl")) == plain
    assert identities(config(directory, tfds_train_split="train[:50%]"))["train"] != plain["train"]

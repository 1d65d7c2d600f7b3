"""Build the data of the language ablations from Debian packages: English prose, C, and a genome.

    python -m experiments.corpus [--folder=build/corpus] [--pack=PATH]
    python -m experiments.corpus --unpack=PATH [--folder=build/corpus]       on a host without apt or network

Cost: 184 MB of downloads, 3 minutes of a core. It needs apt-get and dpkg-deb with the lists of Debian 12, but not root.

    FOLDER/train.jsonl  valid.jsonl   a document a line, {"name", "text"}: one name in twenty held out, by its hash
          /tokenizer.json             byte-level BPE of the training documents
          /tokenizer_config.json      names the token that ends a document
          /dna/train.txt  valid.txt   the bases of one chromosome of E. coli, its last tenth held out
          /corpus.json                versions, sizes and hashes of all this; written last
          /downloads                  the packages
          /.tokens                    the tokens, as `mamba3_jax/data/token_cache.py` keeps them

The same command goes on with the packages that are there, and builds nothing if the corpus is whole. Debian's versions
come and go, and with them the text: compare only results of equal hashes.
"""

import contextlib
import hashlib
import json
import platform
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from absl import flags
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments import packages
from experiments.archive import files_of, filling, pack, publish, text_hash, unpack, whole
from experiments.packages import Source, entries, page_text
from launch.common import define_path, run, user_errors
from mamba3_jax.config import DataConfig
from mamba3_jax.data import text
from mamba3_jax.data.pipeline import SPLITS
from mamba3_jax.files import check_writable, replace
from mamba3_jax.train.loop import say
from mamba3_jax.train.resume import alone

KERNEL_C = "mm|fs|net|lib|crypto|block|security|io_uring|include/linux"
SOURCES = (
    Source("linux-doc", "linux-source-6.1", r"[^/]+/Documentation/((?!translations/).*\.(?:rst|txt))"),
    Source("linux", "linux-source-6.1", rf"[^/]+/((?:{KERNEL_C})/.*\.[ch])"),
    Source("gcide", "dict-gcide", r".*/(gcide)\.dict\.dz", split=entries),
    Source("anarchism", "anarchism", r".*/markdown/(.*\.md)(?:\.gz)?"),
    Source("python", "python3.11-doc", r".*/_sources/(.*)\.txt"),
    Source("postgresql", "postgresql-doc-15", r".*/html/(.*\.html)", page_text),
    Source("libreoffice", "libreoffice-help-en-us", r".*/en-US/text/(.*\.html)", page_text),
)
GENOME = Source("e-coli", "bowtie-examples", r".*/genomes/(NC_008253)\.fna\.gz")
VOCABULARY, END = 8192, "<|endoftext|>"
DIGITS = 0.2  # the most, of a document's characters: with more it is a table, as of code pages, with nothing to learn
HELD_OUT = 10  # one base in so many is held out, the last ones
DOWNLOADS = "downloads"


def kept(documents: Iterable[tuple[str, str]], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the (name, text) of documents that have text, are no tables of numbers and are not `seen`, which grows."""
    for name, content in documents:
        digest = hashlib.sha256(content.encode()).digest()
        if content.strip() and len(re.findall("[0-9]", content)) <= DIGITS * len(content) and digest not in seen:
            seen.add(digest)
            yield name, content


def write_documents(folder: Path, downloads: Path) -> tuple[list[dict], dict[str, dict]]:
    """Write train.jsonl and valid.jsonl; return a row for each source, and the documents and bytes of each split."""
    rows, seen = [], set()
    splits = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    with contextlib.ExitStack() as stack:
        streams = {split: stack.enter_context((folder / f"{split}.jsonl").open("wb")) for split in SPLITS}
        for package in dict.fromkeys(source.package for source in SOURCES):
            fetched = packages.fetch(package, downloads, say)
            say(f"reading {package} {fetched.version}")
            found = packages.documents(fetched, [source for source in SOURCES if source.package == package])
            for source, documents in found.items():
                row = {"source": source, "package": package, "version": fetched.version, "documents": 0, "bytes": 0}
                for name, content in kept(documents, seen):
                    split = "valid" if text.in_valid(name) else "train"
                    line = json.dumps({"name": name, "text": content}, ensure_ascii=False, allow_nan=False) + "\n"
                    streams[split].write(line.encode())
                    for counted in (row, splits[split]):
                        counted["documents"] += 1
                        counted["bytes"] += len(content.encode())
                rows.append(row | {"left_out": len(documents) - row["documents"]})
    return rows, splits


def write_genome(folder: Path, downloads: Path) -> dict:
    """Write the bases of GENOME, one byte each, the last tenth as held-out text; return its row."""
    fetched = packages.fetch(GENOME.package, downloads, say)
    ((_, fasta),) = packages.documents(fetched, [GENOME])[GENOME.name]
    header, *lines = fasta.splitlines()
    bases = "".join(lines)
    if not header.startswith(">") or not re.fullmatch("[ACGTRYSWKMBDHVN]+", bases):
        raise ValueError(f"{fetched.path}: NC_008253.fna is not one sequence of bases in FASTA")
    cut = len(bases) - len(bases) // HELD_OUT
    replace(folder / "dna/train.txt", bases[:cut])
    replace(folder / "dna/valid.txt", bases[cut:])
    row = {"source": GENOME.name, "package": GENOME.package, "version": fetched.version}
    return row | {"documents": 1, "bytes": len(bases), "left_out": 0}


def byte_level_bpe(vocabulary: int) -> tuple[Tokenizer, trainers.BpeTrainer]:
    """Return a byte-level BPE without merges, and the trainer that gives it a vocabulary of this size."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    return model, trainers.BpeTrainer(vocab_size=vocabulary, **options)


def write_tokenizer(folder: Path) -> None:
    """Train and write the tokenizer, and the file that names the token that ends a document."""
    model, trainer = byte_level_bpe(VOCABULARY)
    model.train_from_iterator(text.read({"": folder / "train.jsonl"}), trainer)
    replace(folder / "tokenizer.json", model.to_str(pretty=True))
    replace(folder / "tokenizer_config.json", json.dumps({"eos_token": END}, allow_nan=False) + "\n")


def data_config(folder: Path) -> DataConfig:
    """Return the part of a config that names the corpus in a folder."""
    train, valid, tokenizer = (str(folder / name) for name in ("train.jsonl", "valid.jsonl", "tokenizer.json"))
    return DataConfig(train_glob=train, valid_glob=valid, tokenizer=tokenizer)


def build(folder: Path) -> dict:
    """Build the corpus and return its record; if that fails, nothing of it is left but the downloads."""
    begin, downloads = time.perf_counter(), folder / DOWNLOADS
    with filling(folder) as partial:
        sources, splits = write_documents(partial, downloads)
        sources.append(write_genome(partial, downloads))
        say(f"training a tokenizer of {VOCABULARY:,} words on {splits['train']['bytes'] / 1e6:.0f} MB")
        write_tokenizer(partial)
        say("counting its tokens")
        config = data_config(partial)
        for split in SPLITS:
            splits[split] |= {"tokens": len(text.corpus(config, split).ids_T)}
            splits[split] |= {"identity": text.text_rows(config, split).identity}
        made_by = {"python": platform.python_version(), "tokenizers": tokenizers.__version__}
        record = {"sources": sources, "splits": splits, "files": files_of(partial), "made_by": made_by}
        publish(partial, folder, record)
    say(f"built in {time.perf_counter() - begin:.0f} s")
    return record


def described(record: dict) -> str:
    """Return the tables of a corpus: where its text is from, its splits, its files."""
    lines = [f"{'source':12} {'package':22} {'version':22} {'documents':>9} {'left out':>8} {'MB':>7}"]
    total = {name: sum(row[name] for row in record["sources"]) for name in ("documents", "left_out", "bytes")}
    for row in (*record["sources"], {"source": "all", "package": "", "version": "", **total}):
        numbers = f"{row['documents']:9,} {row['left_out']:8,} {row['bytes'] / 1e6:7.2f}"
        lines.append(f"{row['source']:12} {row['package']:22} {row['version']:22} {numbers}")
    for split, of in record["splits"].items():
        tokens = f"{of['tokens']:,} tokens of {of['bytes'] / of['tokens']:.3f} bytes"
        lines.append(f"{split}: {of['documents']:,} documents, {of['bytes'] / 1e6:.2f} MB, {tokens} ({of['identity']})")
    lines += [f"{file['sha256']}  {name} ({file['bytes'] / 1e6:.2f} MB)" for name, file in record["files"].items()]
    return "\n".join([*lines, f"{text_hash(record)}  the text of all"])


def command(folder: Path, archive: Path | None, source: Path | None) -> None:
    """Build the corpus, or unpack it from the archive `source`; print what it is; write `archive`.

    Raises:
        ValueError, OSError: something is missing, damaged or cannot be written; no half-made corpus is left.
    """
    if archive and source:
        raise ValueError("--pack and --unpack are two commands")
    if archive and not archive.parent.is_dir():
        raise ValueError(f"--pack={archive}: there is no folder {archive.parent}")
    if archive:
        check_writable(archive)
    if source and not source.is_file():
        raise ValueError(f"--unpack={source} is no file, and not an archive of --pack")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if source:
            record = unpack(source, folder)
        elif record := whole(folder):
            say(f"built already: {folder}")
        else:
            record = build(folder)
        say(described(record))
        if archive:
            pack(folder, record, archive)


def main(_):
    paths = (flags.FLAGS.folder, flags.FLAGS.pack, flags.FLAGS.unpack)
    with user_errors():
        command(*(path and Path(path).expanduser() for path in paths))


if __name__ == "__main__":
    define_path("folder", "build/corpus", "where the corpus is, or will be")
    define_path("pack", None, "archive to write, to bring to hosts without apt or network")
    define_path("unpack", None, "archive to read in place of building")
    run(main, alone=True)

"""The corpus of the language ablations, of tiny packages that are laid out as Debian's are."""

import gzip
import io
import json
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from experiments import archive, corpus, packages
from experiments.archive import FILES, PARTIAL, RECORD, whole
from launch.provenance import REPOSITORY
from mamba3_jax.data import pipeline, text, token_cache
from mamba3_jax.data.pipeline import identities
from mamba3_jax.data.vocabulary import HuggingFace

pytestmark = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="not a Debian machine")

WORDS = "the kernel holds a lock while it walks the list of pages that nobody else may free".split()  # noqa: SIM905
BASES = "ACGGT" * 200


def prose(number: int) -> str:
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(40)) + f" in {number}.\n"


def kernel() -> bytes:
    """The archive of the kernel's source: prose, code, a table, a translation, the same text twice."""
    files = {f"Documentation/{i:03}.rst": prose(i) for i in range(80)}
    files |= {f"mm/page_{i}.c": f"/* {prose(i + 100)} */\nint page_{i};\n" for i in range(20)}
    files |= {"lib/fonts/font.c": "0x12, 0x34, 0x56,\n" * 50, "fs/again.h": files["mm/page_3.c"]}
    files |= {"Documentation/translations/it/000.rst": "non si legge", "drivers/gpu/table.h": "not read"}
    files |= {"mm/latin.c": b"/* Universit\xe4t */\n"}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(f"linux-source-6.1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


PAGE = (
    '<html><head><title>no</title></head><body><div class="navheader"><div>up</div></div>'
    "<p>One &lt; <b>two</b>\n lines.</p><pre>a\n  b</pre><script>no</script></body></html>"
)


def contents() -> dict[str, dict[str, bytes]]:
    """What is in each package."""
    entry = "".join(f"word{i} \\word\\ n.\n   {prose(i)}   more\n\n   and more\n\n" for i in range(400))
    fasta = ">gi|1| Escherichia coli\n" + "\n".join(BASES[i : i + 70] for i in range(0, len(BASES), 70)) + "\n"
    doc = "usr/share/doc"
    return {
        "linux-source-6.1": {"usr/src/linux-source-6.1.tar.xz": kernel()},
        "dict-gcide": {"usr/share/dictd/gcide.dict.dz": gzip.compress(entry.encode())},
        "anarchism": {f"{doc}/anarchism/markdown/secA1.md.gz": gzip.compress(prose(900).encode())},
        "python3.11-doc": {f"{doc}/python3.11/html/_sources/library/os.rst.txt": prose(901).encode()},
        "postgresql-doc-15": {f"{doc}/postgresql-doc-15/html/app.html": PAGE.encode()},
        "libreoffice-help-en-us": {"usr/share/libreoffice/help/en-US/text/a/b.html": PAGE.replace("One", "1").encode()},
        "bowtie-examples": {f"{doc}/bowtie/examples/genomes/NC_008253.fna.gz": gzip.compress(fasta.encode())},
    }


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    """A folder of the packages."""
    folder = tmp_path_factory.mktemp("mirror")
    for name, files in contents().items():
        root = folder / name
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        (root / "DEBIAN").mkdir()
        control = f"Package: {name}\nVersion: 1:2.3-4\nArchitecture: all\nMaintainer: a <a@b>\nDescription: tiny\n"
        (root / "DEBIAN" / "control").write_text(control)
        target = folder / f"{name}_1%3a2.3-4_all.deb"
        subprocess.run(["dpkg-deb", "--build", root, target], check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def apt(tmp_path, mirror, monkeypatch) -> Path:
    """An `apt-get download` of the mirror, which counts; the vocabulary is as small as the text."""
    program = tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nfor name; do :; done\necho "$name" >> {tmp_path}/downloads\n'
        f'cp {mirror}/"$name"_*.deb . 2>/dev/null || {{ echo "E: Unable to locate package $name" >&2; exit 100; }}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(corpus, "VOCABULARY", 300)
    text._corpus.cache_clear()
    return tmp_path / "downloads"


def build(folder: Path, pack: Path | None = None) -> dict:
    text._corpus.cache_clear()
    corpus.command(folder, pack, None)
    return json.loads((folder / RECORD).read_text())


def documents(folder: Path, split: str) -> dict[str, str]:
    lines = (folder / f"{split}.jsonl").read_text().splitlines()
    return {line["name"]: line["text"] for line in map(json.loads, lines)}


def test_a_corpus_is_what_its_sources_hold(tmp_path, capsys):
    record = build(tmp_path / "corpus")
    train, valid = (documents(tmp_path / "corpus", split) for split in corpus.SPLITS)
    names = train.keys() | valid.keys()
    assert not train.keys() & valid.keys()
    assert not set(train.values()) & set(valid.values())
    assert valid
    assert all(text.in_valid(name) for name in valid)
    assert not any(text.in_valid(name) for name in train)
    everything = train | valid
    kernel = {"linux-doc/000.rst", "linux/mm/page_0.c", "linux/mm/latin.c"}
    assert kernel <= names
    assert len({"linux/fs/again.h", "linux/mm/page_3.c"} & names) == 1
    assert not [name for name in names if "font" in name or "translations" in name or "gpu" in name]
    assert everything["linux/mm/latin.c"] == "/* Universität */\n"
    assert everything["postgresql/app.html"] == "One < two lines.\n\na\n  b\n"
    entries = [everything[name] for name in sorted(names) if name.startswith("gcide/")]
    assert len(entries) > 3
    assert all(entry.startswith("word") and len(entry) >= packages.PIECE for entry in entries[:-1])
    assert "".join(entries) == gzip.decompress(contents()["dict-gcide"]["usr/share/dictd/gcide.dict.dz"]).decode()

    dna = [(tmp_path / "corpus" / "dna" / f"{split}.txt").read_text() for split in corpus.SPLITS]
    assert ("".join(dna), len(dna[1])) == (BASES, len(BASES) // 10)
    of = {row["source"]: row for row in record["sources"]}
    assert of["linux"] == of["linux"] | {"version": "1:2.3-4", "documents": 21, "left_out": 2}
    assert sum(row["documents"] for row in record["sources"]) == len(names) + 1
    config = corpus.data_config(tmp_path / "corpus")
    assert identities(config) == {split: of["identity"] for split, of in record["splits"].items()}
    assert record["splits"]["train"]["bytes"] == sum(len(content.encode()) for content in train.values())
    printed = capsys.readouterr().out
    assert all(f"{file['sha256']}  {name}" in printed for name, file in record["files"].items())


def test_twice_is_the_same_and_nothing_is_done_twice(tmp_path, apt, capsys):
    first, second = (build(tmp_path / name, tmp_path / f"{name}.tar.xz") for name in ("a", "b"))
    assert first == second
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
    fetched = apt.read_text()
    assert fetched.splitlines() == [*contents()] * 2
    before = (tmp_path / "a" / "train.jsonl").stat().st_mtime_ns
    assert build(tmp_path / "a") == first
    assert f"built already: {tmp_path / 'a'}" in capsys.readouterr().out
    assert (apt.read_text(), (tmp_path / "a" / "train.jsonl").stat().st_mtime_ns) == (fetched, before)


def test_its_tokens_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "WORTH", 0)
    record = build(tmp_path / "corpus")
    text._corpus.cache_clear()
    pipeline._identity.cache_clear()
    monkeypatch.setattr(HuggingFace, "encode_all", None)
    found = identities(corpus.data_config(tmp_path / "corpus"))
    assert found == {split: of["identity"] for split, of in record["splits"].items()}


def test_an_archive_brings_all_of_it_where_nothing_is(tmp_path, monkeypatch, capsys):
    path, target = tmp_path / "corpus.tar.xz", tmp_path / "there"
    record = build(tmp_path / "here", path)
    monkeypatch.setenv("PATH", "")
    for said in ("train:", "train:"):  # the second finds it there
        corpus.command(target, None, path)
        assert said in capsys.readouterr().out
    assert json.loads((target / RECORD).read_text()) == record == whole(target)
    assert not (target / PARTIAL).exists()

    (target / "valid.jsonl").write_text("{}\n")  # damaged: it is brought anew
    corpus.command(target, None, path)
    assert whole(target) == record
    other = json.loads((target / RECORD).read_text())
    other["splits"]["train"]["documents"] += 1
    (target / RECORD).write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"there has another corpus than .*corpus.tar.xz: name another --folder"):
        corpus.command(target, None, path)


def packed(path: Path, **files: bytes) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_what_is_no_whole_archive_leaves_nothing(tmp_path):
    path, target = tmp_path / "corpus.tar.xz", tmp_path / "there"
    build(tmp_path / "here", path)
    data, held = path.read_bytes(), (tmp_path / "here" / RECORD).read_bytes()
    spoilt = bytearray(data)
    spoilt[len(data) // 2] ^= 1
    for wrong in (spoilt, data[: len(data) // 2], b"no archive", b""):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(ValueError, match="wrong is damaged"):
            corpus.command(target, None, tmp_path / "wrong")
    files = {name: (tmp_path / "here" / name).read_bytes() for name in FILES}
    changed = files | {"valid.jsonl": files["valid.jsonl"].replace(b"the", b"teh", 1)}
    for content, message in (
        ({"a.txt": b"text"}, "wrong is no archive of --pack"),
        ({RECORD: b"{}"}, "wrong is no archive of --pack"),
        ({RECORD: b"[]"}, "wrong is no archive of --pack"),
        ({RECORD: json.dumps({"files": json.loads(held)["files"]}).encode()}, "wrong is no archive of --pack"),
        ({RECORD: json.dumps(json.loads(held) | {"files": 5}).encode()}, "wrong is no archive of --pack"),
        ({}, "wrong is no archive of --pack"),
        ({RECORD: held, **changed}, "wrong is damaged: its files are not those"),
        ({RECORD: held}, "wrong is damaged: its files are not those"),
        ({RECORD: held, "../train.jsonl": b""}, "wrong is damaged: its files are not those"),
    ):
        packed(tmp_path / "wrong", **content)
        with pytest.raises(ValueError, match=message):
            corpus.command(target, None, tmp_path / "wrong")
    assert [path.name for path in target.iterdir()] == ["lock"]
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize("place", ["write_tokenizer", "publish", "second", "record"])
def test_an_interrupted_build_is_no_corpus_and_goes_on(place, tmp_path, apt, monkeypatch):
    folder, rename, count = tmp_path / "corpus", Path.replace, iter(range(100))

    def stop(*_):
        raise KeyboardInterrupt

    def stop_at_second(path, target):
        return stop() if folder in Path(target).parents and next(count) == 9 else rename(path, target)

    with monkeypatch.context() as patch:
        if place == "second":
            patch.setattr(Path, "replace", stop_at_second)
        elif place == "record":
            patch.setattr(archive, "write_json", stop)  # which writes nothing else
        else:
            patch.setattr(corpus, place, stop)
        with pytest.raises(KeyboardInterrupt):
            build(folder)
    assert not (folder / RECORD).exists()
    assert whole(folder) is None
    (folder / PARTIAL).mkdir()  # as a kill leaves it
    (folder / PARTIAL / "train.jsonl").write_text("{")
    record = build(folder)
    assert record == whole(folder) == build(tmp_path / "straight")
    assert apt.read_text().splitlines().count("linux-source-6.1") == 2  # one of them for the other folder


def test_a_corpus_that_has_changed_is_built_anew(tmp_path, capsys):
    record = build(tmp_path / "corpus")
    for name, content in (("train.jsonl", '{"text": "a"}\n'), (RECORD, "{"), (RECORD, "[]")):
        (tmp_path / "corpus" / name).write_text(content)
        assert build(tmp_path / "corpus") == record
        assert f"{tmp_path / 'corpus' / RECORD} " in capsys.readouterr().out


def test_what_keeps_a_package_away_is_one_line(tmp_path, mirror, monkeypatch):
    folder = tmp_path / "corpus"
    (folder / "downloads" / ".partial").mkdir(parents=True)  # as a kill leaves it
    (folder / "downloads" / ".partial" / "old.deb").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "GENOME", corpus.GENOME._replace(package="gone"))
        with pytest.raises(ValueError, match=r"^`apt-get download gone` failed: E: Unable to locate package gone \(no"):
            build(folder)
    deb = next((folder / "downloads").glob("anarchism_*"))
    data = deb.read_bytes()
    for wrong in (data[: len(data) // 2], data[:-40] + bytes(40), b"", b"no package"):
        deb.write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"{deb.name} was damaged \(.*\) and is deleted: the same command"):
            build(folder)
        assert not deb.exists()
    with monkeypatch.context() as patch:
        sources = [source._replace(files="nowhere/(.*)") for source in corpus.SOURCES]
        patch.setattr(corpus, "SOURCES", sources)
        with pytest.raises(ValueError, match=r"linux-source.* has no file like 'nowhere/\(\.\*\)'"):
            build(folder)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="apt-get is not here: the corpus is built on Debian or Ubuntu"):
        build(tmp_path / "other")
    assert not (folder / RECORD).exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """A limit on the size of a file stands for the disk's end."""
    monkeypatch.setattr(corpus, "say", lambda _: None)  # into a file as well
    path = tmp_path / "corpus.tar.xz"
    build(tmp_path / "here", path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        (tmp_path / "full").mkdir()
        shutil.copytree(tmp_path / "here" / "downloads", tmp_path / "full" / "downloads")
        for folder, source in (("full", None), ("there", path)):
            with pytest.raises(OSError, match=rf"{folder} cannot be filled: .*File too large") as error:
                corpus.command(tmp_path / folder, None, source)
            assert "\n" not in str(error.value)
            assert {inside.name for inside in (tmp_path / folder).iterdir()} <= {"lock", "downloads"}
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        with pytest.raises(OSError, match=r"other.tar.xz cannot be written"):
            corpus.command(tmp_path / "here", tmp_path / "other.tar.xz", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("other*"))
    assert whole(tmp_path / "here")


def test_what_cannot_be_an_archive_is_refused_before_anything_is_built(tmp_path):
    new = tmp_path / "new"
    (tmp_path / "a.tar.xz").mkdir()
    with pytest.raises(ValueError, match="there is no folder"):
        corpus.command(new, tmp_path / "no" / "a.tar.xz", None)
    with pytest.raises(OSError, match=r"a\.tar\.xz cannot be written: IsADirectoryError"):
        corpus.command(new, tmp_path / "a.tar.xz", None)
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match=f"--unpack={absent} is no file"):
            corpus.command(new, None, absent)
    assert not new.exists()


@pytest.mark.full
def test_the_command_ends_with_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "experiments.corpus", f"--folder={tmp_path / 'corpus'}"]
    for more, message in (
        (f"--unpack={tmp_path / 'absent'}", "absent is no file"),
        (f"--pack={tmp_path / 'no' / 'a.tar.xz'}", "there is no folder"),
        ("--unpack=", "an empty path"),
    ):
        done = subprocess.run([*command, more], cwd=REPOSITORY, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr

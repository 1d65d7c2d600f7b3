"""Take documents out of Debian packages, without root: `apt-get download` fetches a package, `dpkg-deb` unpacks it.

A source is the files of a package that match a pattern; each is a document, or `split` makes several of it.
"""

import gzip
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

PIECE = 2**14  # characters, about, in a document of a dictionary
# Without these, apt waits minutes for a mirror that does not answer, several times.
APT_OPTIONS = ("-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1")
DAMAGED = (tarfile.TarError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError)
BLOCKS = frozenset("p div h1 h2 h3 h4 h5 h6 li dt dd tr table pre br hr title".split())  # noqa: SIM905
# Parts of a page that are not its own text: code, navigation, search.
SKIPPED = frozenset("head script style header footer aside nav noscript button".split())  # noqa: SIM905
SKIPPED_CLASSES = frozenset({"navheader", "navfooter"})


class Source(NamedTuple):
    """Documents of one kind."""

    name: str  # every document's name begins with it
    package: str
    files: str  # a pattern of whole paths in the package; its group is the rest of a document's name
    text: Callable[[str], str] = str  # content of a file -> its text
    split: Callable[[str], list[str]] = lambda text: [text]  # text -> documents


class Package(NamedTuple):
    """A fetched package."""

    name: str
    version: str
    path: Path


class _Page(HTMLParser):
    """Collects the text of a page: blocks on lines of their own, white space as a browser shows it."""

    def __init__(self):
        super().__init__()
        self.parts, self.pre, self.skipped, self.depth = ["\n"], 0, "", 0

    def handle_starttag(self, tag, attrs):
        if self.skipped:
            self.depth += tag == self.skipped
        elif tag in SKIPPED or dict(attrs).get("class") in SKIPPED_CLASSES:
            self.skipped, self.depth = tag, 1
        elif tag in BLOCKS:
            self.parts.append("\n")
            self.pre += tag == "pre"

    def handle_endtag(self, tag):
        if self.skipped:
            self.depth -= tag == self.skipped
            self.skipped = self.skipped if self.depth else ""
        elif tag in BLOCKS:
            self.parts.append("\n")
            self.pre -= tag == "pre"

    def handle_data(self, data):
        if self.skipped:
            return
        if not self.pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self.parts[-1].endswith(("\n", " ")) else data
        self.parts += [data] if data else []


def page_text(html: str) -> str:
    """Return the text of an HTML page without its navigation."""
    page = _Page()
    page.feed(html)
    page.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(page.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def entries(text: str) -> list[str]:
    """Split a dictionary's text into runs of whole entries, of at least PIECE characters each but for the last."""
    pieces, begin = [], 0
    for match in re.finditer(r"\n\n(?=\S)", text):  # an entry's own lines are indented
        if match.end() - begin >= PIECE:
            pieces.append(text[begin : match.end()])
            begin = match.end()
    return [*pieces, text[begin:]] if begin < len(text) else pieces


def fetch(package: str, folder: Path, say: Callable[[str], None]) -> Package:
    """Return the package of this name in the folder, which is downloaded unless it is there.

    Raises:
        ValueError: apt-get or dpkg-deb is missing, or the package cannot be downloaded or read; the message says why.
    """
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise ValueError(f"{program} is not here: the corpus is built on Debian or Ubuntu, and --unpack needs none")
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"{package}_*.deb")) or [_download(package, folder, say)]
    version = subprocess.run(["dpkg-deb", "--field", found[-1], "Version"], capture_output=True, text=True)
    if version.returncode:
        raise _damaged(found[-1], version.stderr)
    return Package(package, version.stdout.strip(), found[-1])


def _download(package: str, folder: Path, say) -> Path:
    """Download a package beside its place, and move it there when apt has checked it."""
    say(f"downloading {package}")
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # a killed run leaves one
    partial.mkdir()
    try:
        command = ["apt-get", *APT_OPTIONS, "--quiet", "download", package]
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
        paths = list(partial.glob("*.deb"))
        if done.returncode or len(paths) != 1:
            why = [line for line in done.stderr.splitlines() if line.startswith("E: ")] or [done.stderr]
            raise ValueError(
                f"`apt-get download {package}` failed: {' '.join(why)} (no network, or `apt-get update` is due)"
            )
        return paths[0].rename(folder / paths[0].name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _damaged(path: Path, why) -> ValueError:
    """Delete a download that cannot be read, and return the error to raise."""
    path.unlink(missing_ok=True)
    why = " ".join(str(why).split())
    return ValueError(f"{path} was damaged ({why}) and is deleted: the same command downloads it again")


def documents(package: Package, sources: list[Source]) -> dict[str, list[tuple[str, str]]]:
    """Return the (name, text) of each source's documents, sorted by name.

    Raises:
        ValueError: the package is damaged, or has no file of a source.
    """
    found = {source.name: [] for source in sources}
    for path, content in members(package, lambda path: any(re.fullmatch(source.files, path) for source in sources)):
        for source in sources:
            if match := re.fullmatch(source.files, path):
                parts = source.split(source.text(decoded(content)))
                names = [match[1]] if len(parts) == 1 else [f"{match[1]}/{number:06}" for number in range(len(parts))]
                found[source.name] += [(f"{source.name}/{name}", text) for name, text in zip(names, parts, strict=True)]
    for source in sources:
        if not found[source.name]:
            raise ValueError(f"{package.path} has no file like {source.files!r}: the package is another than it was")
    return {name: sorted(texts) for name, texts in found.items()}


def decoded(content: bytes) -> str:
    """Return the text of a file, UTF-8 or else Latin-1."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def members(package: Package, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the wanted files of a package, those inside of a .tar.xz included.

    A .gz or .dz is unpacked.

    Raises:
        ValueError: the package is damaged; it is deleted.
    """
    command = ["dpkg-deb", "--fsys-tarfile", package.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unpacking:
        why = ""
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                yield from _files(archive, wanted)
        except DAMAGED as error:
            why = str(error)
        while unpacking.stdout.read(2**16):  # read the rest: dpkg-deb would wait for ever for somebody to do so
            pass
        if unpacking.wait() or why:
            raise _damaged(package.path, unpacking.stderr.read().decode() or why)


def _files(archive: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        path = member.name.removeprefix("./")
        if member.isfile() and path.endswith(".tar.xz"):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r|xz") as inner:
                yield from _files(inner, wanted)
        elif member.isfile() and wanted(path):
            content = archive.extractfile(member).read()
            yield path, gzip.decompress(content) if path.endswith((".gz", ".dz")) else content

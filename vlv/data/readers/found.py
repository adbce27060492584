"""What every reader yields (the place of a sample and a way to load it), and what the readers share."""

import hashlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Content:
    """A loaded sample.

    Attributes:
        image: encoded bytes.
        caption: as it is in the source.
        caption_problem: reason and message, if there is a caption that cannot be used.
        url: the origin of the image, if the source knows more than the place in it.
        meta: for the JSON of the sample.
        split: if the source has our splits already.
    """

    image: bytes
    caption: str | None = None
    caption_problem: tuple[str, str] | None = None
    url: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    split: Split | None = None


@dataclass(frozen=True)
class Found:
    """A sample at a place of the source.

    Attributes:
        part, index: the sample is number `index` of part number `part`.
        url: the name of the place.
        load: reads the sample, in any thread, and raises `OSError` or `ValueError` if that fails. None: the source says
            that there is no image.
        reason, message: why there is no image; the reason is a short name that is counted.

    In `url` and `message`, which may hold names of files, bytes that are not Unicode become U+FFFD.
    """

    part: int
    index: int
    url: str
    load: Callable[[], Content] | None
    reason: str = ""
    message: str = ""

    def __post_init__(self) -> None:
        for name in ("url", "message"):
            object.__setattr__(self, name, readable(getattr(self, name)))


class Reader(Protocol):
    """A source. It has some parts, each a sequence of samples, always in the same order."""

    format: str

    def total(self) -> int:
        """How many samples there are, with failed ones; an estimate if the source does not say."""
        ...

    def files_hash(self) -> str:
        """A hash of the names, sizes and times of the files; it changes when the source does."""
        ...

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        """All samples from number `skip` of part `part` on. Memory holds one sample."""
        ...


# A lone surrogate: Python uses it for a byte of a file name that is not UTF-8; JSON can hold a single "\\ud800".
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    return _SURROGATE.search(text) is None


def readable(text: str) -> str:
    """The text with U+FFFD in the place of what cannot be written as UTF-8."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from `root` down with the names of its files, sorted; hidden folders and files are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def locate(folder: Path, name: str) -> Path | tuple[str, str]:
    """The file `name` in `folder` or below; if there is none, a reason and a message."""
    path = PurePosixPath(name)
    if path.is_absolute() and path.is_relative_to(folder.resolve().as_posix()):
        path = path.relative_to(folder.resolve().as_posix())
    if path.is_absolute() or ".." in path.parts:
        return "outside_folder", f"the name leads out of {folder}"
    try:
        there = (folder / path).is_file()
    except (OSError, ValueError) as error:  # a lone surrogate, a null byte, a name that is too long
        return "image_missing", f"no file can have this name ({error})"
    return folder / path if there else ("image_missing", f"{folder} does not have it")


def rank(seed: int, name: str) -> bytes:
    """8 bytes of a hash. They put names in a shuffled order that is the same each time."""
    return hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def shuffled(paths: Iterable[Path], root: Path, seed: int) -> list[Path]:
    """Paths below `root` in the order of their names' ranks."""
    return sorted(paths, key=lambda path: (rank(seed, path.relative_to(root).as_posix()), path))


def files_hash(paths: Iterable[Path]) -> str:
    """A hash of the files' names, sizes and times of modification."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def database(folder: Path, name: str, table: str) -> sqlite3.Connection:
    """A new, empty SQLite database on disk, for a list that may be too long for memory.

    Args:
        folder, name: the file is `folder`/`name`.sqlite.
        table: its only table, as the SQL after CREATE TABLE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.sqlite"
    path.unlink(missing_ok=True)
    made = sqlite3.connect(path)
    made.execute("PRAGMA synchronous=OFF")  # it need not outlive the process
    made.execute(f"CREATE TABLE {table}")
    return made

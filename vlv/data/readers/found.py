"""What a reader gives, whatever the format: samples where they lie, and a way to load each; and what readers share."""

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
    """A sample as loaded. `image` holds encoded bytes; `url` names its origin better than its place does.

    `caption` is as in the source; `caption_problem`: the reason and message where there is one but not usable.
    `split` is given where the source has our splits already.
    """

    image: bytes
    caption: str | None = None
    caption_problem: tuple[str, str] | None = None
    url: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    split: Split | None = None


@dataclass(frozen=True)
class Found:
    """A sample at a place of the source: number `index` of part number `part`.

    `load` reads it, in any thread; it raises `OSError` or `ValueError` where that fails. None: the source itself
    says that there is no image, for `reason` (a short name that is counted) and `message`. What is not Unicode in
    `url` and `message` (they hold names of files and members) is replaced by the sign for it.
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
    """A source: some parts, each a sequence of samples, always in the same order."""

    format: str

    def total(self) -> int:
        """How many samples there are, failed ones included; an estimate where the source does not say."""
        ...

    def files_hash(self) -> str:
        """A hash of the names, sizes and times of the files; it changes when the source does."""
        ...

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        """All samples from number `skip` of part `part` on; one sample in memory."""
        ...


# Half of a character: Python has it for a byte of a file name that is not UTF-8, JSON for a "\\ud800" alone.
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    return _SURROGATE.search(text) is None


def readable(text: str) -> str:
    """The text with the sign for an unknown character wherever it could not be written as UTF-8."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from `root` down with the names of its files, sorted; hidden folders and files are left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def locate(folder: Path, name: str) -> Path | tuple[str, str]:
    """The file that a source calls `name`, in `folder` or below; where there is none, a reason and a message."""
    path = PurePosixPath(name)
    if path.is_absolute() and path.is_relative_to(folder.resolve().as_posix()):
        path = path.relative_to(folder.resolve().as_posix())
    if path.is_absolute() or ".." in path.parts:
        return "outside_folder", f"the name leads out of {folder}"
    try:
        there = (folder / path).is_file()
    except (OSError, ValueError) as error:  # half a character, a null byte, a name too long
        return "image_missing", f"no file can have this name ({error})"
    return folder / path if there else ("image_missing", f"{folder} does not have it")


def rank(seed: int, name: str) -> bytes:
    """8 bytes by which names are put in an order that is shuffled, but the same each time."""
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
    """An empty database `folder`/`name`.sqlite with one table, described by the SQL after CREATE TABLE."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.sqlite"
    path.unlink(missing_ok=True)
    made = sqlite3.connect(path)
    made.execute("PRAGMA synchronous=OFF")  # nothing in it has to outlive the process
    made.execute(f"CREATE TABLE {table}")
    return made

"""Reads webdataset tars: the output of img2dataset, tars of the same form, and our own shards."""

import functools
import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from vlv.data.readers import captions
from vlv.data.readers.formats import ReadOptions, Rule
from vlv.data.readers.found import Content, Found, Reader, Split, files_hash, shuffled
from vlv.data.readers.img2dataset import FilesReader, failures, is_files_layout, is_table
from vlv.data.shards import MANIFEST
from vlv.data.writer import WRITTEN
from vlv.io import files, images

ENDINGS = (".tar", ".tar.gz", ".tgz")
_TEXTS = ("txt", "caption")
_LARGEST = 1 << 30  # bytes of a member that is read; a header can claim any size
# What tarfile raises for a damaged tar; some errors come from a number that it cannot parse.
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError)


@dataclass
class _Members:
    """The members of one sample.

    Attributes:
        places: extension -> offset and size in bytes; in a compressed tar the bytes of the members that are used.
        problem: why there is no sample.
    """

    key: str
    places: dict[str, tuple[int, int] | bytes] = field(default_factory=dict)
    problem: str | None = None


def recognises(format: str, source: Path, inside: frozenset[str]) -> bool:
    """shards: one of our data folders. img2dataset: tars, or its "files" layout."""
    if format == "shards":
        return (source / MANIFEST).exists() and (source / "train").is_dir()
    if source.is_file():
        return source.name.lower().endswith(ENDINGS)
    return not inside.isdisjoint(ENDINGS) or is_files_layout(source)


def open_reader(format: str, source: Path, scratch: Path, options: ReadOptions) -> Reader:
    """The reader of shards, of tars, or of the "files" layout."""
    if format == "shards" or source.is_file() or any(_tars(source)):
        return TarReader(source, options.seed, options.rule, ours=format == "shards")
    return FilesReader(source, scratch, options.seed, options.rule)


def _tars(folder: Path) -> Iterator[Path]:
    return (path for ending in ENDINGS for path in folder.rglob(f"*{ending}") if path.is_file())


class TarReader:
    """All tars below `root` (or one tar), in an order that is shuffled by `seed`. A part is a tar.

    `read` reads only headers; `Found.load` reads the bytes of a sample. (In a compressed tar `read` reads them too.)
    After the samples of a tar come the rows that img2dataset's parquet file beside it lists as failed. `ours`: the tars
    are shards of a data folder.
    """

    def __init__(self, root: Path, seed: int, rule: Rule, *, ours: bool = False) -> None:
        self.format = "shards" if ours else "img2dataset"
        self._root = root if root.is_dir() else root.parent
        self._seed, self._rule, self._ours = seed, rule, ours
        self._tars = shuffled(_tars(root) if root.is_dir() else [root], self._root, seed)

    def total(self) -> int:
        """From img2dataset's `_stats.json`. A tar without it counts as the average; if none has it, one is counted."""
        counts = [self._stated(tar) for tar in self._tars]
        known = [count for count in counts if count is not None]
        if not known:
            known = [self._counted(tar) for tar in self._tars[:1]]
        return round(sum(known) / len(known) * len(self._tars)) if known else 0

    def _stated(self, tar: Path) -> int | None:
        path = tar.with_name(f"{_stem(tar)}_stats.json")
        try:
            return int(files.read_json(path)["count"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def _counted(self, tar: Path) -> int:
        try:
            return sum(1 for _ in _samples(tar))
        except _DAMAGE:
            return 0  # `read` names the damage

    def files_hash(self) -> str:
        return files_hash(self._tars)

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        for number, tar in enumerate(self._tars[part:], part):
            for index, found in enumerate(self._items(tar, number)):
                if number > part or index >= skip:
                    yield found

    def _items(self, tar: Path, number: int) -> Iterator[Found]:
        name = tar.relative_to(self._root).as_posix()
        present: set[str] = set()
        index = 0
        try:
            for members in _samples(tar):
                place = f"{name}/{members.key}"
                if members.problem is not None:
                    yield Found(number, index, place, None, "unreadable", members.problem)
                elif not any(_is_image(end) for end in members.places):
                    yield Found(number, index, place, None, "image_missing", _no_image(members))
                else:
                    yield Found(number, index, place, functools.partial(self._load, tar, members, place))
                present.add(members.key)
                index += 1
        except _DAMAGE as error:
            yield Found(number, index, name, None, "damaged_file", f"{error} after {index} samples")
            index += 1
        table = tar.with_name(f"{_stem(tar)}.parquet")
        if table.exists() and is_table(table):
            for offset, (url, reason, message) in enumerate(failures(table, present)):
                yield Found(number, index + offset, url, None, reason, message)

    def _load(self, tar: Path, members: _Members, place: str) -> Content:
        chosen = [end for end in members.places if _is_image(end)]
        if len(chosen) != 1:
            raise ValueError(f"{len(chosen)} images instead of one (members: {', '.join(sorted(members.places))})")
        wanted = [chosen[0], *(end for end in (*_TEXTS, "json") if end in members.places)]
        read = _bytes(tar, members, wanted)
        image, text = read[chosen[0]], next((read[end] for end in _TEXTS if end in read), None)
        try:
            value = captions.parse_json(read["json"]) if "json" in read else {}
            caption, others = captions.pick(captions.of_json(value), self._rule, self._seed, place)
            caption = text.decode() if text is not None else caption
        except ValueError as error:
            return Content(image, caption_problem=("caption_unreadable", str(error)))
        if caption is not None and not caption.strip():
            return self._content(tar, image, None, ("caption_empty", "the caption is empty"), value, others)
        return self._content(tar, image, caption, None, value, others)

    def _content(
        self,
        tar: Path,
        image: bytes,
        caption: str | None,
        problem: tuple[str, str] | None,
        value: dict[str, Any],
        others: dict[str, Any],
    ) -> Content:
        if self._ours:
            split: Split | None = next((one for one in get_args(Split) if one == tar.parent.name), None)
            meta = {key: one for key, one in value.items() if key not in WRITTEN}
            return Content(image, caption, problem, str(value.get("source") or "") or None, meta, split)
        known = captions.facts(value)
        url = known.get("url")
        return Content(
            image,
            caption,
            problem,
            url if isinstance(url, str) else None,
            ({"origin": known} if known else {}) | others,
        )


def _no_image(members: _Members) -> str:
    return (
        f"no image among its members ({', '.join(sorted(members.places))}); the members of a sample must follow one "
        "another in the tar (tar --sort=name)"
    )


def _stem(tar: Path) -> str:
    """00000.tar and 00000.tar.gz -> 00000."""
    ending = next((one for one in ENDINGS if tar.name.lower().endswith(one)), "")
    return tar.name[: len(tar.name) - len(ending)]


def _is_compressed(tar: Path) -> bool:
    return tar.suffix.lower() in (".gz", ".tgz")


def _samples(tar: Path) -> Iterator[_Members]:
    """Runs of members with the same key. The key is a name up to its first dot, as in webdataset.

    Raises:
        One of `_DAMAGE`: the next member cannot be found. A bad member that can be skipped is a sample with a problem.
    """
    current: _Members | None = None
    compressed = _is_compressed(tar)
    with gzip.open(tar) if compressed else tar.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for begin, member in _members(archive, stream):
            if isinstance(member, str):
                if current is not None:
                    yield current
                yield _Members(f"byte {begin}", problem=member)
                current = None
                continue
            if not member.isreg():
                continue
            path = PurePosixPath(member.name)
            stem, _, extension = path.name.partition(".")
            key = (path.parent / stem).as_posix()
            if current is None or key != current.key:
                if current is not None:
                    yield current
                current = _Members(key)
            if member.issparse():
                current.problem = f"{member.name} is stored as a sparse file"
                continue
            if member.size > _LARGEST:
                current.problem = f"{member.name} has {member.size:,} bytes by its header"
                continue
            place = (member.offset_data, member.size)
            read = compressed and _is_wanted(extension.lower())
            current.places[extension.lower()] = _slice(stream, *place) if read else place
    if current is not None:
        yield current


def _is_image(extension: str) -> bool:
    return f".{extension}" in images.SUFFIXES


def _is_wanted(extension: str) -> bool:
    return _is_image(extension) or extension in (*_TEXTS, "json")


def _members(archive: tarfile.TarFile, stream: BufferedIOBase) -> Iterator[tuple[int, tarfile.TarInfo | str]]:
    """Each member with the place of its header. A bad member is a text, if the next member can be found.

    Raises:
        One of `_DAMAGE`.
    """
    reached = -1
    while True:
        begin: int = archive.offset  # type: ignore[attr-defined]
        found: tarfile.TarInfo | str | None
        try:
            found = archive.next()
        except _DAMAGE as error:
            found = str(error)
            if archive.offset <= reached:  # type: ignore[attr-defined]
                raise
        archive.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
        if found is None:
            break
        yield begin, found
        if archive.offset <= reached:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"the member at byte {begin} has a negative size")
        reached = archive.offset  # type: ignore[attr-defined]
    stream.seek(begin)
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a bad header for the end
        raise tarfile.ReadError(f"no member begins at byte {begin}")


def _bytes(tar: Path, members: _Members, wanted: list[str]) -> dict[str, bytes]:
    read: dict[str, bytes] = {}
    with tar.open("rb") as stream:
        for end in wanted:
            place = members.places[end]
            read[end] = place if isinstance(place, bytes) else _slice(stream, *place)
    return read


def _slice(stream: BufferedIOBase, offset: int, size: int) -> bytes:
    stream.seek(offset)
    data = stream.read(size)
    if len(data) != size:
        raise OSError(f"the tar ends {size - len(data)} bytes too early")
    return data

"""Webdataset tars: img2dataset's output, others' of the same form, and our own shards."""

import functools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from vlv import files
from vlv.data.readers import captions
from vlv.data.readers.found import IMAGES, Content, Found, Split, shuffled, stamp
from vlv.data.readers.img2dataset import failures, is_table
from vlv.data.readers.names import Rule
from vlv.data.writer import WRITTEN

_TEXTS = ("txt", "caption")


@dataclass
class _Members:
    """Where the members of one sample lie in the tar: extension -> offset and size in bytes."""

    key: str
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


class TarReader:
    """All tars below `root` (or one tar), in an order shuffled by `seed`; a part is a tar.

    Only headers are read here; a sample's bytes are read by `Found.load`. After a tar's samples come the rows
    that img2dataset's parquet file beside it lists as failed. `ours`: the tars are shards of a data folder.
    """

    def __init__(self, root: Path, seed: int, rule: Rule, *, ours: bool = False) -> None:
        self.format = "shards" if ours else "img2dataset"
        self._root = root if root.is_dir() else root.parent
        self._seed, self._rule, self._ours = seed, rule, ours
        found = [path for path in root.rglob("*.tar") if path.is_file()] if root.is_dir() else [root]
        self._tars = shuffled(found, self._root, seed)

    def total(self) -> int:
        """By img2dataset's `_stats.json`; a tar without is taken to be as the others, or counted."""
        counts = [self._stated(tar) for tar in self._tars]
        known = [count for count in counts if count is not None]
        if not known:
            known = [self._counted(tar) for tar in self._tars[:1]]
        return round(sum(known) / len(known) * len(self._tars)) if known else 0

    def _stated(self, tar: Path) -> int | None:
        path = tar.with_name(f"{tar.stem}_stats.json")
        try:
            return int(files.read_json(path)["count"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _counted(self, tar: Path) -> int:
        try:
            return sum(1 for _ in self._samples(tar))
        except (tarfile.TarError, OSError):
            return 0  # `read` names the damage

    def fingerprint(self) -> str:
        return stamp(self._tars)

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
            for members in self._samples(tar):
                place = f"{name}/{members.key}"
                yield Found(number, index, place, functools.partial(self._load, tar, members, place))
                present.add(members.key)
                index += 1
        except (tarfile.TarError, OSError) as error:
            yield Found(number, index, name, None, "damaged_file", f"{error} after {len(present)} samples")
            index += 1
        table = tar.with_suffix(".parquet")
        if table.exists() and is_table(table):
            for offset, (url, reason, message) in enumerate(failures(table, present)):
                yield Found(number, index + offset, url, None, reason, message)

    def _samples(self, tar: Path) -> Iterator[_Members]:
        """Runs of members with the same key; the key is a name up to its first dot, as webdataset has it."""
        current: _Members | None = None
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isreg():
                    continue
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                key = (path.parent / stem).as_posix()
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    current = _Members(key)
                current.places[extension.lower()] = (member.offset_data, member.size)
                archive.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header
        if current is not None:
            yield current

    def _load(self, tar: Path, members: _Members, place: str) -> Content:
        chosen = [end for end in members.places if f".{end}" in IMAGES]
        if len(chosen) != 1:
            raise ValueError(f"{len(chosen)} images instead of one (members: {', '.join(sorted(members.places))})")
        wanted = [chosen[0], *(end for end in (*_TEXTS, "json") if end in members.places)]
        with tar.open("rb") as stream:
            read = {end: _slice(stream, *members.places[end]) for end in wanted}
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


def _slice(stream: Any, offset: int, size: int) -> bytes:
    stream.seek(offset)
    data: bytes = stream.read(size)
    if len(data) != size:
        raise OSError(f"the tar ends {size - len(data)} bytes too early")
    return data

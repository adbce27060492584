"""Reads a folder of images, at any depth, with captions in `.txt`, `.caption` or `.json` files of the same names."""

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlv.data.readers import captions
from vlv.data.readers.formats import ReadOptions, Rule
from vlv.data.readers.found import Content, Found, database, rank, walk
from vlv.data.shards import DataError
from vlv.io import files, images

SIDECARS = (".txt", ".caption", ".json")  # the first that exists is used
# Files that may hold the captions of a whole folder, unless their names begin as in `_ABOUT`.
_LISTS = (*SIDECARS, ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_ABOUT = ("readme", "license", "licence", "notice", "credits", "attribution", "dataset_info")


class FolderReader:
    """Images below `root` without hidden ones, in an order that is shuffled by `seed`.

    A database below `scratch` keeps the list of files, so that memory does not grow with it.
    """

    format = "folder"

    def __init__(self, root: Path, scratch: Path, seed: int, rule: Rule) -> None:
        self._root, self._seed, self._rule = root, seed, rule
        self._captioned = False  # whether any image has a file of captions beside it
        self._list: str | None = None  # the first other file that may hold captions
        columns = "rank BLOB, path BLOB, size INTEGER, time INTEGER, PRIMARY KEY (rank, path)"
        self._listing = database(scratch, "listing", f"files ({columns}) WITHOUT ROWID")
        self._listing.executemany("INSERT INTO files VALUES (?, ?, ?, ?)", self._walk())
        self._listing.commit()

    def _walk(self) -> Iterator[tuple[bytes, bytes, int, int]]:
        for folder, names in walk(self._root):
            beside = set(names)
            for name in names:
                path = folder / name
                if self._list is None and _may_list(name):
                    self._list = path.relative_to(self._root).as_posix()
                if path.suffix.lower() in images.SUFFIXES and path.is_file():
                    self._captioned = self._captioned or any(path.with_suffix(end).name in beside for end in SIDECARS)
                    relative, status = path.relative_to(self._root).as_posix(), path.stat()
                    yield rank(self._seed, relative), os.fsencode(relative), status.st_size, status.st_mtime_ns

    def ask_for_captions(self) -> None:
        """Check that captions were found, unless no file looks like captions.

        Raises:
            DataError: no image has a caption beside it, but some file may hold all captions. Names it and the remedy.
        """
        if self._captioned or self._list is None or not self.total():
            return
        command = f"vlv data import {self._root / self._list}"
        if self._list.lower().endswith((".txt", ".caption")):
            command += " --format table"
        raise DataError(
            f"{self._root} holds {self._list}, but no image has a file with its caption beside it (NAME.txt, "
            f"NAME.caption or NAME.json). If that file lists images and captions: {command}. If there are no captions: "
            "--caption-column none"
        )

    def total(self) -> int:
        return int(self._listing.execute("SELECT count(*) FROM files").fetchone()[0])

    def files_hash(self) -> str:
        digest = hashlib.sha256()
        for row in self._listing.execute("SELECT path, size, time FROM files ORDER BY rank, path"):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def read(self, part: int = 0, skip: int = 0) -> Iterator[Found]:
        """One part: the images."""
        rows = self._listing.execute("SELECT path FROM files ORDER BY rank, path LIMIT -1 OFFSET ?", (skip,))
        for index, (name,) in enumerate(rows, skip):
            path = self._root / os.fsdecode(name)
            url = name.decode("utf-8", "replace")
            yield Found(part, index, url, functools.partial(self._load, path, url))

    def _load(self, path: Path, url: str) -> Content:
        image = path.read_bytes()
        sidecar = next((path.with_suffix(end) for end in SIDECARS if path.with_suffix(end).exists()), None)
        if sidecar is None:
            return Content(image)
        try:
            caption, meta = self._read(path, sidecar, url)
        except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            return Content(image, caption_problem=("caption_unreadable", f"{sidecar.name}: {error}"))
        if caption is not None and not caption.strip():
            return Content(image, caption_problem=("caption_empty", f"{sidecar.name} is empty"), meta=meta)
        return Content(image, caption, meta=meta, url=self._url(meta))

    def _read(self, path: Path, sidecar: Path, url: str) -> tuple[str | None, dict[str, Any]]:
        """The caption, and the other values of the JSON file, wherever the caption comes from."""
        if sidecar.suffix == ".json":
            value = captions.parse_json(sidecar.read_bytes())
            caption, others = captions.pick(captions.of_json(value), self._rule, self._seed, url)
            return caption, _origin(value) | others
        caption = files.read_text(sidecar, "Correct it.")
        beside = path.with_suffix(".json")
        return caption, _origin(captions.parse_json(beside.read_bytes())) if beside.exists() else {}

    def _url(self, _meta: dict[str, Any]) -> str | None:
        return None  # the place in the folder is its name


def _may_list(name: str) -> bool:
    return name.lower().endswith(_LISTS) and not name.lower().startswith(_ABOUT)


def _origin(value: dict[str, Any]) -> dict[str, Any]:
    known = captions.facts(value)
    return {"origin": known} if known else {}


def recognises(format: str, source: Path, inside: frozenset[str]) -> bool:
    """Any folder. This format is asked last."""
    return source.is_dir()


def open_reader(format: str, source: Path, scratch: Path, options: ReadOptions) -> FolderReader:
    """The reader of a folder of images."""
    if not source.is_dir():
        raise DataError(f"{source} is not a folder")
    return FolderReader(source, scratch, options.seed, options.rule)

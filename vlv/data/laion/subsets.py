"""Nested random subsets of the rows that meet the criteria: the N rows with the smallest seeded hash of the URL.

So the 6M subset lies within the 18M subset, and that within the 40M subset, whatever the order of the tables. Memory
stays constant: a first pass distributes the rows over some hundred files by the first bits of the hash; a second pass
sorts one file after the other. Equal URLs end up in the same file, and the rows come out in the order of the hash.

The selection is downloaded with img2dataset, in an environment of its own, because it pins old releases of what this
project uses. `install_command` and `download_commands` give the commands.
"""

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet as pq

from vlv.data.laion.criteria import SCHEMA, Criteria, columns, filter_rows
from vlv.data.shards import DataError
from vlv.io import files
from vlv.io.progress import Meter, meter

REPORT = "selection.json"
_MAX_PIECES = 512  # files open at a time
_SPOOLED = SCHEMA.append(pa.field("rank", pa.uint64()))
_LISTED = SCHEMA.append(pa.field("subset", pa.string()))


@dataclass(frozen=True)
class Sizes:
    """Rows that are read at a time (`batch`), sorted at a time (`piece`, about), and in one file of a list (`file`)."""

    batch: int = 1 << 17
    piece: int = 100_000
    file: int = 1_000_000


DEFAULT = Sizes()


@dataclass(frozen=True)
class Subset:
    """A subset. `count` rows were asked for, it has `rows`; `new` of these are in no smaller subset."""

    name: str
    count: int
    rows: int
    new: int


@dataclass(frozen=True)
class Selection:
    """How many rows were read, dropped (by reason) and passed (each URL once), and the subsets."""

    read: int
    dropped: dict[str, int]
    passed: int
    subsets: list[Subset]


def select(
    tables: Sequence[Path],
    output: Path,
    counts: dict[str, int],
    seed: int,
    criteria: Criteria,
    sizes: Sizes = DEFAULT,
) -> Selection:
    """Write the URL lists of nested subsets.

    `output`/NAME/part-*.parquet holds the rows of subset NAME that no smaller subset has, so nothing is downloaded
    twice. The column `subset` names the subset. `output`/selection.json is the report. Of several rows with the same
    URL the first one in the order of `tables` is used. The folder is put in place as a whole.

    Args:
        counts: rows by the name of the subset, such as {"6M": 6_000_000}.

    Raises:
        DataError: there is no table, a table cannot be read or lacks a column, or `output` holds something else.
    """
    if output.exists() and any(output.iterdir()) and not (output / REPORT).exists():
        raise DataError(f"{output} is not an earlier selection, and would be replaced. Choose another folder.")
    found = _tables(tables)
    order = sorted(counts, key=lambda name: counts[name])
    dropped: Counter[str] = Counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".select.", dir=output.parent) as spool, files.atomic_folder(output) as folder:
        rows = sum(_rows_in(path) for path in found)
        pieces = min(_MAX_PIECES, 1 + rows // sizes.piece)
        with meter("Reading metadata", rows) as progress:
            _deal(_batches(found, criteria, sizes.batch), Path(spool), pieces, seed, criteria, dropped, progress)
        lists = [_List(folder / name, name, sizes.file) for name in order]
        passed = _write(Path(spool), pieces, lists, [counts[name] for name in order], dropped)
        new = [one.rows for one in lists]
        below = [0, *np.cumsum(new).tolist()]
        subsets = [Subset(name, counts[name], below[i + 1], new[i]) for i, name in enumerate(order)]
        result = Selection(rows, dict(sorted(dropped.items())), passed, subsets)
        about = {"seed": seed, "criteria": asdict(criteria), "tables": [path.name for path in found]}
        files.write_json(folder / REPORT, about | asdict(result))
    return result


def _tables(paths: Sequence[Path]) -> list[Path]:
    """The parquet files among `paths` and in the folders among them, each once."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not inside or not path.exists():
            raise DataError(f"{path} is neither a parquet file nor a folder with one")
        found += inside
    return list(dict.fromkeys(found))


def _rows_in(path: Path) -> int:
    try:
        with pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}. Download it again.") from error


def _deal(
    batches: Iterator[pa.Table],
    spool: Path,
    pieces: int,
    seed: int,
    criteria: Criteria,
    dropped: Counter[str],
    progress: Meter,
) -> None:
    """Distribute the rows that meet the criteria over `pieces` files by their rank, in the order of reading."""
    writers = [pa.ipc.new_stream(spool / f"{i}.arrow", _SPOOLED) for i in range(pieces)]
    try:
        for batch in batches:
            passed = filter_rows(batch, criteria, dropped)
            ranks = _ranks(passed["URL"].to_pylist(), seed)
            piece_of = (ranks / 2.0**64 * pieces).astype(np.int64).clip(max=pieces - 1)
            turn = np.argsort(piece_of, kind="stable")
            ends = np.searchsorted(piece_of[turn], np.arange(pieces + 1))
            dealt = passed.append_column("rank", pa.array(ranks)).take(pa.array(turn)).combine_chunks()
            for i in range(pieces):
                if ends[i + 1] > ends[i]:
                    writers[i].write_table(dealt.slice(ends[i], ends[i + 1] - ends[i]))
            progress.advance(len(batch))
    finally:
        for writer in writers:
            writer.close()


def _batches(tables: list[Path], criteria: Criteria, rows: int) -> Iterator[pa.Table]:
    """Some rows at a time, with the columns of `SCHEMA`. A column that a table lacks is empty."""
    for path in tables:
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                names = columns(file.schema_arrow.names, str(path), criteria)
                for batch in file.iter_batches(rows, columns=list(dict.fromkeys(names.values()))):
                    have = {
                        field.name: batch.column(names[field.name]).cast(field.type, safe=False)
                        if field.name in names
                        else pa.nulls(len(batch), field.type)
                        for field in SCHEMA
                    }
                    yield pa.table(have, schema=SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}. Download it again.") from error


def _ranks(urls: list[str], seed: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A number from 0 to 2**64 - 1 for each URL, uniformly distributed; it depends on the seed."""
    key = f"vlv select {seed}".encode()
    hashed = (hashlib.blake2b(url.encode("utf-8", "replace"), digest_size=8, key=key).digest() for url in urls)
    return np.frombuffer(b"".join(hashed), ">u8").astype(np.uint64)


def _write(spool: Path, pieces: int, lists: list["_List"], bounds: list[int], dropped: Counter[str]) -> int:
    """Write the lists, the smallest subset first, each up to its bound; returns how many rows passed."""
    passed = 0
    with meter("Writing URL lists", pieces) as progress:
        for i in range(pieces):
            table, repeated = _sorted_once(spool / f"{i}.arrow")
            dropped["duplicate_url"] += repeated
            start = 0
            for one, bound in zip(lists, bounds, strict=True):
                end = min(max(bound - passed, start), len(table))
                one.add(table.slice(start, end - start))
                start = max(start, end)
            passed += len(table)
            (spool / f"{i}.arrow").unlink()
            progress.advance()
    for one in lists:
        one.close()
    dropped["not_drawn"] += passed - sum(one.rows for one in lists)
    return passed


def _sorted_once(path: Path) -> tuple[pa.Table, int]:
    """The rows of a piece in the order of rank and URL, each URL once, and how many rows were repeated."""
    with pa.OSFile(str(path), "rb") as stream:
        table = pa.ipc.open_stream(stream).read_all()
    order = pa.compute.sort_indices(table.select(["rank", "URL"]), [("rank", "ascending"), ("URL", "ascending")])
    table = table.take(order)  # the sort is stable: of equal URLs the one that was read first comes first
    ranks, urls = table["rank"].to_numpy(), table["URL"]
    keep = np.ones(len(table), bool)
    for i in np.flatnonzero(ranks[1:] == ranks[:-1]) + 1:
        keep[i] = urls[int(i)] != urls[int(i) - 1]
    return table.filter(pa.array(keep)).drop_columns(["rank"]), int((~keep).sum())


class _List:
    """The URL lists of one subset, `size` rows to a file."""

    def __init__(self, folder: Path, name: str, size: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._name, self._size, self.rows = folder, name, size, 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        while len(table):
            room = self._size - self.rows % self._size
            part, table = table.slice(0, room), table.slice(room)
            if self._writer is None:
                path = self._folder / f"part-{self.rows // self._size:05d}.parquet"
                self._writer = pq.ParquetWriter(path, _LISTED, compression="zstd")
            self._writer.write_table(part.append_column("subset", pa.array([self._name] * len(part), pa.string())))
            self.rows += len(part)
            if self.rows % self._size == 0:
                self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


ENVIRONMENT = "img2dataset-env"
_COLUMNS = ["similarity", "hash", "punsafe", "pwatermark", "aesthetic", "subset"]


def install_command() -> str:
    """The command that makes img2dataset's environment."""
    return f"python3 -m venv {ENVIRONMENT} && {ENVIRONMENT}/bin/pip install img2dataset"


def download_commands(urls: Path, images: Path, selection: Selection, side: int) -> list[str]:
    """The command that downloads each subset. Images keep their ratio; the shorter side has at most `side` pixels.

    The output is what the import needs: tars with parquet files (`webdataset`) that list failed rows and keep the
    columns. "noai" headers of sites are obeyed, as is img2dataset's default. After a kill the same command continues.
    """
    lines = []
    for subset in selection.subsets:
        if not subset.new:
            continue
        options = {
            "url_list": urls / subset.name,
            "input_format": "parquet",
            "url_col": "URL",
            "caption_col": "TEXT",
            "save_additional_columns": json.dumps(_COLUMNS, separators=(",", ":")),
            "output_folder": images / subset.name,
            "output_format": "webdataset",
            "number_sample_per_shard": 10_000,
            "image_size": side,
            "resize_mode": "keep_ratio",
            "resize_only_if_bigger": True,
            "encode_quality": 95,
            "retries": 1,
            "processes_count": 16,
            "thread_count": 64,
        }
        words = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items()]
        lines.append(" \\\n  ".join([f"{ENVIRONMENT}/bin/img2dataset", *words]))
    return lines

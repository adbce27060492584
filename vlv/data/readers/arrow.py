"""What `datasets`' `save_to_disk` writes: folders of arrow files, each with a state.json that lists them."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from vlv.data.readers.columns import ColumnsReader
from vlv.data.shards import DataError
from vlv.io import files

STATE = "state.json"
_ROWS = 16  # decoded from a batch at a time


class ArrowReader(ColumnsReader):
    """All saved sets below `root` (a DatasetDict has one for each split), or one arrow file; a part is a file.

    Files are mapped into memory, not read. The package `datasets` is not needed.
    """

    format = "arrow"

    def _find(self, root: Path) -> list[Path]:
        """Those that a state.json lists (a `map` may have left others beside them), else all."""
        states = sorted(root.rglob(STATE))
        if not states:
            return [path for path in root.rglob("*.arrow") if path.is_file()]
        return [path for state in states for path in _listed(state)]

    def _measure(self, path: Path) -> tuple[pa.Schema, int, int]:
        with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as reader:
            rows = 0
            try:
                for batch in reader:
                    rows += batch.num_rows
            except (pa.ArrowException, OSError):
                pass  # `read` names the damage, after the rows before it
            return reader.schema, 1, rows

    def _batches(self, path: Path, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as reader:
            for batch in reader:
                chosen = batch.select(columns)
                for begin in range(0, batch.num_rows, _ROWS):
                    yield chosen.slice(begin, _ROWS)


def _listed(state: Path) -> list[Path]:
    try:
        names = [str(one["filename"]) for one in files.read_json(state, "Correct it.")["_data_files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{state} is not what save_to_disk writes ({error}); name one arrow file") from error
    found = [state.parent / Path(name).name for name in names]
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing} is missing, but {state} lists it")
    return found

"""`vlv data select`: the paper's bounds with counts, nested subsets, and memory that does not grow."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from vlv.data.laion import subsets
from vlv.data.laion.criteria import Criteria
from vlv.data.shards import DataError

PAPER = Criteria()


def metadata(count: int, seed: int = 0) -> pd.DataFrame:
    """Rows as in laion2B-en-aesthetic's tables, about a third of which pass."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "URL": [f"https://site{i % 97}.example.org/{seed}/{i}.jpg" for i in range(count)],
        "TEXT": [f"picture {i}" for i in range(count)],
        "WIDTH": rng.integers(300, 1500, count).astype(float),
        "HEIGHT": rng.integers(300, 1500, count).astype(float),
        "similarity": rng.random(count),
        "hash": rng.integers(-(2**62), 2**62, count),
        "punsafe": rng.random(count).astype(np.float32),
        "pwatermark": rng.random(count).astype(np.float32),
        "aesthetic": rng.random(count).astype(np.float32) + 7,
    })  # fmt: skip


def write(folder: Path, *tables: pd.DataFrame) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"part-{i}.parquet" for i in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        table.to_parquet(path, index=False)
    return paths


def listed(output: Path, *names: str) -> pd.DataFrame:
    return pd.concat(pd.read_parquet(path) for name in names for path in sorted((output / name).glob("*.parquet")))


def test_the_papers_bounds_are_exact(tmp_path: Path) -> None:
    cases = [  # width, height, watermark, the reason
        (513, 513, 0.49, None), (512, 2000, 0.1, "too_small"), (1026, 513, 0.0, None), (1027, 513, 0.0, "aspect"),
        (513, 1026, 0.0, None), (513, 1027, 0.0, "aspect"), (600, 600, 0.5, "watermark"),
        (600, 600, np.nan, "watermark_unknown"), (np.nan, 600, 0.1, "size_unknown"), (0, 600, 0.1, "size_unknown"),
    ]  # fmt: skip
    table = metadata(len(cases) + 2)
    for column, place in (("WIDTH", 0), ("HEIGHT", 1), ("pwatermark", 2)):
        table[column] = [float(case[place]) for case in cases] + [600.0 if place < 2 else 0.1] * 2
    table.loc[len(cases), "URL"] = None
    table.loc[len(cases) + 1, "URL"] = "ftp://example.org/x.jpg"
    found = subsets.select(write(tmp_path / "meta", table), tmp_path / "urls", {"ALL": 100}, 0, PAPER)
    expected = [case[3] for case in cases if case[3] is not None] + ["no_url", "no_url"]
    assert {reason: n for reason, n in found.dropped.items() if n} == {r: expected.count(r) for r in set(expected)}
    rows = listed(tmp_path / "urls", "ALL")
    assert sorted(zip(rows["WIDTH"], rows["HEIGHT"], strict=True)) == [(513, 513), (513, 1026), (1026, 513)]
    stricter = subsets.select([tmp_path / "meta"], tmp_path / "urls", {"ALL": 100}, 0, Criteria(unsafe_below=0.0))
    assert stricter.dropped["unsafe"] == 3 and stricter.passed == 0


def test_subsets_are_nested_counted_and_a_function_of_the_seed(tmp_path: Path) -> None:
    small = subsets.Sizes(batch=1000, piece=500, file=300)  # several pieces, several files
    one, two = metadata(4000), metadata(3000, seed=1)
    two = pd.concat([two, one.iloc[:500], one.iloc[:500].assign(TEXT="said again")])
    paths = write(tmp_path / "meta", one, two)
    counts = {"S": 200, "L": 1500, "M": 700}
    found = subsets.select(paths, tmp_path / "urls", counts, 5, PAPER, small)
    assert found.read == 8000 == sum(found.dropped.values()) + 1500
    assert [(s.name, s.rows, s.new) for s in found.subsets] == [("S", 200, 200), ("M", 700, 500), ("L", 1500, 800)]
    rows = listed(tmp_path / "urls", "S", "M", "L")
    assert len(set(rows["URL"])) == 1500 and "said again" not in set(rows["TEXT"])
    assert list(rows["subset"]) == ["S"] * 200 + ["M"] * 500 + ["L"] * 800
    assert found.dropped["duplicate_url"] > 200
    passing = one[(one[["WIDTH", "HEIGHT"]].min(axis=1) > 512) & (one["pwatermark"] < 0.5)]
    share = rows["URL"].isin(passing["URL"]).mean()
    assert share == pytest.approx(4 / 7, abs=0.06)  # drawn evenly from both tables

    again = subsets.select(paths[::-1], tmp_path / "other", {"T": 700}, 5, PAPER, small)  # another order, one subset
    assert set(listed(tmp_path / "other", "T")["URL"]) == set(listed(tmp_path / "urls", "S", "M")["URL"])
    assert again.dropped["duplicate_url"] == found.dropped["duplicate_url"]
    subsets.select(paths, tmp_path / "other", {"T": 700}, 6, PAPER)
    assert set(listed(tmp_path / "other", "T")["URL"]) != set(listed(tmp_path / "urls", "S", "M")["URL"])
    report = json.loads((tmp_path / "urls" / subsets.REPORT).read_text())
    assert report["dropped"] == found.dropped and report["criteria"]["side_above"] == 512 and report["seed"] == 5


def test_bad_tables_are_named_and_nothing_is_replaced(tmp_path: Path) -> None:
    lacking = write(tmp_path / "lacking", metadata(5).drop(columns=["pwatermark"]))
    with pytest.raises(DataError, match=r"part-0\.parquet lacks the column pwatermark; it has: URL, TEXT"):
        subsets.select(lacking, tmp_path / "urls", {"A": 1}, 0, PAPER)
    (tmp_path / "cut.parquet").write_bytes(lacking[0].read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read"):
        subsets.select([tmp_path / "cut.parquet"], tmp_path / "urls", {"A": 1}, 0, PAPER)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("kept")
    with pytest.raises(DataError, match="not an earlier selection"):
        subsets.select(write(tmp_path / "meta", metadata(9)), tmp_path / "mine", {"A": 1}, 0, PAPER)
    assert (tmp_path / "mine" / "precious.txt").read_text() == "kept"
    assert not (tmp_path / "urls").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_names_of_the_columns(tmp_path: Path) -> None:
    table = metadata(50).rename(columns={"aesthetic": "AESTHETIC_SCORE", "URL": "url", "TEXT": "caption"})
    subsets.select(write(tmp_path / "meta", table), tmp_path / "urls", {"ALL": 50}, 0, PAPER)
    rows = listed(tmp_path / "urls", "ALL")
    assert len(rows) and rows["aesthetic"].between(7, 8).all() and rows["TEXT"].str.startswith("picture").all()


def test_the_printed_commands_name_what_was_written(tmp_path: Path) -> None:
    paths = write(tmp_path / "meta", metadata(3000))
    command = [sys.executable, "-m", "vlv", "data", "select", str(paths[0]), "-o", str(tmp_path / "urls")]
    command += ["--count", "0.3K,100", "--images", str(tmp_path / "my images")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "100: 100 URLs, 100 of them" in done.stdout and "0.3K: 300 URLs, 200 of them" in done.stdout
    assert "too_small" in done.stdout
    lines = done.stdout.replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in lines if line.startswith(f"{subsets.ENVIRONMENT}/bin/img2dataset")]
    assert len(calls) == 2
    for call, name in zip(calls, ("100", "0.3K"), strict=True):
        options = dict(word.removeprefix("--").split("=", 1) for word in call[1:])
        table = pq.read_schema(next(Path(options["url_list"]).glob("*.parquet")))
        kept = json.loads(options["save_additional_columns"])
        assert {options["url_col"], options["caption_col"], *kept} <= set(table.names)
        assert options["output_folder"] == str(tmp_path / "my images" / name)
        assert options["resize_mode"] == "keep_ratio" and int(options["image_size"]) >= 64


CHILD = """
import sys
from pathlib import Path
from vlv.data.laion.criteria import Criteria
from vlv.data.laion import subsets
sizes = subsets.Sizes(batch=1 << 14, piece=30_000)  # so that the smaller table takes many of both, too
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
subsets.select([Path(sys.argv[1])], Path(sys.argv[2]), {"A": 20_000}, 0, Criteria(), sizes)
print(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_tables(tmp_path: Path) -> None:
    peaks = []
    batch = pa.Table.from_pandas(metadata(150_000), preserve_index=False)
    for times in (1, 5):
        path = tmp_path / f"{times}.parquet"
        with pq.ParquetWriter(path, batch.schema) as writer:
            for i in range(times):
                urls = pa.array([f"{url}?{i}" for url in batch["URL"].to_pylist()], batch.schema.field("URL").type)
                writer.write_table(batch.set_column(0, "URL", urls), row_group_size=50_000)
        command = [sys.executable, "-c", CHILD, str(path), str(tmp_path / f"urls{times}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 30, f"peak memory {peaks} MB; the rows of the larger table are {4 * 20} MB more"

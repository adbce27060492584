"""Small sets of images in every form that `vlv data import` reads, all with the same pictures and captions."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TABLE = ("key", "url", "caption", "status", "error_message")


def photo(number: int, size: tuple[int, int] = (96, 80)) -> bytes:
    """A JPEG of coarse noise, another for each number; `size`: width and height."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"Photograph {number} of coarse noise."


def folder(root: Path, count: int) -> Path:
    """Captions in the three kinds of files in turn."""
    for i in range(count):
        path = root / f"group{i % 3}" / f"photo{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(i))
        beside = path.with_suffix((".txt", ".caption", ".json")[i % 3])
        beside.write_text(json.dumps({"caption": caption(i), "score": i}) if i % 3 == 2 else caption(i) + "\n")
    return root


def img2dataset_tars(root: Path, count: int) -> Path:
    """Two tars with their tables, and in each a download that failed."""
    root.mkdir()
    half = (count + 1) // 2
    for shard in range(2):
        rows = []
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * half, min((shard + 1) * half, count)):
                key = f"{shard:05d}{i - shard * half:04d}"
                rows.append((key, f"https://example.org/{i}.jpg", caption(i), "success", None))
                for name, data in members(i).items():
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        rows.append((f"{shard:05d}9999", f"https://example.org/gone{shard}.jpg", "Gone.", "failed_to_download", "404"))
        table = pa.table(dict(zip(TABLE, zip(*rows, strict=True), strict=True)))
        pq.write_table(table, root / f"{shard:05d}.parquet")
        (root / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(rows), "successes": len(rows) - 1}))
    return root


def members(number: int) -> dict[str, bytes]:
    """A sample as img2dataset writes it."""
    about = {
        "url": f"https://example.org/{number}.jpg", "caption": caption(number), "status": "success", "similarity": 0.3,
        "exif": json.dumps({"GPS": "where it was taken"}), "original_width": 4000, "pwatermark": None,
    }  # fmt: skip
    return {"jpg": photo(number), "txt": caption(number).encode(), "json": json.dumps(about).encode()}


def img2dataset_files(root: Path, count: int) -> Path:
    """One subfolder with its table, and a download that failed."""
    (root / "00000").mkdir(parents=True)
    rows = [("000009999", "https://example.org/gone.jpg", "Gone.", "failed_to_download", "404")]
    for i in range(count):
        rows.append((f"{i:09d}", f"https://example.org/{i}.jpg", caption(i), "success", None))
        for name, data in members(i).items():
            (root / "00000" / f"{i:09d}.{name}").write_bytes(data)
    pq.write_table(pa.table(dict(zip(TABLE, zip(*rows, strict=True), strict=True))), root / "00000.parquet")
    return root


def parquet(root: Path, count: int, rows_in_group: int = 5) -> Path:
    """Two files in Hugging Face's form: a struct of bytes and path, and a caption."""
    root.mkdir()
    for part, numbers in enumerate((range(count // 2), range(count // 2, count))):
        rows = [{"image": {"bytes": photo(i), "path": f"{i}.jpg"}, "caption": caption(i), "id": i} for i in numbers]
        pq.write_table(pa.Table.from_pylist(rows), root / f"part-{part}.parquet", row_group_size=rows_in_group)
    return root


def coco(root: Path, count: int) -> Path:
    """An annotations file with three captions for each image; the first is that of the other sets."""
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    images, notes = [], []
    for i in range(count):
        (root / "train2017" / f"{i:012d}.jpg").write_bytes(photo(i))
        images.append({"id": 1000 + i, "file_name": f"{i:012d}.jpg", "width": 96, "height": 80})
        texts = [caption(i), f"Second of {i}.", f"Third, the longest of all, of picture {i} of the set."]
        # in no order, as in COCO: the ids tell which is the first
        notes += [{"id": 10 * i + k, "image_id": 1000 + i, "caption": texts[k]} for k in (2, 0, 1)]
    value = {"info": {}, "images": images, "annotations": notes}
    path = root / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps(value))
    return path


MAKERS: dict[str, Callable[[Path, int], Path]] = {
    "folder": folder,
    "img2dataset": img2dataset_tars,
    "img2dataset-files": img2dataset_files,
    "parquet": parquet,
    "coco": coco,
}

"""Small sets of images in every format that `vlv data import` reads; all have the same pictures and captions."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TABLE = ("key", "url", "caption", "status", "error_message")


def photo(number: int, size: tuple[int, int] = (96, 80)) -> bytes:
    """A JPEG of coarse noise, a different one for each number; `size`: width and height."""
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


def coco_folder(root: Path, count: int) -> Path:
    """COCO as it is unpacked: two captions files with their images, and an annotations file of another kind."""
    coco(root, count)
    annotations = root / "annotations"
    whole = json.loads((annotations / "captions_train2017.json").read_text())
    (root / "val2017").mkdir()
    for name, keep in (("train2017", range(count // 2)), ("val2017", range(count // 2, count))):
        images = [image for image in whole["images"] if image["id"] - 1000 in keep]
        notes = [note for note in whole["annotations"] if note["image_id"] - 1000 in keep]
        (annotations / f"captions_{name}.json").write_text(json.dumps({"images": images, "annotations": notes}))
        for image in images:
            (root / "train2017" / image["file_name"]).rename(root / name / image["file_name"])
    (annotations / "instances_val2017.json").write_text('{"images": [], "annotations": [{"bbox": [0, 0, 1, 1]}]}')
    return root


def pictures(folder: Path, numbers: Iterable[int]) -> list[tuple[str, str]]:
    """Images without captions beside them; returns their names and the captions to list."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(f"photo{i:04d}.jpg", caption(i)) for i in numbers]
    for i, (name, _) in zip(numbers, rows, strict=True):
        (folder / name).write_bytes(photo(i))
    return rows


def imagefolder(root: Path, count: int) -> Path:
    """Hugging Face's: a folder for each split, each with another kind of metadata file."""
    third = count // 3
    rows = pictures(root / "train", range(third))
    with (root / "train" / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file_name", "text", "score"), *((*row, 0.5) for row in rows)])
    rows = pictures(root / "validation" / "deep", range(third, 2 * third))
    lines = [json.dumps({"file_name": f"deep/{name}", "text": text}) for name, text in rows]
    (root / "validation" / "metadata.jsonl").write_text("\n".join(lines))
    rows = pictures(root / "test", range(2 * third, count))
    table = pa.table(dict(zip(("file_name", "text"), zip(*rows, strict=True), strict=True)))
    pq.write_table(table, root / "test" / "metadata.parquet")
    return root


def _conversation(name: str, text: str) -> dict[str, Any]:
    asked = {"from": "human", "value": "<image>\nDescribe the image."}
    return {"id": name.partition(".")[0], "image": name, "conversations": [asked, {"from": "gpt", "value": text}]}


def llava(root: Path, count: int) -> Path:
    """The folder of LLaVA's pretraining set: conversations, a list of another kind, images in subfolders."""
    rows = pictures(root / "00000", range(count))
    value = [_conversation(f"00000/{name}", text) for name, text in rows]
    (root / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(value, indent=2))
    meta = [{"id": name, "image": f"00000/{name}", "blip_caption": text, "url": ""} for name, text in rows]
    (root / "blip_laion_cc_sbu_558k_meta.json").write_text(json.dumps(meta))
    return root


def llava_file(root: Path, count: int) -> Path:
    """LLaVA's JSON with its images in a folder beside it."""
    value = [_conversation(*row) for row in pictures(root / "images", range(count))]
    (root / "detail_23k.json").write_text(json.dumps(value))
    return root / "detail_23k.json"


def release(root: Path, count: int) -> Path:
    """What `vlv caption` and the release write: one object of image names and captions."""
    (root / "captions.json").write_text(json.dumps(dict(pictures(root / "images", range(count)))))
    return root / "captions.json"


def json_list(root: Path, count: int) -> Path:
    rows = pictures(root / "images", range(count))
    (root / "stage2.json").write_text(json.dumps([{"image": f"images/{name}", "caption": text} for name, text in rows]))
    return root / "stage2.json"


def json_lines(root: Path, count: int) -> Path:
    rows = pictures(root, range(count))
    lines = [json.dumps({"img_path": name, "caption": text, "n": 1}) + "\n" for name, text in rows]
    (root / "set.jsonl").write_text("".join(lines))
    return root / "set.jsonl"


def separated(root: Path, count: int) -> Path:
    """As a spreadsheet writes it in some countries: a byte-order mark, semicolons, quoted line ends; absolute paths."""
    rows = pictures(root, range(count))
    with (root / "set.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        lines = [(str(root.resolve() / name), text.replace(" of ", "\r\nof ")) for name, text in rows]
        csv.writer(stream, delimiter=";").writerows([("Filepath", "Caption"), *lines])
    return root / "set.csv"


def img2dataset_gz(root: Path, count: int) -> Path:
    """Tars that somebody compressed."""
    img2dataset_tars(root, count)
    for tar in sorted(root.glob("*.tar")):
        tar.with_name(f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes(), 1))
        tar.unlink()
    return root


def saved_to_disk(root: Path, count: int) -> Path:
    """The layout of `datasets`' DatasetDict.save_to_disk, with a file that a `map` left behind."""
    for split, numbers in (("train", range(count // 2)), ("test", range(count // 2, count))):
        (root / split).mkdir(parents=True)
        rows = [{"image": {"bytes": photo(i), "path": f"{i}.jpg"}, "caption": caption(i), "id": i} for i in numbers]
        table = pa.Table.from_pylist(rows)
        for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
            with pa.ipc.new_stream(str(root / split / name), table.schema) as writer:
                writer.write_table(table, max_chunksize=5)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": split}
        (root / split / "state.json").write_text(json.dumps(state))
        (root / split / "dataset_info.json").write_text("{}")
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return root


def parquet_of_paths(root: Path, count: int) -> Path:
    rows = pictures(root / "images", range(count))
    columns = {"image_path": [f"images/{name}" for name, _ in rows], "caption": [text for _, text in rows]}
    pq.write_table(pa.table(columns), root / "set.parquet")
    return root / "set.parquet"


# Name -> what makes it, and the format that it is.
MAKERS: dict[str, tuple[Callable[[Path, int], Path], str]] = {
    "folder": (folder, "folder"), "img2dataset": (img2dataset_tars, "img2dataset"),
    "img2dataset-files": (img2dataset_files, "img2dataset"), "img2dataset-gz": (img2dataset_gz, "img2dataset"),
    "parquet": (parquet, "parquet"), "parquet-of-paths": (parquet_of_paths, "parquet"),
    "arrow": (saved_to_disk, "arrow"),
    "coco": (coco, "coco"), "coco-folder": (coco_folder, "coco"), "imagefolder": (imagefolder, "imagefolder"),
    "llava": (llava, "llava"), "llava-file": (llava_file, "llava"), "release": (release, "table"),
    "json-list": (json_list, "table"), "json-lines": (json_lines, "table"), "separated": (separated, "table"),
}  # fmt: skip

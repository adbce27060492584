"""The command that downloads a selection. img2dataset pins old releases of what we use: it runs on its own."""

import json
import shlex
from pathlib import Path

from vlv.data.laion.subsets import Selection

ENVIRONMENT = "img2dataset-env"
_COLUMNS = ["similarity", "hash", "punsafe", "pwatermark", "aesthetic", "subset"]


def install() -> str:
    """Makes the environment."""
    return f"python3 -m venv {ENVIRONMENT} && {ENVIRONMENT}/bin/pip install img2dataset"


def commands(urls: Path, images: Path, selection: Selection, side: int) -> list[str]:
    """One command for each subset. Images keep their ratio, their shorter side is `side` pixels at most.

    What the import needs: tars with their parquet files (`webdataset`), failed rows in them, the columns. Sites'
    "noai" headers are obeyed, as is img2dataset's default. A killed download goes on where it was.
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

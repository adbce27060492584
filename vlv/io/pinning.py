"""data.dvc, the data's pin: written anew only where the data is meant to be other data.

A pin remembers under `meta: made_from:` which settings the data was made from. Data made from the same
settings must be the pinned data, to the byte; other settings make other data, which gets a pin of its own.
DVC runs as a program (`dvc add`); nothing of it is imported.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from vlv.config import Paths
from vlv.io import files

POINTER = "data.dvc"
REMEDY = "Restore it with: git checkout data.dvc, or pin the data with: dvc add data"


class PinError(RuntimeError):
    """The data could not be pinned; the message says what DVC said."""


def pinned_md5(pointer: Path) -> str:
    """The folder hash in a .dvc file, "....dir". Raises `FileError` naming the file if it holds none."""
    try:
        outs = files.read_yaml_mapping(pointer, REMEDY).get("outs")
    except files.FileError as error:
        raise files.FileError(f"{pointer.name} pins no data: {error}") from error
    first = outs[0] if isinstance(outs, list) and outs else None
    md5 = first.get("md5") if isinstance(first, dict) else None
    if not isinstance(md5, str):
        raise files.FileError(f"{pointer} pins no data: it has no outs with an md5. {REMEDY}")
    return md5


def made_from(paths: Paths) -> dict[str, Any] | None:
    """The settings that the pinned data was made from; None without a pin, or where it does not say."""
    pointer = paths.root / POINTER
    if not pointer.exists():
        return None
    meta = files.read_yaml_mapping(pointer, REMEDY).get("meta")
    settings = meta.get("made_from") if isinstance(meta, dict) else None
    return settings if isinstance(settings, dict) else None


def wanted(paths: Paths, source: dict[str, Any]) -> bool:
    """Whether data made from `source` (the manifest's) needs a pin of its own."""
    if not (paths.root / ".dvc").is_dir():
        return False  # no DVC project: nothing to pin in
    if not (paths.root / POINTER).exists():
        return True
    before = made_from(paths)
    return before is not None and before != source


def is_kept(paths: Paths) -> bool:
    """Whether DVC's cache has the pinned data. Without it `dvc repro` calls data.dvc changed."""
    md5 = pinned_md5(paths.root / POINTER)
    return (paths.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]).exists()


def pin(paths: Paths, source: dict[str, Any]) -> None:
    """Make data.dvc pin data/ as it is now. Raises `PinError`."""
    _add(paths)
    pointer = paths.root / POINTER
    value = files.read_yaml_mapping(pointer, REMEDY)
    value["meta"] = {**(value.get("meta") or {}), "made_from": source}
    files.write_text(pointer, yaml.safe_dump(value, sort_keys=False))


def keep(paths: Paths) -> None:
    """Put data/, which has to be the pinned data, into DVC's cache. Raises `PinError`."""
    pointer = paths.root / POINTER
    text = files.read_text(pointer, REMEDY)
    _add(paths)
    files.write_text(pointer, text)  # dvc add writes the same in another order, which git would call a change


def _add(paths: Paths) -> None:
    command = [sys.executable, "-m", "dvc", "add", "--quiet", "data"]
    done = subprocess.run(command, cwd=paths.root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PinError(f"dvc add data failed: {done.stderr.strip() or done.stdout.strip()}")

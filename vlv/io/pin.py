"""Reads data.dvc, the data's pin, compares it with data/, and rewrites it when the data is meant to change.

`dvc repro` silently accepts changed data and rewrites data.dvc, so the comparison comes first and must not write. DVC's
hash of a folder is the md5 of a JSON list of its files (dvc_data.hashfile.tree.Tree.as_bytes); a test compares ours
with that of `dvc add`. DVC runs as a program and is not imported.

A pin records, under `meta: made_from:`, the settings that the data was made from. The same settings must give the
pinned data byte for byte; other settings give other data, which gets a new pin.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlv.config import Paths
from vlv.io import files

POINTER = "data.dvc"
REMEDY = "Restore it with: git checkout data.dvc, or pin the data with: dvc add data"


class PinError(RuntimeError):
    """The data could not be pinned; the message contains DVC's error."""


@dataclass(frozen=True)
class Hashes:
    """Hex digests of one file."""

    sha256: str
    md5: str


def hash_file(path: Path) -> Hashes:
    """Compute both digests in one pass."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            md5.update(chunk)
    return Hashes(sha256.hexdigest(), md5.hexdigest())


def folder_md5(md5s: dict[str, str]) -> str:
    """DVC's hash of a folder; `md5s` maps relative posix paths to the files' md5."""
    listing = [{"md5": md5s[name], "relpath": name} for name in sorted(md5s)]
    digest = hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False)
    return digest.hexdigest() + ".dir"


def pinned_md5(pointer: Path) -> str:
    """The folder hash in a .dvc file, "....dir".

    Raises:
        FileError: the file is missing, damaged, or holds no hash.
    """
    try:
        outs = files.read_yaml_mapping(pointer, REMEDY).get("outs")
    except files.FileError as error:
        raise files.FileError(f"{pointer.name} pins no data: {error}") from error
    first = outs[0] if isinstance(outs, list) and outs else None
    md5 = first.get("md5") if isinstance(first, dict) else None
    if not isinstance(md5, str):
        raise files.FileError(f"{pointer} pins no data: it has no outs with an md5. {REMEDY}")
    return md5


def difference(pointer: Path, md5s: dict[str, str]) -> str | None:
    """None if the files are the pinned version, otherwise a text that says what differs.

    The pin holds one hash for all files. The text can name files only if DVC's cache has their list.
    """
    try:
        pinned = pinned_md5(pointer)
    except files.FileError as error:
        return str(error)
    found = folder_md5(md5s)
    if found == pinned:
        return None
    problem = f"its md5 is {found}, pinned is {pinned}"
    listing = _cached(pointer.parent, pinned)
    if listing.exists():
        before = {entry["relpath"]: entry["md5"] for entry in files.read_json(listing)}
        changed = sorted(name for name in {*before, *md5s} if before.get(name) != md5s.get(name))
        problem += f" (different: {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''})"
    return problem


def made_from(paths: Paths) -> dict[str, Any] | None:
    """The settings that the pinned data was made from; None if there is no pin or it does not record them."""
    pointer = paths.root / POINTER
    if not pointer.exists():
        return None
    meta = files.read_yaml_mapping(pointer, REMEDY).get("meta")
    settings = meta.get("made_from") if isinstance(meta, dict) else None
    return settings if isinstance(settings, dict) else None


def is_needed(paths: Paths, source: dict[str, Any]) -> bool:
    """Whether data made from `source` (the manifest's) needs a new pin."""
    if not (paths.root / ".dvc").is_dir():
        return False  # not a DVC project
    if not (paths.root / POINTER).exists():
        return True
    before = made_from(paths)
    return before is not None and before != source


def is_cached(paths: Paths) -> bool:
    """Whether DVC's cache has the pinned data. Without it `dvc repro` reports data.dvc as changed."""
    return _cached(paths.root, pinned_md5(paths.root / POINTER)).exists()


def add(paths: Paths, source: dict[str, Any]) -> None:
    """Make data.dvc pin data/ as it is now, made from `source`. Raises `PinError`."""
    _dvc_add(paths)
    pointer = paths.root / POINTER
    value = files.read_yaml_mapping(pointer, REMEDY)
    value["meta"] = {**(value.get("meta") or {}), "made_from": source}
    files.write_text(pointer, yaml.safe_dump(value, sort_keys=False))


def cache(paths: Paths) -> None:
    """Put data/, which must be the pinned data, into DVC's cache. Raises `PinError`."""
    pointer = paths.root / POINTER
    text = files.read_text(pointer, REMEDY)
    _dvc_add(paths)
    files.write_text(pointer, text)  # dvc add writes the same in another order, which git would report as a change


def _cached(root: Path, md5: str) -> Path:
    return root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]


def _dvc_add(paths: Paths) -> None:
    command = [sys.executable, "-m", "dvc", "add", "--quiet", "data"]
    done = subprocess.run(command, cwd=paths.root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PinError(f"dvc add data failed: {done.stderr.strip() or done.stdout.strip()}")

"""data.dvc, the data's pin: written anew only where the data is meant to be other data.

A pin remembers under `meta: made_from:` which settings the data was made from. Data made from the same
settings must be the pinned data, to the byte; other settings make other data, which gets a pin of its own.
DVC runs as a program (`dvc add`); nothing of it is imported.
"""

import subprocess
import sys
from typing import Any

import yaml

from vlv import files
from vlv.config import Paths

POINTER = "data.dvc"


class PinError(RuntimeError):
    """The data could not be pinned; the message says what DVC said."""


def made_from(paths: Paths) -> dict[str, Any] | None:
    """The settings that the pinned data was made from; None without a pin, or where it does not say."""
    pointer = paths.root / POINTER
    if not pointer.exists():
        return None
    value = yaml.safe_load(pointer.read_text(encoding="utf-8"))
    settings = (value.get("meta") or {}).get("made_from") if isinstance(value, dict) else None
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
    value = yaml.safe_load((paths.root / POINTER).read_text(encoding="utf-8"))
    md5 = str(value["outs"][0]["md5"])
    return (paths.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]).exists()


def pin(paths: Paths, source: dict[str, Any]) -> None:
    """Make data.dvc pin data/ as it is now. Raises `PinError`."""
    _add(paths)
    pointer = paths.root / POINTER
    value = yaml.safe_load(pointer.read_text(encoding="utf-8"))
    value["meta"] = {**(value.get("meta") or {}), "made_from": source}
    files.write_text(pointer, yaml.safe_dump(value, sort_keys=False))


def keep(paths: Paths) -> None:
    """Put data/, which has to be the pinned data, into DVC's cache. Raises `PinError`."""
    pointer = paths.root / POINTER
    text = pointer.read_text(encoding="utf-8")
    _add(paths)
    files.write_text(pointer, text)  # dvc add writes the same in another order, which git would call a change


def _add(paths: Paths) -> None:
    command = [sys.executable, "-m", "dvc", "add", "--quiet", "data"]
    done = subprocess.run(command, cwd=paths.root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PinError(f"dvc add data failed: {done.stderr.strip() or done.stdout.strip()}")

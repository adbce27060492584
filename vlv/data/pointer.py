"""data.dvc read without DVC: whether a folder is the version that it pins.

`dvc repro` takes changed data silently and rewrites data.dvc, so the check comes first and must not write.
DVC's hash of a folder is the md5 of a JSON list of its files (dvc_data.hashfile.tree.Tree.as_bytes); a test
holds ours against `dvc add`.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from vlv.io import files, pinning


@dataclass(frozen=True)
class Hashes:
    """Hex digests of one file."""

    sha256: str
    md5: str


def hash_file(path: Path) -> Hashes:
    """Both digests in one reading."""
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


def compare(pointer: Path, md5s: dict[str, str]) -> str | None:
    """None if the files are the pinned version, else what differs.

    The pointer holds one hash for all. Which file differs is known only if DVC's cache has the listing.
    """
    try:
        pinned = pinning.pinned_md5(pointer)
    except files.FileError as error:
        return str(error)
    found = folder_md5(md5s)
    if found == pinned:
        return None
    problem = f"its md5 is {found}, pinned is {pinned}"
    listing = pointer.parent / ".dvc" / "cache" / "files" / "md5" / pinned[:2] / pinned[2:]
    if listing.exists():
        before = {entry["relpath"]: entry["md5"] for entry in files.read_json(listing)}
        changed = sorted(name for name in {*before, *md5s} if before.get(name) != md5s.get(name))
        problem += f" (different: {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''})"
    return problem

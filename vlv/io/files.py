"""Files on disk: atomic writes, checked reads, hashes and folder locks.

The pipeline writes all its files through this module, so that a kill or a full disk leaves either the old file
or the new one, never half of one. It also reads every text, JSON and YAML file here, so that a damaged or hostile
file gives a one-line error that names it.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import yaml

log = logging.getLogger(__name__)

_REMEDY = "Restore it, or remove it and run the command again."
# This project's YAML files have a few kilobytes; the parser needs a minute for some tens of megabytes.
_LARGEST_YAML = 1 << 20


class FileError(ValueError):
    """A file is missing, damaged or of the wrong kind; the message names it and the remedy."""


class LockHeldError(RuntimeError):
    """Another process uses the same folder."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed onto `path`.

    On any error the temporary file is removed and `path` stays unchanged. `OSError` (a full disk, no
    permission) is passed on: it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes 0600, but others should be able to read results
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed onto `path` (replacing an old one).

    The swap takes two renames: for a moment a reader may find no folder, but never a half-written one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(old / "was")
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. NaN is refused (`ValueError`): it is not JSON."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text that can be encoded as UTF-8. NaN is refused (`ValueError`)."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # A lone surrogate, which Python uses in a file name that is not UTF-8. JSON can hold it escaped.
        return json.dumps(value, indent=indent, allow_nan=False)
    return text


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_text(path: Path, remedy: str = _REMEDY) -> str:
    """Read UTF-8 text.

    Raises:
        FileError: the file does not exist, cannot be read, or is not text; the message ends with `remedy`.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error}). {remedy}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). {remedy}") from error


def read_json(path: Path, remedy: str = _REMEDY) -> Any:
    """Read a JSON file. Raises `FileError`, as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, remedy), str(path), remedy)


def read_json_object(path: Path, remedy: str = _REMEDY) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises `FileError` for anything else."""
    return expect_mapping(read_json(path, remedy), str(path), "JSON object", remedy)


def read_yaml(path: Path, remedy: str = _REMEDY) -> Any:
    """Read a YAML file. Raises `FileError`, as `read_text` and `parse_yaml` do."""
    return parse_yaml(read_text(path, remedy), str(path), remedy)


def read_yaml_mapping(path: Path, remedy: str = _REMEDY) -> dict[str, Any]:
    """Read a YAML file that holds keys and values. Raises `FileError` for anything else."""
    return expect_mapping(read_yaml(path, remedy), str(path), "YAML mapping", remedy)


def parse_json(text: str | bytes, name: str, remedy: str = _REMEDY) -> Any:
    """Parse JSON from text, or from UTF-8 bytes; `name` is its name in error messages.

    Raises:
        FileError: not JSON, nested too deeply, or a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise FileError(f"{name} is nested too deeply to be read as JSON. {remedy}") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and Python's limit of digits
        raise FileError(f"{name} is not valid JSON ({error}). {remedy}") from error


def parse_yaml(text: str, name: str, remedy: str = _REMEDY) -> Any:
    """Parse YAML from text; `name` is its name in error messages.

    Raises:
        FileError: not YAML, a duplicate key (PyYAML silently takes the last one), nested too deeply, or more than
            1 MiB.
    """
    if len(text) > _LARGEST_YAML:
        raise FileError(f"{name} has {len(text)} characters; at most {_LARGEST_YAML} are read as YAML. {remedy}")
    try:
        loader = _YamlLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError as error:
        raise FileError(f"{name} is nested too deeply to be read as YAML. {remedy}") from error
    # Besides YAMLError: text that looks like a date or a number but is neither.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise FileError(f"{name} is not valid YAML ({' '.join(str(error).split())}). {remedy}") from error


class _YamlLoader(yaml.SafeLoader):
    """The safe loader, but a duplicate key is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return node


def expect_mapping(value: Any, name: str, what: str, remedy: str) -> dict[str, Any]:
    """Return the value if it is a mapping whose keys are strings. Raises `FileError` otherwise."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FileError(f"{name} holds no {what}, but a {type(value).__name__}. {remedy}")
    return value


def set_aside(path: Path, error: Exception | str, instead: str) -> None:
    """Rename a damaged file to NAME.damaged and warn; `error`: what is wrong; `instead`: what happens without it."""
    target = path.with_name(path.name + ".damaged")
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    path.replace(target)
    log.warning("%s It is kept as %s; %s", str(error).removesuffix(_REMEDY).rstrip(), target.name, instead)


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: Path, without: str = "") -> str:
    """Hex SHA-256 of the relative names and contents of all files below `path`, except dot files and `without`."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.is_file() and not hidden and file.name != without:
            digest.update(f"{relative.as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


@contextmanager
def folder_lock(folder: Path, purpose: str) -> Iterator[None]:
    """Lock `folder` for this process.

    The kernel frees the lock when the holder dies, so a kill leaves nothing to clean up.

    Raises:
        LockHeldError: another process holds it; the message names that process and what it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".lock.holder"
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        try:
            who = read_text(holder).strip()
        except FileError:  # removed just now
            who = "another process"
        raise LockHeldError(
            f"{folder} is in use by {who}. Wait for it to end, or stop it (kill -TERM lets it save first)."
        ) from error
    try:
        write_text(holder, f"process {os.getpid()} ({purpose})\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()

"""Where data/ comes from: drawn by a module of its own, such as emoji scenes, or imported (vlv.data.import_).

Both write the same shards. Equal input gives equal bytes, so data.dvc can pin a folder that is stored nowhere and
is made again on each machine.
"""

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlv import config
from vlv.data import shards, writer
from vlv.data.shards import DataError, Manifest
from vlv.data.writer import Progress, Record
from vlv.io import files

logger = logging.getLogger(__name__)

# The settings of data whose manifest does not name them. They are not written, so older data keeps its bytes.
_DEFAULTS = {"resize": "bicubic"}


@dataclass(frozen=True)
class Drawn:
    """What a source draws: the records of each split, and what the manifest says about them besides the settings."""

    splits: Mapping[str, Iterable[Record]]
    about: dict[str, Any]


def materialise(wanted: config.Data, paths: config.Paths, data: Path, progress: Progress | None = None) -> Manifest:
    """Make `data` as the configuration says, unless it is there already and intact. It is put in place as a whole.

    Imported images cannot be made, so they are only verified.

    Raises:
        DataError: imported images that are missing, damaged, or were cut to another size.
        AssetError: the pictures that a source draws with cannot be fetched.
    """
    settings = describe(wanted)
    if wanted.source.module is None:
        return _imported(data, settings)
    try:
        manifest = shards.read_manifest(data)
        if _difference(manifest, settings) is None:
            shards.verify(data, None)
            return manifest
        logger.info("%s was made with other settings: making it again", data)
    except DataError as error:
        if data.exists():
            logger.info("Making %s again: %s", data, error)
    drawn: Drawn = _module(wanted).draw(wanted, paths, progress)
    with files.atomic_folder(data) as folder:
        splits = {
            split: writer.write_split(folder / split, records, wanted.shard_size)
            for split, records in drawn.splits.items()
        }
        manifest = Manifest(source=settings | drawn.about, splits=splits)
        writer.write_manifest(folder, manifest)
    return manifest


def describe(wanted: config.Data) -> dict[str, Any]:
    """What decides the bytes of the data."""
    sizes: dict[str, Any] = {"image_size": wanted.image_size, "shard_size": wanted.shard_size}
    if wanted.resize != _DEFAULTS["resize"]:
        sizes["resize"] = wanted.resize
    if wanted.source.module is None:
        return {"kind": "imported"} | sizes
    return wanted.source.model_dump() | sizes | {"version": _module(wanted).VERSION}


def _module(wanted: config.Data) -> Any:
    """The module that the section of the source names, imported when it is needed.

    It has `VERSION` (an int; another version makes the data again) and `draw(wanted, paths, progress) -> Drawn`. No
    stage runs this code, so it is not a root of a stage's inputs: the stages depend on the bytes of data/.
    """
    assert wanted.source.module is not None
    return importlib.import_module(wanted.source.module)


def _difference(manifest: Manifest, settings: dict[str, Any]) -> str | None:
    """The first setting in which the data that is there differs from what is wanted."""
    made, wanted = {**_DEFAULTS, **manifest.source}, {**_DEFAULTS, **settings}
    return next((key for key, value in wanted.items() if made.get(key) != value), None)


def _imported(data: Path, settings: dict[str, Any]) -> Manifest:
    manifest = shards.read_manifest(data)
    if (key := _difference(manifest, settings)) is not None:
        found, value = ({**_DEFAULTS, **about}.get(key) for about in (manifest.source, settings))
        raise DataError(
            f"{data} has {key} {found!r}, but params.yaml says {value!r}. "
            "Import the images again: vlv data import FOLDER"
        )
    shards.verify(data, None)
    return manifest

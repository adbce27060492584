"""Where data/ comes from: emoji scenes drawn on the spot, or own images (vlv.data.import_).

Both write the same shards. Equal input gives equal bytes, so that data.dvc can pin a folder that is nowhere
stored and made again on each machine.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vlv import config
from vlv.data import shards, writer
from vlv.data.shards import DataError, Manifest
from vlv.data.writer import Progress, Record
from vlv.io import assets, files, images
from vlv.tiny import scenes

logger = logging.getLogger(__name__)

# Raise it when vlv.tiny.scenes draws or writes differently: data made before is then made again.
_SCENES_VERSION = 1
# What a manifest that does not say so was made with; not written, so that data made before keeps its bytes.
_BEFORE = {"resize": "bicubic"}


def materialise(wanted: config.Data, paths: config.Paths, data: Path, progress: Progress | None = None) -> Manifest:
    """Make `data` as the configuration says, unless it is there already and intact. Swapped in as a whole.

    Imported images cannot be made: they are only verified.

    Raises:
        DataError: imported images that are missing, damaged, or were cut to another size.
        AssetError: the sprites cannot be had.
    """
    source = describe(wanted)
    if isinstance(wanted.source, config.ImportedSource):
        return _imported(data, source)
    try:
        manifest = shards.read_manifest(data)
        if _other(manifest, source) is None:
            shards.verify(data, None)
            return manifest
        logger.info("%s was made with other settings: making it again", data)
    except DataError as error:
        if data.exists():
            logger.info("Making %s again: %s", data, error)
    return _draw_all(wanted, wanted.source, paths, data, progress)


def describe(wanted: config.Data) -> dict[str, Any]:
    """What decides the bytes of the data."""
    sizes: dict[str, Any] = {"image_size": wanted.image_size, "shard_size": wanted.shard_size}
    if wanted.resize != _BEFORE["resize"]:
        sizes["resize"] = wanted.resize
    if isinstance(wanted.source, config.ImportedSource):
        return {"kind": "imported"} | sizes
    return wanted.source.model_dump() | sizes | {"version": _SCENES_VERSION}


def _other(manifest: Manifest, source: dict[str, Any]) -> str | None:
    """The first thing in which the data that is there differs from what is wanted."""
    made, wanted = {**_BEFORE, **manifest.source}, {**_BEFORE, **source}
    return next((key for key, value in wanted.items() if made.get(key) != value), None)


def _imported(data: Path, source: dict[str, Any]) -> Manifest:
    manifest = shards.read_manifest(data)
    if (key := _other(manifest, source)) is not None:
        found, value = ({**_BEFORE, **about}.get(key) for about in (manifest.source, source))
        raise DataError(
            f"{data} has {key} {found!r}, but params.yaml says {value!r}. "
            "Import the images again: vlv data import FOLDER"
        )
    shards.verify(data, None)
    return manifest


def _draw_all(
    wanted: config.Data,
    source: config.ScenesSource,
    paths: config.Paths,
    data: Path,
    progress: Progress | None,
) -> Manifest:
    sprites = assets.resolve(source.sprites, paths)
    painter = scenes.Painter(sprites)
    with files.atomic_folder(data) as folder:
        splits = {}
        for index, split in enumerate(get_args(scenes.Split)):
            count: int = getattr(source, split)
            rng = np.random.default_rng([source.seed, index])
            records = _draw(split, count, rng, painter, wanted, progress)
            splits[split] = writer.write_split(folder / split, records, wanted.shard_size)
        about = describe(wanted) | {"sprites_sha256": assets.describe(source.sprites, sprites)["sha256"]}
        manifest = Manifest(source=about, splits=splits)
        writer.write_manifest(folder, manifest)
    return manifest


def _draw(
    split: scenes.Split,
    count: int,
    rng: np.random.Generator,
    painter: scenes.Painter,
    wanted: config.Data,
    progress: Progress | None,
) -> Iterator[Record]:
    """`count` scenes of different specifications; a smaller count gives the first ones of a larger."""
    drawn = scenes.specifications(split, rng, unique=True)
    for number in range(count):
        scene = next(drawn)
        pixels = images.resize_crop(painter.draw(scene, rng), wanted.image_size, wanted.resize)
        height, width = pixels.shape[:2]
        yield Record(
            url=f"scene:{split}/{number}",
            image=images.encode_png(pixels),
            caption=scenes.write_caption(scene, rng),
            width=width,
            height=height,
            original_width=scenes.SIZE,
            original_height=scenes.SIZE,
            mode="RGB",
            meta={"scene": scene.to_json(), "novel_pair": scenes.has_held_out_pair(scene)},
        )
        if progress is not None and ((number + 1) % 500 == 0 or number + 1 == count):
            progress(split, number + 1, count)

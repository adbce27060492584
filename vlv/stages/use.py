"""Using what was trained: caption a folder of images, reconstruct a folder of images."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlv import config, files, images, registry
from vlv.config import Paths
from vlv.evaluation.reconstruct import psnr
from vlv.models import device
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner
from vlv.progress import meter

log = logging.getLogger(__name__)

_TOGETHER = 16


class NoImagesError(ValueError):
    """A folder without images."""


@dataclass
class Report:
    """How many images were done (in this run and an earlier one), and why others were not: path -> reason."""

    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def model_folder(paths: Paths, model: str | None, stage: str) -> Path:
    """The folder of a model: a folder, models:/NAME@ALIAS, or (None) the champion, else what was last trained.

    Raises:
        RegistryError: no such version.
    """
    if model is not None and not model.startswith("models:/"):
        return Path(model)
    if model is not None:
        return registry.fetch(paths, model)
    settings = config.load(paths).register_
    name = settings.captioner_name if stage == "stage2" else settings.autoencoder_name
    try:
        return registry.fetch(paths, f"models:/{name}@{registry.CHAMPION}")
    except registry.RegistryError as error:
        log.info("no champion (%s); taking what was last trained", str(error).split(". ")[0])
        return paths.work / stage / "model"


def find_images(folder: Path) -> list[Path]:
    """Image files in `folder` and below, sorted; a single file stands for itself.

    Raises:
        NoImagesError: no such folder, or none in it.
    """
    if not folder.exists():
        raise NoImagesError(f"{folder} does not exist")
    found = (
        [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.suffix.lower() in images.SUFFIXES)
    )
    if not found:
        raise NoImagesError(f"{folder} holds no image ({', '.join(sorted(images.SUFFIXES))})")
    return found


def _readable(found: list[Path], unreadable: dict[str, str]) -> Iterator[tuple[Path, images.Pixels]]:
    for path in found:
        try:
            yield path, images.decode(path.read_bytes(), str(path))
        except (images.ImageError, OSError) as error:
            unreadable[str(path)] = str(error).removeprefix(f"{path}: ")


def caption_folder(paths: Paths, folder: Path, output: Path, model: str | None = None) -> Report:
    """Caption every image; `output` becomes {"image1.jpg": "..."} with names relative to `folder`.

    Captions go to `output`.partial as they are written, so that a killed run goes on where it was.

    Raises:
        NoImagesError, ModelFolderError, RegistryError: before anything is written.
    """
    found = find_images(folder)
    root = folder if folder.is_dir() else folder.parent
    captioner = Captioner.load(model_folder(paths, model, "stage2"), paths).to(device.for_inference())
    partial = output.with_name(output.name + ".partial")
    done: dict[str, str] = {row["image"]: row["caption"] for row in files.read_json_lines(partial, _is_caption)}
    todo = [path for path in found if path.relative_to(root).as_posix() not in done]
    report = Report()
    waiting: list[tuple[Path, images.Pixels]] = []

    def write() -> None:
        captions = captioner.caption([pixels for _, pixels in waiting])
        for (path, _), caption in zip(waiting, captions, strict=True):
            name = path.relative_to(root).as_posix()
            files.append_json_line(partial, {"image": name, "caption": caption})
            done[name] = caption
        progress.advance(len(waiting))
        waiting.clear()

    with meter("Captioning", len(todo)) as progress:
        for item in _readable(todo, report.failed):
            waiting.append(item)
            if len(waiting) == _TOGETHER:
                write()
        if waiting:
            write()
    files.write_json(output, dict(sorted(done.items())))
    partial.unlink(missing_ok=True)
    report.done = len(done)
    return report


def _is_caption(row: dict[str, Any]) -> bool:
    return isinstance(row.get("image"), str) and isinstance(row.get("caption"), str)


def reconstruct_folder(
    paths: Paths,
    folder: Path,
    output: Path,
    *,
    size: int | None = None,
    guidance: float = 2.0,
    steps: int = 50,
    seed: int = 42,
    model: str | None = None,
) -> Report:
    """Reconstruct every image into `output`: NAME.png, side-by-side/NAME.png and figures.json.

    `size` (pixels): side of the pictures that are written; None: what the decoder draws. Seeds count up from
    `seed` in the images' sorted order.
    """
    found = find_images(folder)
    root = folder if folder.is_dir() else folder.parent
    autoencoder = Autoencoder.load(model_folder(paths, model, "stage1"), paths).to(device.for_inference())
    side = size or autoencoder.decoder.image_size
    report = Report()
    figures: dict[str, float] = {}
    with meter("Reconstructing", len(found)) as progress:
        for i, (path, pixels) in enumerate(_readable(found, report.failed)):
            drawn = autoencoder.reconstruct([pixels], steps, guidance, seed + i)[0]
            drawn, square = images.resize_crop(drawn, side), images.resize_crop(pixels, side)
            # The suffix stays in the name: a.jpg and a.png are two images.
            name = path.relative_to(root).as_posix() + ".png"
            files.write_bytes(output / name, images.encode_png(drawn))
            pair = images.grid([[square, drawn]], tile=max(side, 128))
            files.write_bytes(output / "side-by-side" / name, images.encode_png(pair))
            figures[path.relative_to(root).as_posix()] = round(psnr([drawn], [square]), 3)
            progress.advance()
    report.done = len(figures)
    result = {
        "psnr_mean": round(sum(figures.values()) / len(figures), 3) if figures else None,
        "psnr": figures, "guidance": guidance, "steps": steps, "seed": seed, "size": side, "failed": report.failed,
    }  # fmt: skip
    files.write_json(output / "figures.json", result)
    return report

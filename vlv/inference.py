"""Captions or reconstructs every image of a folder with a trained model."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlv import config, registry
from vlv.config import Paths
from vlv.evaluation.metrics import psnr_of_each
from vlv.io import files, images, json_lines
from vlv.io.progress import meter
from vlv.models import saved
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner

log = logging.getLogger(__name__)

_TOGETHER = 16


class NoImagesError(ValueError):
    """The folder holds no images."""


@dataclass
class Report:
    """How many images were processed and which ones failed.

    Attributes:
        failures: a file that lists the failed images; it exists only if there are any.
        done: number of images processed, in this run and in earlier ones.
        failed: name of an image -> reason.
    """

    failures: Path
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Write `failures`, or remove the one of an earlier run."""
        if self.failed:
            json_lines.write(self.failures, ({"image": name, "reason": reason} for name, reason in self.failed.items()))
        else:
            self.failures.unlink(missing_ok=True)


def model_folder(paths: Paths, model: str | None, stage: str) -> Path:
    """The folder of `model`: a folder, models:/NAME@ALIAS, or None for the champion, else the model trained last.

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
        log.info("no champion (%s); using the model trained last", str(error).split(". ")[0])
        return paths.work / stage / "model"


def find_images(folder: Path) -> list[Path]:
    """The image files in `folder` and below, sorted. If `folder` is a file: that file.

    Raises:
        NoImagesError: the folder does not exist or holds no image.
    """
    if not folder.exists():
        raise NoImagesError(f"{folder} does not exist")
    if folder.is_file():
        return [folder]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in images.SUFFIXES)
    if not found:
        raise NoImagesError(f"{folder} holds no image ({', '.join(sorted(images.SUFFIXES))})")
    return found


def _readable(found: dict[str, Path], unreadable: dict[str, str]) -> Iterator[tuple[str, images.Pixels]]:
    for name, path in found.items():
        if path.exists() and not path.is_file():
            unreadable[name] = "not a file"  # reading a named pipe would wait for ever
            continue
        try:
            yield name, images.decode(path.read_bytes(), name)
        except (images.ImageError, OSError) as error:
            unreadable[name] = str(error).removeprefix(f"{name}: ")


def _named(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names in it.

    A name that is not UTF-8 is decoded with `os.fsdecode`; JSON holds it escaped.
    """
    root = folder if folder.is_dir() else folder.parent
    return {path.relative_to(root).as_posix(): path for path in find_images(folder)}


class _Captions:
    """The captions of an unfinished run, in a JSON-lines file.

    A killed run continues from it, and after failures only the failed images are tried again. A caption is kept if
    its image file is unchanged and it was written in the same way (`how`).
    """

    def __init__(self, path: Path, how: dict[str, Any], found: dict[str, Path]) -> None:
        self._path, self._found = path, found
        rows = json_lines.read(path, _is_row)
        before = rows[0].get("how") if rows else None
        if before != how:
            if before is not None:
                log.info("%s holds captions of another model; starting again", path)
            path.unlink(missing_ok=True)
            json_lines.append(path, {"how": how})
            rows = []
        known = {row["image"]: row for row in rows if "image" in row}
        self.done: dict[str, str] = {
            name: known[name]["caption"]
            for name, image in found.items()
            if name in known and known[name]["file"] == _stamp(image)
        }

    def add(self, name: str, caption: str) -> None:
        """Append a caption to the file, durably."""
        row = {"image": name, "caption": caption, "file": _stamp(self._found[name])}
        json_lines.append(self._path, row)
        self.done[name] = caption

    def remove(self) -> None:
        """Delete the file once all captions are in the output."""
        self._path.unlink(missing_ok=True)


def _is_row(row: dict[str, Any]) -> bool:
    is_caption = isinstance(row.get("image"), str) and isinstance(row.get("caption"), str) and "file" in row
    return is_caption or isinstance(row.get("how"), dict)


def _stamp(path: Path) -> list[int]:
    """Size in bytes and time of modification in nanoseconds; an empty list if the file is gone."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def caption_folder(
    paths: Paths, folder: Path, output: Path, model: str | None = None, writing: Mapping[str, object] | None = None
) -> Report:
    """Caption every image; `output` becomes {"image1.jpg": "..."} with names relative to `folder`.

    `writing`: values of `Generation` that replace those of the saved model.

    Captions are appended to `output`.partial, which stays until all images are done. Images that cannot be read are
    listed in `output`.failures.jsonl. If no image could be captioned, `output` is not changed.

    Raises:
        NoImagesError, ModelFolderError, RegistryError: nothing has been written.
    """
    found = _named(folder)
    chosen = model_folder(paths, model, "stage2")
    captioner = Captioner.load(chosen, paths).to(saved.inference_device())
    captioner.generation = captioner.generation.model_validate({**captioner.generation.model_dump(), **(writing or {})})
    how = {"model": files.sha256_folder(chosen), "generation": captioner.generation.model_dump()}
    captions = _Captions(output.with_name(output.name + ".partial"), how, found)
    todo = {name: path for name, path in found.items() if name not in captions.done}
    report = Report(output.with_name(output.name + ".failures.jsonl"))
    waiting: list[tuple[str, images.Pixels]] = []

    def write() -> None:
        written = captioner.caption([pixels for _, pixels in waiting])
        for (name, _), caption in zip(waiting, written, strict=True):
            captions.add(name, caption)
        progress.advance(len(waiting))
        waiting.clear()

    with meter("Captioning", len(todo)) as progress:
        for item in _readable(todo, report.failed):
            waiting.append(item)
            if len(waiting) == _TOGETHER:
                write()
        if waiting:
            write()
    if captions.done:
        files.write_json(output, dict(sorted(captions.done.items())))
    report.write()
    if not (report.failed and captions.done):
        captions.remove()
    report.done = len(captions.done)
    return report


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

    `size`: side of the written pictures in pixels; None: the decoder's size. Seeds count up from `seed` in the
    images' sorted order. Images that cannot be read are listed in figures.json and failures.jsonl.
    """
    found = _named(folder)
    autoencoder = Autoencoder.load(model_folder(paths, model, "stage1"), paths).to(saved.inference_device())
    side, seen = size or autoencoder.decoder.image_size, autoencoder.encoder.preprocessing
    report = Report(output / "failures.jsonl")
    figures: dict[str, float] = {}
    with meter("Reconstructing", len(found)) as progress:
        for i, (name, pixels) in enumerate(_readable(found, report.failed)):
            drawn = autoencoder.reconstruct([pixels], steps, guidance, seed + i)[0]
            drawn, square = images.resize_crop(drawn, side), images.resize_crop(pixels, side, seen.resize)
            # The suffix stays in the name: a.jpg and a.png are two images.
            target = f"{name}.png"
            files.write_bytes(output / target, images.encode_png(drawn))
            pair = images.grid([[square, drawn]], tile=max(side, 128))
            files.write_bytes(output / "side-by-side" / target, images.encode_png(pair))
            figures[name] = round(float(psnr_of_each([drawn], [square])[0]), 3)
            progress.advance()
    report.done = len(figures)
    result = {
        "psnr_mean": round(sum(figures.values()) / len(figures), 3) if figures else None,
        "psnr": figures, "guidance": guidance, "steps": steps, "seed": seed, "size": side, "failed": report.failed,
    }  # fmt: skip
    files.write_json(output / "figures.json", result)
    report.write()
    return report

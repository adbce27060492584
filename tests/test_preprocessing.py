"""One picture on all paths to the vision tower: training, caption, reconstruct, serving, a converted release."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.pyfunc.model import PythonModelContext
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.conftest import profile
from vlv import config, inference
from vlv.config import Paths
from vlv.convert import release
from vlv.data.import_.importer import Wanted, import_images
from vlv.data.import_.recipe import Recipe, Shares
from vlv.data.loader import ShardLoader
from vlv.io import images
from vlv.io.images import Preprocessing
from vlv.models import saved
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner

SQUARE, TOWER = 48, 64


def _settings(resize: str = "bicubic") -> config.Config:
    """Training data of 48 pixels before a vision tower of 64, as the paper's 384 before 768."""
    value = profile("smoke")
    return value.model_copy(
        update={
            "data": value.data.model_copy(update={"image_size": SQUARE, "resize": resize}),
            "decoder": value.decoder.model_copy(update={"image_size": SQUARE}),
            "encoder": value.encoder.model_copy(update={"image_size": TOWER}),
        }
    )


@contextmanager
def _seen() -> Iterator[list[torch.Tensor]]:
    """The pixels that any vision tower gets."""
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__ == "Florence2VisionBackbone":
            seen.append(inputs[0].clone())

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with fine detail, larger than the tower and not square."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    coarse = np.random.default_rng(3).integers(0, 256, (60, 97, 3), np.uint8)
    Image.fromarray(coarse).resize((291, 180), Image.Resampling.BICUBIC).save(path)
    return path


def _trained_on(photo: Path, settings: config.Config, data: Path) -> torch.Tensor:
    """The picture as a training loads it: imported, written to a shard, read again."""
    chosen = settings.data
    recipe = Recipe(chosen.image_size, 1, 9.0, "png", chosen.resize)
    import_images(photo.parent, data, Wanted(recipe, 10, Shares(0.0, 0.0)))
    batch = next(ShardLoader(data, "train", 1).iterate(1))
    assert batch.images is not None
    return batch.images


def _save(settings: config.Config, paths: Paths, place: Path) -> tuple[Path, Path]:
    """Saved models with their parts beside them: an auto-encoder, a captioner."""
    bundles = []
    for kind in (Autoencoder, Captioner):
        kind.build(settings, paths).save(place / kind.__name__, settings, paths, "card")
        saved.bundle(place / kind.__name__, paths, place / f"{kind.__name__}-bundle")
        bundles.append(place / f"{kind.__name__}-bundle")
    return bundles[0], bundles[1]


def _serve(model: Any, folder: Path, photo: Path, **params: Any) -> None:
    context = PythonModelContext({"model": str(folder)}, None)
    model.load_context(context)
    rows = pd.DataFrame({"image": [base64.b64encode(photo.read_bytes()).decode()]})
    model.predict(context, rows, params)


@pytest.mark.parametrize("resize", ["bicubic", "torchvision"])
def test_a_picture_reaches_the_vision_tower_as_in_training(
    resize: str, photo: Path, paths: Paths, tmp_path: Path
) -> None:
    from vlv.registry.serving import AutoencoderModel, CaptionerModel

    settings = _settings(resize)
    loaded = _trained_on(photo, settings, tmp_path / "data")
    autoencoder, captioner = _save(settings, paths, tmp_path)
    with _seen() as training:
        Autoencoder.build(settings, paths).encoder.features(loaded)
    assert training[0].shape == (1, 3, TOWER, TOWER)
    with _seen() as seen:
        inference.caption_folder(paths, photo, tmp_path / "captions.json", str(captioner), {"max_tokens": 2})
        inference.reconstruct_folder(paths, photo, tmp_path / "drawn", steps=1, guidance=1.0, model=str(autoencoder))
        _serve(CaptionerModel(), captioner, photo)
        _serve(AutoencoderModel(), autoencoder, photo, steps=1, guidance=1.0)
    assert len(seen) == 4
    for number, pixels in enumerate(seen):
        assert torch.equal(pixels, training[0]), f"way {number} shows the tower a different picture"


def _as_the_release(photo: Path, square: int, tower: int) -> np.ndarray[Any, Any]:
    """The release's chain, written out: PIL bilinear by the shorter side, centre cut; PIL bicubic to the tower."""
    image = Image.open(photo).convert("RGB")
    width, height = image.size
    short = min(width, height)
    new = (square, int(square * height / width)) if width == short else (int(square * width / height), square)
    image = image.resize(new, Image.Resampling.BILINEAR)
    top, left = round((new[1] - square) / 2.0), round((new[0] - square) / 2.0)
    image = image.crop((left, top, left + square, top + square))
    return np.asarray(image.resize((tower, tower), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("square", "tower"), [(48, 64), (384, 768)])
def test_a_converted_release_sees_what_the_release_sees(photo: Path, square: int, tower: int) -> None:
    settings = release.as_used(profile("paper"))
    assert Preprocessing.of(settings) == Preprocessing(384, "torchvision", 768)
    pixels = images.decode(photo.read_bytes())
    chain = Preprocessing(square, "torchvision", tower)
    ours = images.to_arrays(chain.for_tower(chain.cut([pixels])))[0].astype(int)
    off = np.abs(ours - _as_the_release(photo, square, tower).astype(int))
    # Pillow rounds between its two passes, torch does not: they differ by one grey level here and there.
    assert off.max() <= 1 and off.mean() < 0.3
    straight = images.to_arrays(images.to_batch([images.resize_crop(pixels, tower)]))[0].astype(int)
    assert np.abs(straight - ours).mean() > 3, "the path that skips the square differs"


@pytest.mark.parametrize("size", [(100, 70), (70, 100), (97, 64), (64, 97), (64, 64), (31, 33), (129, 500)])
def test_both_ways_cut_a_square_from_the_middle(size: tuple[int, int]) -> None:
    ramp = np.zeros((size[1], size[0], 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, size[0]).astype(np.uint8)
    ramp[..., 1] = np.linspace(0, 255, size[1]).astype(np.uint8)[:, None]
    cuts = [images.resize_crop(ramp, 64, how).astype(int) for how in ("bicubic", "torchvision")]
    assert all(cut.shape == (64, 64, 3) for cut in cuts)
    assert np.abs(cuts[0] - cuts[1]).max() < 12
    for cut in cuts:
        assert abs(cut[..., :2].mean() - 127) < 4


def test_a_model_refuses_pictures_that_were_not_cut(paths: Paths) -> None:
    encoder = Autoencoder.build(_settings(), paths).encoder
    with pytest.raises(ValueError, match=r"64x64 pixels: this model takes squares of 48"):
        encoder.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_data_cut_in_another_way_is_refused(photo: Path, paths: Paths, tmp_path: Path) -> None:
    from vlv.data import sources
    from vlv.data.shards import DataError

    _trained_on(photo, _settings("torchvision"), tmp_path / "data")
    source = config.ImportedSource(kind="imported", description="a photo")
    wanted = _settings("torchvision").data.model_copy(update={"source": source, "shard_size": 10})
    sources.materialise(wanted, paths, tmp_path / "data")
    other = wanted.model_copy(update={"resize": "bicubic"})
    with pytest.raises(DataError, match=r"resize 'torchvision', but params\.yaml says 'bicubic'"):
        sources.materialise(other, paths, tmp_path / "data")


def test_an_old_manifest_means_bicubic_and_keeps_its_bytes(photo: Path, paths: Paths, tmp_path: Path) -> None:
    from vlv.data import shards, sources

    _trained_on(photo, _settings(), tmp_path / "data")
    assert "resize" not in shards.read_manifest(tmp_path / "data").source
    assert "resize" not in sources.describe(profile("tiny").data)


def test_a_rotated_picture_of_a_phone_is_upright_on_every_path(photo: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(photo).save(buffer, "PNG", exif=turned)
    upright = images.decode(buffer.getvalue())
    assert upright.shape == (291, 180, 3)
    assert Preprocessing(48, "bicubic", 64).cut([upright]).shape == (1, 3, 48, 48)

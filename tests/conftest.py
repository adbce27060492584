"""What several test files share: the sprites, and small sets of emoji scenes."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from vlv import assets, config, telemetry
from vlv.data import sources

telemetry.off()  # for the children too

# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that: tests that interrupt
# a flow would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


def profile(name: str) -> config.Config:
    """A profile of configs/."""
    return config.parse((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"), name)


def tiny() -> config.Config:
    """The tiny profile."""
    return profile("tiny")


def small_scenes(train: int = 50, validation: int = 6, test: int = 14, shard_size: int = 20) -> config.Data:
    """The tiny profile's data section with few samples."""
    data = tiny().data
    counts = {"train": train, "validation": validation, "test": test}
    return data.model_copy(update={"source": data.source.model_copy(update=counts), "shard_size": shard_size})


@pytest.fixture(scope="session")
def paths() -> config.Paths:
    """This repository; assets are fetched into its cache once (or into VLV_CACHE), then found there."""
    return config.Paths(ROOT)


@pytest.fixture(scope="session")
def sprites(paths: config.Paths) -> Path:
    source = tiny().data.source
    assert isinstance(source, config.ScenesSource)
    return assets.resolve(source.sprites, paths)


@pytest.fixture(scope="session")
def _scene_data(paths: config.Paths, sprites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("scenes") / "data"
    sources.materialise(small_scenes(), paths, data)
    return data


@pytest.fixture
def scene_data(_scene_data: Path, tmp_path: Path) -> Path:
    """A copy of a small data folder that the test may damage: 50 + 6 + 14 scenes, 20 in a shard."""
    return Path(shutil.copytree(_scene_data, tmp_path / "data"))


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a folder with so many different 96x80 photographs (noise, as JPEG)."""
    import numpy as np
    from PIL import Image

    def write(count: int) -> Path:
        folder = tmp_path / "photographs"
        folder.mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (10, 12, 3), np.uint8)
            Image.fromarray(pixels).resize((96, 80)).save(folder / f"photo{i:02d}.jpg", quality=90)
        return folder

    return write

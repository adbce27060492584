"""What several test files share: sprites, small sets of scenes, projects, servers; and the order of the tests."""

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import projects, servers, sharing
from vlv import config
from vlv.data import sources
from vlv.io import assets, telemetry

telemetry.off()  # for the children too

# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that: tests that interrupt
# a flow would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests for two processes (pytest --dist loadgroup), each of which takes one group after the other.

    A file is a group, since its tests share fixtures; all tests on servers are one, so that a session starts each
    server once. The longest groups come first: a process that finishes early fills its time with short ones.
    """
    for item in items:
        server = item.get_closest_marker("server") is not None
        item.add_marker(pytest.mark.xdist_group("servers" if server else item.path.stem))
    items.sort(key=lambda item: _length(item))


def _length(item: pytest.Item) -> int:
    order = ("server", "training", "slow")
    return next((place for place, name in enumerate(order) if item.get_closest_marker(name)), len(order))


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


@pytest.fixture(scope="session")
def ready_toy(sprites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy project (tests/projects.py) with its data made and pinned and its tracking store made: to be copied."""

    def make(folder: Path) -> None:
        projects.prepare(projects.toy(folder, sprites))

    return sharing.once("toy", tmp_path_factory, make)


@pytest.fixture(scope="session")
def ready_smoke(sprites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the smoke profile, its data and its tracking store, nothing trained: to be copied."""

    def make(folder: Path) -> None:
        projects.prepare(projects.smoke(folder, sprites))

    return sharing.once("smoke", tmp_path_factory, make)


@pytest.fixture(scope="session")
def trained_smoke(ready_smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after one uninterrupted `dvc repro` of everything, committed: to be copied, or read."""

    def make(folder: Path) -> None:
        shutil.copytree(ready_smoke, folder, symlinks=True)
        done = projects.run(projects.python("-m", "dvc", "repro"), folder)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder.parent / "trained.log").write_text(done.stdout, encoding="utf-8")
        projects.commit(folder, "results")

    return sharing.once("trained", tmp_path_factory, make)


@pytest.fixture
def smoke(ready_smoke: Path, tmp_path: Path) -> Path:
    """A copy of `ready_smoke`."""
    return Path(shutil.copytree(ready_smoke, tmp_path / "project", symlinks=True))


@pytest.fixture
def trained(trained_smoke: Path, tmp_path: Path) -> Path:
    """A copy of `trained_smoke`; git sees it as clean."""
    return Path(shutil.copytree(trained_smoke, tmp_path / "project", symlinks=True))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server with the work pool `vlv`; yields the environment that leads there."""
    with servers.prefect(tmp_path_factory.mktemp("prefect")) as where:
        made = projects.run(projects.python("-m", "flows.full_train", "--make-pool"), Path.cwd(), **where)
        assert made.returncode == 0, made.stderr
        yield where


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server; yields its address."""
    with servers.mlflow(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


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

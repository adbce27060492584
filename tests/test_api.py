"""The public names: `from vlv import ...` is instant, and every example in their docstrings runs."""

import doctest
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlv
from tests import image_sets, projects
from tests.conftest import ROOT, profile
from vlv import Autoencoder, Captioner, api, load_config
from vlv.config import ConfigError, Paths
from vlv.io.images import ImageError
from vlv.models.autoencoder import Autoencoder as AutoencoderModel
from vlv.models.captioner import Captioner as CaptionerModel


@pytest.fixture(scope="module")
def folder(paths: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that fits the docstrings: untrained models of the smoke profile, profiles, two pictures."""
    folder, settings = tmp_path_factory.mktemp("api"), profile("smoke")
    AutoencoderModel.build(settings, paths).save(folder / "work/stage1/model", settings, paths, "A card.")
    CaptionerModel.build(settings, paths).save(folder / "work/stage2/model", settings, paths, "A card.")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "photo.jpg").write_bytes(image_sets.photo(1))
    Image.open(folder / "photo.jpg").save(folder / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLV_ROOT", str(ROOT))
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("test", doctest.DocTestFinder().find(api), ids=lambda test: test.name)
def test_examples_in_docstrings_run(test: doctest.DocTest) -> None:
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert result.failed == 0


def test_there_are_examples_for_every_public_name() -> None:
    shown = {test.name.rpartition(".")[2] for test in doctest.DocTestFinder().find(api) if test.examples}
    assert shown == set(vlv.__all__) - {"__version__"}


def test_importing_the_names_imports_no_torch() -> None:
    code = "import sys; from vlv import Autoencoder, Captioner, load_config; print({'torch', 'PIL'} & {*sys.modules})"
    done = projects.run(projects.python("-c", code), ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_type_checkers_read_the_installed_package() -> None:
    assert (ROOT / "vlv" / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["package-data"]["vlv"] == ["py.typed"]


def test_private_names_are_not_attributes() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Encoder'"):
        vlv.Encoder  # noqa: B018
    assert set(dir(vlv)) == set(vlv.__all__)


def test_paths_pictures_and_arrays_are_the_same_image() -> None:
    captioner, autoencoder = (
        Captioner.from_pretrained("work/stage2/model"),
        Autoencoder.from_pretrained("work/stage1/model"),
    )
    picture = Image.open("photo.png")
    forms = ["photo.png", Path("photo.png"), picture, np.asarray(picture)]
    assert len(set(captioner.caption(forms))) == 1
    embeddings = autoencoder.embed(forms, batch_size=1)
    assert all(torch.equal(one, embeddings[0]) for one in embeddings)
    first, second = autoencoder.reconstruct(forms[:2], steps=1, seed=3)
    again = autoencoder.reconstruct(forms[:1], steps=1, seed=4)[0]
    assert np.array_equal(second, again) and not np.array_equal(first, again)


def test_mistakes_are_named(tmp_path: Path) -> None:
    captioner = Captioner.from_pretrained("work/stage2/model")
    with pytest.raises(TypeError, match=r"give \[image\]"):
        captioner.caption("photo.jpg")
    (tmp_path / "bad.jpg").write_text("not an image")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        captioner.caption([tmp_path / "bad.jpg"])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config("nowhere.yaml")

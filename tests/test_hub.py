"""Models of the Hugging Face hub, from a server on this machine that speaks its protocol: which files are fetched."""

from pathlib import Path

import pytest

from tests import hub_server, projects
from tests.small_models import save, sdxl
from vlv.io import files

_RESOLVE = """
import sys
from pathlib import Path
from vlv.io import assets
from vlv import config
try:
    for reference in sys.argv[1:]:
        print(assets.resolve(reference, config.Paths(Path.cwd())))
except assets.AssetError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A pipeline as one is published, with its weights in other forms beside it, and a plain model."""
    pipeline = save(sdxl(), tmp_path / "hub" / "owner" / "pipeline")
    parts = ["vae", "unet", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"]
    index: dict[str, list[str | None]] = {name: ["diffusers", "Any"] for name in parts}
    extra = {
        "_class_name": "StableDiffusionXLPipeline",
        "safety_checker": ["diffusers", "Any"],
        "image_encoder": [None] * 2,
    }
    files.write_json(pipeline / "model_index.json", index | extra)
    weights = (pipeline / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for copy in (
        "sd_xl.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors", "image_encoder/model.safetensors", "text_encoders/clip_g.safetensors",
    ):  # fmt: skip
        files.write_bytes(pipeline / copy, weights)
    model = tmp_path / "hub" / "owner" / "model"
    files.write_json(model / "config.json", {})
    for name in ("model-00001-of-00002", "model-00002-of-00002", "model.fp16"):
        files.write_bytes(model / f"{name}.safetensors", name.encode())
    files.write_bytes(model / "pytorch_model.bin", b"the same once more")
    return tmp_path / "hub"


def _resolve(tmp_path: Path, address: str, *references: str) -> list[str]:
    where = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    done = projects.run(projects.python("-c", _RESOLVE, *references), tmp_path, timeout=300, **where)
    return (done.stdout or done.stderr).splitlines()


def test_only_files_that_are_loaded_are_downloaded_and_only_once(repositories: Path, tmp_path: Path) -> None:
    with hub_server.serve(repositories) as (address, served):
        pipeline, model = _resolve(tmp_path, address, "hf:owner/pipeline", "hf:owner/model@main")
        assert sorted(name for name in served if name.endswith((".safetensors", ".bin"))) == [
            "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
            "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        ]  # fmt: skip
        assert (Path(pipeline) / "tokenizer" / "tokenizer.json").exists()
        assert len(list(Path(model).glob("*.safetensors"))) == 2
        count = len(served)
        assert _resolve(tmp_path, address, "hf:owner/pipeline", "hf:owner/model@main") == [pipeline, model]
        assert len(served) == count
        (refused,) = _resolve(tmp_path, address, "hf:owner/other")
        assert "no such repository" in refused and "hf:owner/other" in refused
    assert _resolve(tmp_path, address, "hf:owner/pipeline", "hf:owner/model@main") == [pipeline, model]  # hub is gone
    (refused,) = _resolve(tmp_path / "cache", address, "hf:owner/else")
    assert "cannot be reached" in refused


_DESCRIBED = """
from pathlib import Path
from vlv.io import assets
from vlv import config
paths, reference = config.Paths(Path.cwd()), "hf:owner/model@main"
print(assets.at_hand(reference, paths))
print(assets.resolve(reference, paths, weights=False))
print(assets.at_hand(reference, paths))
"""


def test_the_description_of_a_model_is_fetched_without_its_weights_and_then_found_locally(
    repositories: Path, tmp_path: Path
) -> None:
    with hub_server.serve(repositories) as (address, served):
        where = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        done = projects.run(projects.python("-c", _DESCRIBED), tmp_path, timeout=300, **where)
        assert done.returncode == 0, done.stderr
        before, described, after = done.stdout.split()
        assert before == "None" and after == described
        assert [path.name for path in Path(described).iterdir()] == ["config.json"] and served == ["config.json"]

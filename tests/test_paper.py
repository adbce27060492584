"""The paper profile and its relatives with other decoders: their models take their full size on the meta device."""

import pytest
import torch

from tests.conftest import profile
from vlv import config
from vlv.config import Paths
from vlv.models import language_model
from vlv.models.autoencoder import Autoencoder


def _at_random(name: str = "paper") -> config.Config:
    paper = profile(name)
    random = {"weights": "random"}
    # The prompt needs Florence-2's tokenizer, which comes with its weights.
    encoder = paper.encoder.model_copy(update={**random, "prompt": ""})
    return paper.model_copy(update={"encoder": encoder, "decoder": paper.decoder.model_copy(update=random)})


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_it_instantiates_at_full_size_on_the_meta_device(paths: Paths) -> None:
    with torch.device("meta"):
        model = Autoencoder.build(_at_random(), paths)
    # Published sizes: Florence-2-large 0.77 B; Stable Diffusion 2: UNet 866 M, text encoder 340 M, VAE 84 M.
    assert 760 < millions(model.encoder.florence) < 840
    assert round(millions(model.decoder.unet)) == 866
    assert round(millions(model.decoder.conditioner.text_encoder)) == 340
    assert round(millions(model.decoder.vae)) == 84
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert 350 < learning < 480, "BART, queries and projection learn; the vision tower does not"
    assert model.encoder.queries.shape == (1, 77, 1024)


# Published sizes: Qwen2.5's technical report (arXiv 2412.15115) and model cards: 0.49 B, 1.54 B, 3.09 B parameters.
@pytest.mark.parametrize(("name", "billions"), [("0.5b", 0.49), ("1.5b", 1.54), ("3b", 3.09)])
def test_the_language_models_take_their_full_size_too(name: str, billions: float, paths: Paths) -> None:
    random = {"weights": "random", "architecture": f"configs/architectures/qwen2.5-{name}"}
    with torch.device("meta"):
        model = language_model.build(profile("paper").language_model.model_copy(update=random), paths)
    assert round(millions(model) / 1e3, 2) == billions


def test_sdxl_takes_its_full_size(paths: Paths) -> None:
    with torch.device("meta"):
        model = Autoencoder.build(_at_random("sdxl"), paths)
    # Published sizes (arXiv 2307.01952): UNet 2.6 B, both text encoders 817 M; its VAE has Stable Diffusion's shape.
    assert round(millions(model.decoder.unet)) == 2567
    assert 817 <= millions(model.decoder.conditioner) < 818
    assert round(millions(model.decoder.vae)) == 84
    assert model.decoder.latent_shape == (4, 128, 128)
    assert model.decoder.conditioner.width == 2048


@pytest.mark.parametrize("t5", [False, True])
def test_sd35_takes_its_full_size(paths: Paths, t5: bool) -> None:
    settings = _at_random("sd35")
    settings = settings.model_copy(update={"decoder": settings.decoder.model_copy(update={"options": {"use_t5": t5}})})
    with torch.device("meta"):
        model = Autoencoder.build(settings, paths)
    # Published size: 2.5 B, with the table of positions, which is stored but no parameter. T5-XXL's encoder: 4.8 B.
    positions = model.decoder.transformer.pos_embed.pos_embed.numel() / 1e6
    assert 2400 < millions(model.decoder.transformer) + positions < 2550
    assert (
        4700 < millions(model.decoder.conditioner) - 818 < 4800
        if t5
        else 817 < millions(model.decoder.conditioner) < 818.5
    )
    assert model.decoder.latent_shape == (16, 64, 64)
    assert model.decoder.conditioner.width == (2048 + 4096 if t5 else 2048)


def test_the_run_of_the_readme_differs_from_that_of_the_paper_only_in_size() -> None:
    paper, readme = (profile(name).model_dump(by_alias=True) for name in ("paper", "paper-readme"))
    for value in (paper, readme):
        del value["profile"]
        for stage in ("stage1", "stage2"):
            for size in ("steps", "batch_size", "accumulation"):
                del value[stage][size]
    assert readme == paper
    run = profile("paper-readme")
    assert [(s.steps, s.batch_size) for s in (run.stage1, run.stage2)] == [(10_000, 64)] * 2

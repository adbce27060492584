"""The release's choices as options: dropout, drop-path, initial queries, trainable parts of Stage 2's encoder."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Florence2Config, Florence2ForConditionalGeneration

from tests.conftest import profile
from vlv import config, rng
from vlv.config import Paths
from vlv.io import stopping
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.models.encoder import CaptionEncoder
from vlv.training import blocks, loop

RELEASE = {"dropout": 0.1, "drop_path": 0.1, "query_std": 1.0}


def _smoke(encoder: dict[str, Any] | None = None, **stages: dict[str, Any]) -> config.Config:
    """The smoke profile with the release's encoder options (or others), without caches."""
    value = profile("smoke")
    value = value.model_copy(
        update={
            "encoder": value.encoder.model_copy(update=RELEASE if encoder is None else encoder),
            "stage1": value.stage1.model_copy(update={"cache_features": False, **stages.get("stage1", {})}),
            "stage2": value.stage2.model_copy(update=stages.get("stage2", {})),
        }
    )
    return config.Config.model_validate(value.model_dump(by_alias=True))


def _pictures(count: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=draw)


def _embed(encoder: CaptionEncoder, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    masks = encoder.masks(generator, len(pictures))
    return encoder(encoder.features(pictures, masks), masks)


@pytest.fixture(scope="module")
def model(paths: Paths) -> Autoencoder:
    return Autoencoder.build(_smoke(), paths)


def test_by_default_nothing_is_dropped_and_queries_start_at_half(paths: Paths) -> None:
    settings = profile("smoke")
    model = Autoencoder.build(settings, paths)
    assert model.encoder.masks(torch.Generator(), 2) is None
    assert not [part for part in model.modules() if isinstance(part, rng.DropPath)]
    release = Autoencoder.build(_smoke(), paths)
    assert torch.equal(release.encoder.queries, 2 * model.encoder.queries)
    # Outside the forward pass of a training the options change nothing.
    release.encoder.queries.data.copy_(model.encoder.queries)
    assert torch.equal(release.context(_pictures()), model.context(_pictures()))


def test_a_sample_gets_the_same_masks_wherever_it_is_computed(model: Autoencoder) -> None:
    """In one process or several, in one micro-batch or several, before or after a kill."""
    encoder = model.encoder
    whole = _embed(encoder, _pictures(), rng.PartGenerator(7))
    again = _embed(encoder, _pictures(), rng.PartGenerator(7))
    assert torch.equal(whole, again)
    for parts in (2, 3, 6):
        pieces = [
            _embed(encoder, piece, rng.PartGenerator(7, part, parts))
            for part, piece in enumerate(_pictures().chunk(parts))
        ]
        assert torch.allclose(torch.cat(pieces), whole, atol=1e-5)
    other = _embed(encoder, _pictures(), rng.PartGenerator(8))
    assert (other - whole).abs().mean() > 0.01
    same_image = _embed(encoder, _pictures()[:1].expand(2, -1, -1, -1), rng.PartGenerator(7))
    assert not torch.allclose(same_image[0], same_image[1]), "each sample has its own masks"


class _Counting(TorchFunctionMode):
    """Counts the calls of torch's dropout that drop values."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout and kwargs.get("training", True) and kwargs["p"]:
            self.rates.append(kwargs["p"])
        return func(*args, **(kwargs or {}))


def test_it_drops_like_the_stock_model_in_training_mode(paths: Paths) -> None:
    ours = Autoencoder.build(_smoke({**RELEASE, "drop_path": 0.0}), paths).encoder
    settings = Florence2Config.from_pretrained(paths.root / "pretrained/tiny/encoder")
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        setattr(settings.text_config, name, 0.1)
    settings._attn_implementation = "eager"
    stock = Florence2ForConditionalGeneration(settings).float()
    stock.load_state_dict(ours.florence.state_dict())
    language = stock.model.language_model.train()

    def theirs(features: torch.Tensor) -> torch.Tensor:
        states = language.encoder(inputs_embeds=features).last_hidden_state
        queries = ours.queries.expand(len(features), -1, -1)
        decoded = language.decoder(inputs_embeds=queries, encoder_hidden_states=states).last_hidden_state
        projected: torch.Tensor = ours.projection(decoded)
        return projected

    torch.manual_seed(0)
    with torch.no_grad():
        features = ours.features(_pictures(2))
        plain = ours(features)
        counted = _Counting()
        with counted:
            theirs(features)
        masks = rng.Masks(torch.Generator(), 2)
        ours(features, masks)
        assert masks._used == len(counted.rates) > 10 and set(counted.rates) == {0.1}
        many = features.repeat(64, 1, 1)
        moved = [
            ((embeddings - plain.repeat(64, 1, 1)).norm() / plain.norm() / 8).item()
            for embeddings in (ours(many, ours.masks(torch.Generator().manual_seed(1), 128)), theirs(many))
        ]
    assert moved[0] == pytest.approx(moved[1], rel=0.05)
    assert moved[0] > 0.02


def test_the_tower_drops_whole_branches_at_the_stock_rates(model: Autoencoder, paths: Paths) -> None:
    settings = Florence2Config.from_pretrained(paths.root / "pretrained/tiny/encoder")
    settings.vision_config.drop_path_rate = 0.1
    stock = Florence2ForConditionalGeneration(settings).model.vision_tower

    def rates(tower: nn.Module) -> list[float]:
        halves = [part for part in tower.modules() if hasattr(part, "drop_path1")]
        return [
            getattr(place, "rate", getattr(place, "drop_prob", 0.0))
            for half in halves
            for place in (half.drop_path1, half.drop_path2)
        ]

    ours = rates(model.encoder.florence.model.vision_tower)
    assert ours == rates(stock) and ours[0] == 0.0 and ours[-1] == pytest.approx(0.1)
    branch = torch.ones(2000, 3, 5)
    with rng.dropping(rng.Masks(torch.Generator(), 2000), 0.0):
        dropped = rng.DropPath(0.1)(branch)
    kept = dropped[:, 0, 0] > 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert torch.equal(dropped, kept[:, None, None].float().expand_as(branch) / (1 - 0.1))
    assert torch.equal(rng.DropPath(0.1)(branch), branch)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_recomputed_activations_get_the_same_masks(paths: Paths, stage: str) -> None:
    settings = _smoke(stage2={"learn": "mlp+llm+encoder"}, stage1={"learn": "all"})
    kind: Any = Autoencoder if stage == "stage1" else Captioner
    batch: Any = Stage1Batch(_pictures(2))
    if stage == "stage2":
        batch = Stage2Batch(None, torch.tensor([[5, 6], [7, 8]]), torch.tensor([[5, 6], [7, 8]]), _pictures(2))
    plain, thrifty = kind.build(settings, paths), kind.build(settings, paths)
    assert blocks.recompute(thrifty) >= 4
    losses = [m(batch, torch.Generator().manual_seed(5)) for m in (plain, thrifty)]
    assert losses[0].item() == losses[1].item()
    for _ in range(2):  # twice, because a graph may be used for two backward passes
        for loss in losses:
            loss.backward(retain_graph=True)
    for (name, ours), theirs in zip(thrifty.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def _train(settings: config.Config, paths: Paths, folder: Path, stop_at: int = -1) -> dict[str, torch.Tensor]:
    """Train six steps of four pictures with the training loop; `stop_at`: request a stop in this step."""
    section = settings.stage1.model_copy(
        update={"steps": 6, "batch_size": 4, "noise_samples_per_image": 1, "checkpoint_every": 2, "log_every": 1}
    )
    model = Autoencoder.build(settings.model_copy(update={"stage1": section}), paths)
    each = 4 // section.accumulation

    def batches(step: int) -> Iterator[Stage1Batch]:
        while True:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            pictures = _pictures(24)[4 * step : 4 * step + 4]
            for part in range(section.accumulation):
                yield Stage1Batch(pictures[part * each : (part + 1) * each])
            step += 1

    loop.train(model, batches, section, folder, "dropout")
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_resuming_with_dropout_is_bit_identical(paths: Paths, tmp_path: Path) -> None:
    settings = _smoke()
    whole = _train(settings, paths, tmp_path / "whole")
    with pytest.raises(stopping.Stopped):
        _train(settings, paths, tmp_path / "cut", stop_at=3)
    torch.manual_seed(99)  # torch's global generator must not matter
    resumed = _train(settings, paths, tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_micro_batches_drop_the_same_values_as_the_whole_batch(paths: Paths, tmp_path: Path) -> None:
    whole = _train(_smoke(), paths, tmp_path / "whole")
    halves = _train(_smoke(stage1={"accumulation": 2}), paths, tmp_path / "halves")
    norms = {name: tensor.norm().item() for name, tensor in whole.items()}
    assert {name: tensor.norm().item() for name, tensor in halves.items()} == pytest.approx(norms, rel=1e-4, abs=1e-6)


def test_queries_and_projection_can_stay_frozen_in_stage_2(paths: Paths, tmp_path: Path) -> None:
    settings = _smoke({}, stage2={"learn": "mlp+llm+encoder", "queries_learn": False})
    captioner = Captioner.build(settings, paths)
    learns = {name for name, p in captioner.named_parameters() if p.requires_grad}
    assert not [name for name in learns if name.startswith(("encoder.queries", "encoder.projection"))]
    assert any(name.startswith("encoder.florence.model.language_model.decoder") for name in learns)
    captioner.save(tmp_path / "model", settings, paths, "card")
    assert torch.equal(Captioner.load(tmp_path / "model", paths).encoder.queries, captioner.encoder.queries)


def test_incompatible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="cache_features"):
        _smoke(stage1={"cache_features": True})
    learn = {"learn": "mlp+llm+encoder", "queries_learn": False}
    with pytest.raises(ValueError, match="trains nothing of the encoder"):
        _smoke(stage1={"learn": "queries_only"}, stage2=learn)

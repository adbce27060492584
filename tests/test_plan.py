"""The plan: FLOPs against known figures and real steps, memory against real allocations, and the arithmetic."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests import small_models
from tests.conftest import profile
from vlv import config
from vlv.cli import main as cli
from vlv.config import Paths
from vlv.data import shards
from vlv.data.cache import ShardCache
from vlv.models.autoencoder import Autoencoder, Stage1Batch
from vlv.models.captioner import Captioner, Stage2Batch
from vlv.plan import count, gpus
from vlv.plan.count import Part, Simulation, Stage, StepCounter
from vlv.plan.gpus import Machine
from vlv.plan.memory import GIB, RESERVE, memory
from vlv.plan.report import forecast
from vlv.training import blocks

pytestmark = pytest.mark.slow

# Counted for Stable Diffusion 2.1 at 384 pixels as the release trains: GFLOP for an image, a multiply-add is two.
KNOWN = {
    ("VAE encoder", "forward"): 620, ("vision tower", "forward"): 1490, ("BART encoder", "forward"): 194,
    ("BART decoder, queries, projection", "forward"): 59, ("denoiser", "forward"): 424, ("denoiser", "backward"): 440,
}  # fmt: skip
BART_BACKWARD, TEXT_ENCODER = 507, 91  # encoder and decoder together; forward and backward together
RELEASE, WITHOUT_VAE_AND_RECOMPUTATION = 4249, 3205


def _paper(**stage1: object) -> config.Config:
    value = profile("paper")
    return value.model_copy(update={"stage1": value.stage1.model_copy(update=stage1)})


@pytest.fixture(scope="module")
def release(paths: Paths) -> dict[str, Part]:
    """The released recipe: nothing cached, the UNet's activations recomputed."""
    simulation = Simulation(_paper(cache_latents=False), paths, "stage1", "gpu")
    blocks.recompute(simulation.model.decoder.denoiser)
    return {part.name: part for part in simulation.step(1)[0]}


@pytest.mark.parametrize(("part", "phase"), sorted(KNOWN))
def test_flops_of_the_released_recipe_by_part(release: dict[str, Part], part: str, phase: str) -> None:
    assert getattr(release[part], phase) / 1e9 == pytest.approx(KNOWN[part, phase], rel=0.02)


def test_flops_of_the_released_recipe_that_are_known_as_sums(release: dict[str, Part]) -> None:
    bart = release["BART encoder"].backward + release["BART decoder, queries, projection"].backward
    assert bart / 1e9 == pytest.approx(BART_BACKWARD, rel=0.02)
    text = release["text encoder"].forward + release["text encoder"].backward
    assert text / 1e9 == pytest.approx(TEXT_ENCODER, rel=0.02)


def test_flops_of_the_released_recipe_in_total(release: dict[str, Part]) -> None:
    flops = sum(part.flops for part in release.values())
    assert flops / 1e9 == pytest.approx(RELEASE, rel=0.02)
    unet = release["denoiser"]
    # The known figure has a whole second forward pass. torch ends it at the last activation that a block needs.
    assert 0.75 * unet.forward < unet.recomputed < unet.forward
    assert (flops - unet.recomputed + unet.forward) / 1e9 == pytest.approx(RELEASE, rel=0.002)
    without = flops - release["VAE encoder"].forward - unet.recomputed
    assert without / 1e9 == pytest.approx(WITHOUT_VAE_AND_RECOMPUTATION, rel=0.02)


@pytest.fixture(scope="module")
def smoke() -> config.Config:
    value = profile("smoke")
    # In float32, because a CPU's autocast follows other rules than a GPU's, which the plan imitates.
    stage1 = value.stage1.model_copy(update={"cache_latents": False, "cache_features": False})
    return value.model_copy(update={"stage1": stage1})


def _real_flops(model: torch.nn.Module, batch: object) -> int:
    # torch's counter does not know a CPU's flash kernel, but counts all plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        model(batch, torch.Generator().manual_seed(0)).backward()
    return real.get_total_flops()


def _bytes(model: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_stage_1_are_those_of_the_real_step(recompute: bool, smoke: config.Config, paths: Paths) -> None:
    stage1 = smoke.stage1.model_copy(update={"gradient_checkpointing": recompute})
    counted = count.stage(smoke.model_copy(update={"stage1": stage1}), paths, "stage1", "cpu")
    model = Autoencoder.build(smoke, paths)
    assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.weights == _bytes(model)
    if recompute:
        blocks.recompute(model)
    assert counted.flops == _real_flops(model, Stage1Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    assert (sum(part.recomputed for part in counted.parts) > 0) == recompute


@pytest.mark.parametrize("learn", ["mlp", "mlp+llm", "mlp+lora", "mlp+llm+encoder"])
def test_every_choice_of_what_learns_in_stage_2_is_counted(learn: str, smoke: config.Config, paths: Paths) -> None:
    stage2 = smoke.stage2.model_copy(update={"learn": learn, "max_caption_tokens": 9})
    settings = smoke.model_copy(update={"stage2": stage2})
    counted = count.stage(settings, paths, "stage2", "cpu")
    captioner = Captioner.build(settings, paths)
    ids = torch.ones(1, 9, dtype=torch.long)
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8) if learn == "mlp+llm+encoder" else None
    context = torch.zeros(1, 8, 128) if images is None else None
    assert counted.flops == _real_flops(captioner, Stage2Batch(context, ids, ids, images))
    assert counted.trainable == sum(p.numel() for p in captioner.parameters() if p.requires_grad)
    assert counted.weights == _bytes(captioner)
    assert (counted.prepared_flops > 0) == (images is None), "a frozen encoder's context is cached"


@pytest.mark.parametrize(("kind", "recompute"), [("sdxl", True), ("sd3", False), ("sd3 with T5", True)])
def test_other_decoders_are_counted(
    kind: str, recompute: bool, smoke: config.Config, paths: Paths, tmp_path: Path
) -> None:
    small = small_models.sdxl() if kind == "sdxl" else small_models.sd3(t5="T5" in kind)
    part = {
        "kind": kind.split()[0], "pretrained": str(small_models.save(small, tmp_path)), "image_size": 32,
        "use_text_encoder": True, "options": {"use_t5": True} if "T5" in kind else {},
    }  # fmt: skip
    settings = smoke.model_copy(
        update={
            "decoder": smoke.decoder.model_copy(update=part),
            "encoder": smoke.encoder.model_copy(update={"start_on_text_side": False}),
            "data": smoke.data.model_copy(update={"image_size": 32}),
            "stage1": smoke.stage1.model_copy(update={"gradient_checkpointing": recompute}),
        }
    )
    counted = count.stage(settings, paths, "stage1", "cpu", 2)
    model = Autoencoder.build(settings, paths)
    assert counted.weights == _bytes(model)
    if recompute:
        blocks.recompute(model)
    assert counted.flops == _real_flops(model, Stage1Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))


def test_a_decoder_from_outside_the_package_is_counted(smoke: config.Config, paths: Paths) -> None:
    settings = smoke.model_copy(
        update={
            "decoder": smoke.decoder.model_copy(update={"kind": "tests.toy_decoder", "options": {"width": 12}}),
            "encoder": smoke.encoder.model_copy(update={"start_on_text_side": False}),
        }
    )
    counted = count.stage(settings, paths, "stage1", "gpu")
    model = Autoencoder.build(settings, paths)
    assert counted.flops == _real_flops(model, Stage1Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    assert counted.weights == _bytes(model)


def test_dropout_in_the_encoder_is_counted(smoke: config.Config, paths: Paths) -> None:
    dropping = smoke.model_copy(update={"encoder": smoke.encoder.model_copy(update={"dropout": 0.1, "drop_path": 0.1})})
    with_masks, without = (count.stage(s, paths, "stage1", "gpu", 2) for s in (dropping, smoke))
    assert with_masks.flops == without.flops
    assert with_masks.activations.kept > without.activations.kept


def test_frozen_weights_in_bf16_are_forecast(smoke: config.Config, paths: Paths) -> None:
    stage1 = smoke.stage1.model_copy(update={"precision": "bf16", "frozen_precision": "bf16"})
    counted = count.stage(smoke.model_copy(update={"stage1": stage1}), paths, "stage1", "cpu")
    model = Autoencoder.build(smoke, paths)
    blocks.store_frozen_in_bf16(model)
    assert counted.weights == _bytes(model)


def test_the_caches_hold_the_bytes_that_were_counted(paths: Paths, scene_data: Path, tmp_path: Path) -> None:
    smoke = profile("smoke")
    counted = count.stage(smoke, paths, "stage1", "cpu")
    model = Autoencoder.build(smoke, paths)
    entries = shards.read_manifest(scene_data).splits["test"].shards

    def compute(x: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, std = model.decoder.encode(x)
        return {"mean": mean, "std": std, "features": model.encoder.features(x)}

    cache = ShardCache(tmp_path, "both", {}, scene_data, "test", compute)
    cache.fill(entries)
    held = sum(t.numel() * t.element_size() for e in entries for t in cache.load(e).values())
    assert counted.cached * sum(e.samples for e in entries) == held


@pytest.mark.parametrize("recompute", [False, True])
def test_a_real_step_allocates_the_memory_that_was_counted(recompute: bool, smoke: config.Config, paths: Paths) -> None:
    samples = 3
    stage1 = smoke.stage1.model_copy(update={"gradient_checkpointing": recompute})
    counted = count.stage(smoke.model_copy(update={"stage1": stage1}), paths, "stage1", "cpu", samples)
    model = Autoencoder.build(smoke, paths)
    if recompute:
        blocks.recompute(model)
    batch = Stage1Batch(torch.zeros(samples, 3, 64, 64, dtype=torch.uint8))
    with StepCounter(model) as real:
        loss = model(batch, torch.Generator().manual_seed(0))
        kept = sum(real.living().values())
        loss.backward()
    assert counted.activations.kept == pytest.approx(kept, rel=0.02)
    assert counted.activations.peak == pytest.approx(real.peak, rel=0.02)


def test_recomputation_keeps_less_and_computes_more(smoke: config.Config, paths: Paths) -> None:
    stage1 = smoke.stage1.model_copy(update={"gradient_checkpointing": True})
    plain = count.stage(smoke, paths, "stage1", "cpu", 32, knobs=True)
    again = count.stage(smoke.model_copy(update={"stage1": stage1}), paths, "stage1", "cpu", 32)
    assert plain.flops < again.flops < plain.flops + sum(part.forward for part in plain.parts)
    assert again.activations.kept < plain.activations.kept
    assert again.activations.peak < plain.activations.peak
    assert plain.with_recomputation == again.activations


def _machine(price: float | None = None) -> Machine:
    return Machine(gpus.find("rtx-6000-ada"), 8, utilisation=0.5, price=price)


@pytest.fixture(scope="module")
def paper(paths: Paths) -> Stage:
    """Stage 1 of the paper with nothing cached, 64 samples on a GPU at a time."""
    return count.stage(_paper(cache_latents=False, accumulation=1), paths, "stage1", "gpu", 64, knobs=True)


def test_time_and_money(paper: Stage) -> None:
    f = forecast(paper, _machine(price=0.75), images=10)
    seconds = 200_000 * 512 * paper.flops / (8 * 91.1e12 * 0.5)
    assert f.hours == pytest.approx(seconds / 3600)
    assert f.prepare_hours == 0, "nothing is cached"
    assert f.dollars == pytest.approx(f.hours * 8 * 0.75)


def test_memory_by_kind_and_what_sharding_divides(paper: Stage) -> None:
    alone = memory(paper, paper.activations, 8)
    assert alone.weights == paper.weights
    assert (alone.gradients, alone.optimizer) == (4 * paper.trainable, 8 * paper.trainable)
    shared = memory(paper, paper.activations, 8, "zero2")
    assert (shared.gradients, shared.optimizer) == (paper.trainable // 2, paper.trainable)
    assert memory(paper, paper.activations, 8, "full").weights < shared.weights == alone.weights
    assert memory(paper, paper.activations).buckets == 0


def test_a_stage_that_does_not_fit_says_which_settings_help(paper: Stage) -> None:
    assert _machine().micro_batch(_paper(accumulation=1), "stage1") == paper.activations.samples == 64
    f = forecast(paper, _machine())
    assert not f.fits and f.memory.peak > 48 * GIB * (1 - RESERVE)
    text = "\n".join(f.knobs)
    assert "stage1.gradient_checkpointing: true" in text and "stage1.accumulation: 2" in text
    assert "largest micro-batch that fits" in text


def test_gpus_have_their_sources_and_say_what_they_lack() -> None:
    assert all(gpu.source and gpu.memory > 0 and gpu.fp32 > 0 for gpu in gpus.GPUS)
    assert gpus.find("h100 sxm").peak("bf16") == 989.4e12
    with pytest.raises(gpus.UnknownGpuError, match="V100 32GB has no bf16"):
        gpus.find("V100 32GB").peak("bf16")
    with pytest.raises(gpus.UnknownGpuError, match="there are: RTX 6000 Ada"):
        gpus.find("abacus")


def test_the_command_prints_tables_and_writes_json(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLV_ROOT", str(paths.root))
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config", str(paths.root / "configs" / "smoke.yaml"), "--price", "2", "--json", str(file)]
    with pytest.raises(SystemExit) as ended:
        cli.app(arguments, prog_name="vlv")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "vision tower" in shown and "H100 SXM" in shown and "word head" in shown
    one, two = json.loads(file.read_text())
    assert (one["stage"], two["stage"]) == ("stage1", "stage2")
    assert one["fits"] and one["dollars"] > 0 and one["memory"]["peak"] < 1 * GIB

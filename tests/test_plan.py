"""The plan: FLOPs against known figures and against real steps, memory against real allocations, and the arithmetic."""

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
from vlv.plan import count, gpus, steps
from vlv.plan.count import Stage
from vlv.plan.counting import LiveBytes
from vlv.plan.forecast import GIB, RESERVE, Machine, forecast, memory
from vlv.training import blocks

pytestmark = pytest.mark.slow

# Counted for Stable Diffusion 2.1 at 384 pixels as the release trains: GFLOP an image, a multiply-add is two.
KNOWN = {
    ("VAE encode", "forward"): 620, ("vision tower", "forward"): 1490, ("BART encoder", "forward"): 194,
    ("BART decoder", "forward"): 59, ("UNet", "forward"): 424, ("UNet", "recomputed"): 424, ("UNet", "backward"): 440,
}  # fmt: skip
BART_BACKWARD, TEXT_ENCODER = 507, 91  # encoder and decoder together; forward and backward together
RELEASE, LEAN = 4249, 3205


def _paper(**stage1: object) -> config.Config:
    value = profile("paper")
    return value.model_copy(update={"stage1": value.stage1.model_copy(update=stage1)})


@pytest.fixture(scope="module")
def release(paths: Paths) -> Stage:
    """The released recipe: nothing cached, the UNet computed twice."""
    settings = _paper(cache_latents=False, gradient_checkpointing=False)
    return count.stage1(settings, paths, "gpu", 64, recompute=[steps.UNET])


def _giga(stage: Stage, name: str, kind: str) -> float:
    (module,) = [m for m in stage.modules if m.cost.name == name]
    return float(getattr(module.cost, kind)) / 1e9


@pytest.mark.parametrize(("name", "kind"), sorted(KNOWN))
def test_the_release_s_flops_by_module(release: Stage, name: str, kind: str) -> None:
    assert _giga(release, name, kind) == pytest.approx(KNOWN[name, kind], rel=0.02)


def test_the_release_s_flops_of_what_is_known_together(release: Stage) -> None:
    bart = _giga(release, "BART encoder", "backward") + _giga(release, "BART decoder", "backward")
    assert bart == pytest.approx(BART_BACKWARD, rel=0.02)
    text = _giga(release, "text encoder", "forward") + _giga(release, "text encoder", "backward")
    assert text == pytest.approx(TEXT_ENCODER, rel=0.02)


def test_the_release_s_flops_in_all_and_without_vae_and_recompute(release: Stage) -> None:
    assert release.flops / 1e9 == pytest.approx(RELEASE, rel=0.02)
    lean = release.flops / 1e9 - _giga(release, "VAE encode", "forward") - _giga(release, "UNet", "recomputed")
    assert lean == pytest.approx(LEAN, rel=0.02)


@pytest.fixture(scope="module")
def smoke() -> config.Config:
    value = profile("smoke")
    # In float32: a processor's autocast keeps other things than the stand-ins' would at equal settings.
    stage1 = value.stage1.model_copy(update={"cache_latents": False, "cache_features": False})
    return value.model_copy(update={"stage1": stage1})


def _real_flops(model: torch.nn.Module, batch: object) -> int:
    # torch's counter passes over a CPU's flash kernel; of plain products it sees all.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        model(batch, torch.Generator().manual_seed(0)).backward()
    return real.get_total_flops()


def test_stage_1_s_flops_are_those_of_the_real_step(smoke: config.Config, paths: Paths) -> None:
    counted = count.stage1(smoke, paths, "cpu")
    model = Autoencoder.build(smoke, paths)
    batch = Stage1Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert counted.flops == _real_flops(model, batch)
    assert counted.learning == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.weights == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("learn", ["mlp", "mlp+llm", "mlp+lora", "mlp+llm+encoder"])
def test_whatever_learns_in_stage_2_is_counted(learn: str, smoke: config.Config, paths: Paths) -> None:
    settings = smoke.model_copy(update={"stage2": smoke.stage2.model_copy(update={"learn": learn})})
    counted = count.stage2(settings, paths, "cpu", caption_tokens=9)
    captioner = Captioner.build(settings, paths)
    ids = torch.ones(1, 9, dtype=torch.long)
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8) if learn == "mlp+llm+encoder" else None
    context = torch.zeros(1, 8, 128) if images is None else None
    assert counted.flops == _real_flops(captioner, Stage2Batch(context, ids, ids, images))
    assert counted.learning == sum(p.numel() for p in captioner.parameters() if p.requires_grad)


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
        }
    )
    counted = count.stage1(settings, paths, "cpu", 2)
    model = Autoencoder.build(settings, paths)
    batch = Stage1Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert counted.flops == _real_flops(model, batch)
    assert counted.weights == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if recompute:
        again = settings.model_copy(
            update={"stage1": settings.stage1.model_copy(update={"gradient_checkpointing": True})}
        )
        assert count.stage1(again, paths, "cpu", 16).live.at(16) < count.stage1(settings, paths, "cpu", 16).live.at(16)


def test_frozen_weights_in_bf16_are_forecast(smoke: config.Config, paths: Paths) -> None:
    stage1 = smoke.stage1.model_copy(update={"precision": "bf16", "frozen_precision": "bf16"})
    counted = count.stage1(smoke.model_copy(update={"stage1": stage1}), paths, "cpu")
    model = Autoencoder.build(smoke, paths)
    blocks.store_frozen_in_bf16(model)
    assert counted.weights == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_what_the_caches_take_is_what_they_hold(paths: Paths, scene_data: Path, tmp_path: Path) -> None:
    smoke = profile("smoke")
    counted = count.stage1(smoke, paths, "cpu")
    model = Autoencoder.build(smoke, paths)
    entries = shards.read_manifest(scene_data).splits["test"].shards

    def compute(x: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, std = model.decoder.encode(x)
        return {"mean": mean, "std": std, "features": model.encoder.features(x)}

    cache = ShardCache(tmp_path, "both", {}, scene_data, "test", compute)
    cache.fill(entries)
    held = sum(t.numel() * t.element_size() for e in entries for t in cache.load(e).values())
    assert counted.stored * sum(e.samples for e in entries) == held


def test_memory_of_a_step_is_what_the_real_step_allocates(smoke: config.Config, paths: Paths) -> None:
    samples = 3
    counted = count.stage1(smoke, paths, "cpu", samples)
    model = Autoencoder.build(smoke, paths)
    batch = Stage1Batch(torch.zeros(samples, 3, 64, 64, dtype=torch.uint8))
    with LiveBytes() as live:
        model(batch, torch.Generator().manual_seed(0)).backward()
    assert counted.live.at(samples) == pytest.approx(live.peak, rel=0.02)


def test_checkpointing_keeps_less_and_computes_more(smoke: config.Config, paths: Paths) -> None:
    stage1 = smoke.stage1.model_copy(update={"gradient_checkpointing": True})
    plain = count.stage1(smoke, paths, "cpu", 32)
    again = count.stage1(smoke.model_copy(update={"stage1": stage1}), paths, "cpu", 32)
    redone = ["BART encoder", "BART decoder", "text encoder", "UNet"]
    twice = sum(m.cost.forward for m in plain.modules if m.cost.name in redone)
    assert again.flops == plain.flops + twice
    assert sum(m.kept.at(4) for m in again.modules) < sum(m.kept.at(4) for m in plain.modules)
    assert again.live.at(32) < plain.live.at(32)


def _machine(**values: object) -> Machine:
    return Machine(**({"gpu": gpus.find("rtx-6000-ada"), "count": 8, "utilisation": 0.5} | values))  # type: ignore[arg-type]


def test_time_and_money(release: Stage) -> None:
    f = forecast(release, _machine(price=0.75), images=10)
    seconds = 200_000 * 512 * release.flops / (8 * 91.1e12 * 0.5)
    assert f.hours == pytest.approx(seconds / 3600)
    assert f.prepare_hours == 0  # nothing is cached in the release's recipe
    assert f.dollars == pytest.approx(f.hours * 8 * 0.75)


def test_memory_by_kind_and_what_sharding_splits(release: Stage) -> None:
    alone = memory(release, 8, 8)
    assert alone.weights == release.weights
    assert (alone.gradients, alone.optimizer) == (4 * release.learning, 8 * release.learning)
    split = memory(release, 8, 8, "zero2")
    assert (split.gradients, split.optimizer) == (release.learning // 2, release.learning)
    assert memory(release, 8, 8, "full").weights < split.weights == alone.weights
    assert memory(release, 8).communication == 0


def test_what_does_not_fit_says_which_knob_helps(release: Stage) -> None:
    settings = release.settings.model_copy(update={"gradient_checkpointing": False, "accumulation": 1})
    whole = Stage(**{**vars(release), "settings": settings})
    f = forecast(whole, _machine(), images=1)
    assert f.micro_batch == 64 and not f.fits and f.memory.peak > 48 * GIB * (1 - RESERVE)
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

"""Every shipped profile fits the GPUs that it names, by its own plan."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT, profile
from vlv import config
from vlv.cli import main as cli
from vlv.config import Compute, ConfigError, LaunchByStage, Paths
from vlv.plan import count, gpus, report
from vlv.plan.step import STAGES
from vlv.training import launch

pytestmark = pytest.mark.slow

PROFILES = config.profiles(Paths(ROOT))
FOR_GPUS = [name for name in PROFILES if profile(name).compute.gpu]


def test_profiles_of_full_size_name_their_gpu() -> None:
    for name in PROFILES:
        parts = profile(name)
        full_size = any(
            part.pretrained.startswith("hf:") for part in (parts.encoder, parts.decoder, parts.language_model)
        )
        assert bool(parts.compute.gpu) == full_size, name


@pytest.mark.parametrize("name", FOR_GPUS)
def test_both_trainings_fit(name: str, paths: Paths) -> None:
    settings = profile(name)
    for stage in STAGES:
        machine = gpus.machine_of(settings, paths, stage)
        section = getattr(settings, stage)
        assert section.batch_size % (section.accumulation * machine.count) == 0, "the step is shared evenly"
        if name == "paper-readme":  # the paper's models: the same micro-batch takes the same memory
            assert machine.micro_batch(settings, stage) == machine.micro_batch(profile("paper"), stage)
            continue
        counted = count.stage(settings, paths, stage, "gpu", machine.micro_batch(settings, stage))
        forecast = report.forecast(counted, machine)
        assert forecast.fits, report.fits(forecast)


def test_counting_other_settings_changes_nothing_else(paths: Paths) -> None:
    smoke = profile("smoke")
    for stage in STAGES:
        alone, whole = (count.stage(smoke, paths, stage, "gpu", 4, knobs=knobs) for knobs in (False, True))
        assert whole.half and whole.with_recomputation
        assert replace(whole, half=None, with_recomputation=None) == alone


def _for(compute: Compute) -> config.Config:
    return profile("smoke").model_copy(update={"compute": compute})


def test_the_machine_is_what_the_configuration_says(paths: Paths, tmp_path: Path) -> None:
    ddp, fsdp = (f"configs/accelerate/{name}.yaml" for name in ("ddp", "fsdp"))
    kept = (
        (ROOT / fsdp).read_text(encoding="utf-8").replace("reshard_after_forward: true", "reshard_after_forward: false")
    )
    zero2 = tmp_path / "zero2.yaml"
    zero2.write_text(kept, encoding="utf-8")
    by_stage = _for(Compute(gpu="L40S", gpus=8, launch=LaunchByStage(stage1=ddp, stage2=fsdp)))
    one, two = (gpus.machine_of(by_stage, paths, stage) for stage in STAGES)
    assert (one.gpu.name, one.count, one.sharding, two.sharding) == ("L40S", 8, "none", "full")
    assert gpus.machine_of(_for(Compute(gpus=8, launch=str(zero2))), paths, "stage1").sharding == "zero2"
    alone = gpus.machine_of(_for(Compute()), paths, "stage1")
    assert (alone.gpu.name, alone.count, alone.sharding) == (gpus.DEFAULT_GPU, 1, "none")
    assert by_stage.compute.launch_of("evaluate") is None
    assert gpus.sharding_of(launch.read_launch_file(ROOT / "configs" / "accelerate" / "cpu-ddp.yaml")) == "none"


def test_a_machine_that_contradicts_itself_is_refused(paths: Paths) -> None:
    with pytest.raises(ConfigError, match=r"compute\.gpus is 4, but configs/accelerate/ddp\.yaml.*num_processes 8"):
        gpus.machine_of(_for(Compute(gpus=4, launch="configs/accelerate/ddp.yaml")), paths, "stage1")
    with pytest.raises(gpus.UnknownGpuError, match="no GPU 'abacus'"):
        gpus.machine_of(_for(Compute(gpu="abacus")), paths, "stage1")


def test_the_plan_takes_the_machine_from_the_profile(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLV_ROOT", str(paths.root))
    named = (ROOT / "configs" / "smoke.yaml").read_text(encoding="utf-8") + "\ncompute: {gpu: L40S, gpus: 2}\n"
    file = tmp_path / "named.yaml"
    file.write_text(named, encoding="utf-8")

    def plan(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.app(["plan", "--config", str(file), "--fit", *arguments], prog_name="vlv")
        return int(ended.value.code or 0), capsys.readouterr().out

    code, told = plan()
    assert code == 0 and "stage1 on 2 x L40S, sharding none, micro-batch 2:" in told and "stage2 on 2 x L40S" in told
    code, told = plan("--gpu", "RTX 4090", "--count", "1", "--sharding", "zero2")
    assert code == 0 and "stage1 on 1 x RTX 4090, sharding zero2, micro-batch 4:" in told
    code, told = plan("--set", "stage2.batch_size=2000000", "--set", "stage2.accumulation=1")
    assert code == 1 and "does not fit" in told

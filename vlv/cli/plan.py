"""`vlv plan` and `vlv rehearse`: what a configuration costs, before it runs."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from vlv import config
from vlv.config import Paths
from vlv.io import files

_ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A profile's file; without: params.yaml.", exists=True)
]
_Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value: stage1.precision=bf16")
]
_Json = Annotated[Path | None, typer.Option(help="Write everything to this file as well.")]


class Sharding(StrEnum):
    """How the GPUs share what a training holds."""

    none = "none"
    zero2 = "zero2"
    full = "full"


def plan(
    config_: _ConfigFile = None,
    gpu: Annotated[str | None, typer.Option(help="Name in the table of GPUs; without: compute.gpu.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="GPUs; without: compute.gpus.")] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the peak rate.")] = 0.35,
    price: Annotated[float | None, typer.Option(min=0.0, help="Dollars for a GPU and hour.")] = None,
    sharding: Annotated[
        Sharding | None,
        typer.Option(help="none: DDP; zero2; full: ZeRO-3 or FSDP; without: as compute.launch says for each stage."),
    ] = None,
    tf32: Annotated[bool, typer.Option(help="Float32 products on the tensor cores.")] = False,
    images: Annotated[int | None, typer.Option(min=1, help="Different images, for the caches' cost.")] = None,
    caption_tokens: Annotated[int | None, typer.Option(min=1, help="Length in Stage 2; without: the limit.")] = None,
    fit_only: Annotated[
        bool,
        typer.Option("--fit", help="Only whether both stages fit; exit code 1 if one does not. Takes half the time."),
    ] = False,
    changes: _Changes = None,
    json: _Json = None,
) -> None:
    """Count FLOPs, memory, time and money of both stages at full size, on no GPU and without weights.

    The GPUs are those that the configuration is for (its section compute), or those of the options.

    [dim]vlv plan --config configs/paper.yaml --price 0.8[/]

    [dim]vlv plan --config configs/paper.yaml --gpu "A100 80GB" --count 4 --fit[/]
    """
    from vlv.plan import count as counts
    from vlv.plan import gpus, machines, report
    from vlv.plan.forecast import Machine, forecast

    paths = Paths.find()
    settings = _settings(paths, config_, changes)

    def machine_of(stage: machines.StageName) -> Machine:
        configured = machines.machine(settings, paths, stage)
        return Machine(
            gpus.find(gpu) if gpu else configured.gpu,
            count or configured.count,
            utilisation,
            price,
            sharding.value if sharding else configured.sharding,
            tf32,
        )

    one, two = machine_of("stage1"), machine_of("stage2")
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    if fit_only:
        found = [machines.fit(settings, paths, "stage1", one), machines.fit(settings, paths, "stage2", two)]
        report.show_fits(found, console)
        raise typer.Exit(int(not all(fit.fits for fit in found)))
    stages = [
        (counts.stage1(settings, paths, "gpu", machines.micro_batch(settings, "stage1", one)), one),
        (counts.stage2(settings, paths, "gpu", machines.micro_batch(settings, "stage2", two), caption_tokens), two),
    ]
    mine, others = [], []
    for stage, machine in stages:
        number = images or stage.settings.steps * stage.samples
        mine.append(forecast(stage, machine, number))
        able = [g for g in gpus.GPUS if g.has(stage.settings.precision, tf32=tf32)]
        others.append([forecast(stage, replace(machine, gpu=g), number) for g in able])
    report.show(mine, others, console)
    if json is not None:
        files.write_json(json, [report.as_json(f) for f in mine])


class TrainingStage(StrEnum):
    """A stage that trains."""

    stage1 = "stage1"
    stage2 = "stage2"


def rehearse(
    config_: _ConfigFile = None,
    stage: Annotated[TrainingStage | None, typer.Option(help="Only this one; without: both.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples on this device at a time.")] = 1,
    changes: _Changes = None,
    json: _Json = None,
) -> None:
    """Do one real step of each stage at full size here: step, checkpoint, resume, one more step; memory, time.

    Weights are new and pictures are noise: nothing is downloaded, nothing is kept. Do it on the machine of a long
    run before the run.

    [dim]vlv rehearse --config configs/paper.yaml --set stage1.precision=bf16[/]
    """
    from vlv.plan import rehearsal, report

    paths = Paths.find()
    settings = _settings(paths, config_, changes)
    functions = {TrainingStage.stage1: rehearsal.stage1, TrainingStage.stage2: rehearsal.stage2}
    done = []
    for name in [stage] if stage else list(TrainingStage):
        done.append(functions[name](settings, paths, samples))
        Console().print(report.rehearsed(done[-1]))
        if json is not None:
            files.write_json(json, [one.as_json() for one in done])


def _settings(paths: Paths, file: Path | None, changes: list[str] | None) -> config.Config:
    """The configuration in `file` (None: params.yaml) with some of its values replaced."""
    settings = config.parse(files.read_text(file), str(file)) if file else config.load(paths)
    value: dict[str, Any] = settings.model_dump(mode="json", by_alias=True)
    for change in changes or []:
        key, equals, given = change.partition("=")
        *sections, last = key.split(".")
        section: Any = value
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict):
            raise config.ConfigError(f"--set takes KEY=VALUE with a key of the configuration, not {change!r}")
        section[last] = files.parse_yaml(given, f"--set {change}", "Correct it.")
    return config.parse(yaml.safe_dump(value), f"the configuration with {', '.join(changes)}") if changes else settings

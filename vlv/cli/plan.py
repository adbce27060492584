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
        typer.Option(
            help="none: DDP; zero2: FSDP with fsdp_reshard_after_forward false; full: FSDP; without: as "
            "compute.launch says for each stage."
        ),
    ] = None,
    tf32: Annotated[bool, typer.Option(help="Float32 products on the tensor cores.")] = False,
    images: Annotated[
        int | None,
        typer.Option(
            min=1, help="Different images, for the cost of the caches; without: as many as the samples of the training."
        ),
    ] = None,
    caption_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length in Stage 2; without: stage2.max_caption_tokens.")
    ] = None,
    fit_only: Annotated[
        bool,
        typer.Option("--fit", help="Say only whether both stages fit; exit code 1 if one does not. Faster."),
    ] = False,
    changes: _Changes = None,
    json: _Json = None,
) -> None:
    """Count FLOPs, memory, time and money of both stages at full size, without a GPU and without weights.

    The GPUs are those of the configuration's section compute, or those of the options.

    [dim]vlv plan --config configs/paper.yaml --price 0.8[/]

    [dim]vlv plan --config configs/paper.yaml --gpu "A100 80GB" --count 4 --fit[/]
    """
    from vlv.plan import count as counts
    from vlv.plan import gpus, report
    from vlv.plan.step import STAGES, StageName

    paths = Paths.find()
    settings = _settings(paths, config_, changes, caption_tokens)

    def machine_of(stage: StageName) -> gpus.Machine:
        configured = gpus.machine_of(settings, paths, stage)
        return gpus.Machine(
            gpus.find(gpu) if gpu else configured.gpu,
            count or configured.count,
            utilisation,
            price,
            sharding.value if sharding else configured.sharding,
            tf32,
        )

    console = Console()
    console = console if console.is_terminal else Console(width=140)
    mine, others = [], []
    for name in STAGES:
        machine = machine_of(name)
        micro_batch = machine.micro_batch(settings, name)
        stage = counts.stage(settings, paths, name, "gpu", micro_batch, knobs=not fit_only)
        mine.append(report.forecast(stage, machine, images))
        able = [kind for kind in gpus.GPUS if kind.has(stage.settings.precision, tf32=tf32)]
        others.append([report.forecast(stage, replace(machine, gpu=kind), images) for kind in able])
    if json is not None:
        files.write_json(json, [report.as_json(f) for f in mine])
    if fit_only:
        for f in mine:
            console.print(report.fits(f), highlight=False)
        raise typer.Exit(int(not all(f.fits for f in mine)))
    report.show(mine, others, console)


class TrainingStage(StrEnum):
    """A stage that trains."""

    stage1 = "stage1"
    stage2 = "stage2"


def rehearse(
    config_: _ConfigFile = None,
    stage: Annotated[TrainingStage | None, typer.Option(help="This stage alone; without: both.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples on this device at a time.")] = 1,
    changes: _Changes = None,
    json: _Json = None,
) -> None:
    """Do two real steps of each stage at full size here, with a checkpoint and a resume: memory and time.

    Weights are new and images are noise: nothing is downloaded, nothing is kept. Run it on the machine of a long run
    before that run.

    [dim]vlv rehearse --config configs/paper.yaml --set stage1.precision=bf16[/]
    """
    from vlv.plan.rehearse import rehearse

    paths = Paths.find()
    settings = _settings(paths, config_, changes)
    done = []
    for name in [stage] if stage else list(TrainingStage):
        done.append(rehearse(settings, paths, name.value, samples))
        Console().print(done[-1].table())
        if json is not None:
            files.write_json(json, [one.as_json() for one in done])


def _settings(
    paths: Paths, file: Path | None, changes: list[str] | None, caption_tokens: int | None = None
) -> config.Config:
    """Read the configuration in `file` (None: params.yaml) and replace some of its values."""
    settings = config.parse(files.read_text(file), str(file)) if file else config.load(paths)
    changes = [*(changes or []), *([f"stage2.max_caption_tokens={caption_tokens}"] if caption_tokens else [])]
    value: dict[str, Any] = settings.model_dump(mode="json", by_alias=True)
    for change in changes:
        key, equals, given = change.partition("=")
        *sections, last = key.split(".")
        section: Any = value
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict):
            raise config.ConfigError(f"--set takes KEY=VALUE with a key of the configuration, not {change!r}")
        section[last] = files.parse_yaml(given, f"--set {change}", "Correct it.")
    return config.parse(yaml.safe_dump(value), f"the configuration with {', '.join(changes)}") if changes else settings

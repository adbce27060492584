"""The memory, time and money that a stage needs on a machine, as tables for a terminal and as JSON."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vlv.plan.count import Stage
from vlv.plan.gpus import Machine
from vlv.plan.memory import GIB, Memory, knobs, memory, usable

_GIGA = 1e9


@dataclass(frozen=True)
class Forecast:
    """The forecast for a stage on a machine.

    Attributes:
        hours: duration of the training.
        prepare_hours: time to fill the caches before it.
        dollars: for both; None without a price.
        cache_bytes: disk space of the caches.
        knobs: sentences that say what each setting would free.
    """

    stage: Stage
    machine: Machine
    memory: Memory
    hours: float
    prepare_hours: float
    dollars: float | None
    cache_bytes: int
    knobs: list[str]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= usable(self.machine.gpu)


def forecast(stage: Stage, machine: Machine, images: int | None = None) -> Forecast:
    """Forecast the stage on the machine; the caches hold `images` different images (None: all samples differ).

    Raises:
        UnknownGpuError: the GPU has no unit for the configured precision.
    """
    s = stage.settings
    images = images or s.steps * stage.samples
    hours = machine.hours(s.steps * stage.samples * stage.flops, s.precision)
    prepare_hours = machine.hours(images * stage.prepared_flops, s.precision)
    return Forecast(
        stage=stage, machine=machine,
        memory=memory(stage, stage.activations, machine.count, machine.sharding),
        hours=hours, prepare_hours=prepare_hours,
        dollars=None if machine.price is None else (hours + prepare_hours) * machine.count * machine.price,
        cache_bytes=images * stage.cached, knobs=knobs(stage, machine),
    )  # fmt: skip


def parts(stage: Stage) -> Table:
    """FLOPs and kept bytes by part."""
    s = stage.settings
    table = Table(title=f"{stage.name}: one sample by part", expand=False, title_justify="left", caption_justify="left")
    table.caption = (
        f"{s.steps:,} steps x {stage.samples} samples, {s.precision}; GF = 10^9 FLOP, a multiply-add is 2; "
        f"kept: for the backward pass, micro-batch {stage.activations.samples}"
    )
    table.add_column("part")
    for name in ("M params", "M trainable", "caches GF", "forward", "recomputed", "backward", "in a step", "kept GiB"):
        table.add_column(name, justify="right")
    for part in stage.parts:
        table.add_row(
            part.name, f"{part.parameters / 1e6:,.1f}", f"{part.trainable / 1e6:,.1f}", _giga(part.prepared),
            _giga(part.forward), _giga(part.recomputed), _giga(part.backward), _giga(part.flops),
            f"{part.kept / GIB:,.2f}",
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "all", "", f"{stage.trainable / 1e6:,.1f}", _giga(stage.prepared_flops), "", "", "", _giga(stage.flops),
        f"{stage.activations.kept / GIB:,.2f}",
    )  # fmt: skip
    return table


def gpus(forecasts: list[Forecast]) -> Table:
    """Memory, time and money of one stage on several kinds of GPU."""
    machine = forecasts[0].machine
    title = f"{forecasts[0].stage.name} on {machine.count} GPUs"
    table = Table(title=title, title_justify="left", caption_justify="left")
    price = "no --price given" if machine.price is None else f"at ${machine.price:.2f} for a GPU hour"
    table.caption = (
        f"GiB on one GPU, sharding {machine.sharding}; time at {machine.utilisation:.0%} of the peak rate, caches "
        f"included; {price}"
    )
    table.add_column("GPU")
    for name in ("weights", "gradients", "optimizer", "buckets", "kept", "peak", "of", "fits", "days", "dollars"):
        table.add_column(name, justify="right")
    for f in forecasts:
        table.add_row(
            f.machine.gpu.name, *(f"{value / GIB:,.1f}" for value in vars(f.memory).values()),
            f"{usable(f.machine.gpu) / GIB:.1f}", "yes" if f.fits else "no",
            f"{(f.hours + f.prepare_hours) / 24:,.1f}", "" if f.dollars is None else f"{f.dollars:,.0f}",
        )  # fmt: skip
    return table


def show(chosen: list[Forecast], others: list[list[Forecast]], console: Console) -> None:
    """Print each stage by part, on all GPUs, and what each setting would free on the chosen GPU."""
    for f, table in zip(chosen, others, strict=True):
        console.print(parts(f.stage))
        console.print(gpus(table))
        if f.cache_bytes:
            console.print(f"  caches: {f.cache_bytes / GIB:,.1f} GiB of disk", highlight=False)
        for knob in f.knobs:
            console.print(f"  {f.machine.gpu.name}: {knob}", highlight=False)
        console.print()


def fits(f: Forecast) -> str:
    """Say in a line whether the stage fits."""
    machine = f.machine
    return (
        f"{f.stage.name} on {machine.count} x {machine.gpu.name}, sharding {machine.sharding}, micro-batch "
        f"{f.stage.activations.samples}: peak {f.memory.peak / GIB:.1f} of {usable(machine.gpu) / GIB:.1f} GiB: "
        f"{'fits' if f.fits else 'does not fit'}"
    )


def as_json(f: Forecast) -> dict[str, Any]:
    """One forecast's values in the tables, in plain units: FLOP, bytes, hours, dollars."""
    gpu, machine, stage = f.machine.gpu, f.machine, f.stage
    return {
        "stage": stage.name,
        "gpu": {"name": gpu.name, "memory_gib": gpu.memory, "source": gpu.source, "count": machine.count},
        "assumed": {"utilisation": machine.utilisation, "price": machine.price, "sharding": machine.sharding},
        "precision": stage.settings.precision,
        "steps": stage.settings.steps, "samples_per_step": stage.samples, "micro_batch": stage.activations.samples,
        "flops_per_sample": stage.flops, "trainable_parameters": stage.trainable,
        "parts": [vars(part) for part in stage.parts],
        "memory": vars(f.memory) | {"usable": usable(gpu)},
        "cache_bytes": f.cache_bytes,
        "fits": f.fits, "hours": f.hours, "prepare_hours": f.prepare_hours, "dollars": f.dollars, "knobs": f.knobs,
    }  # fmt: skip


def _giga(flops: int) -> str:
    return f"{flops / _GIGA:,.0f}" if flops else ""

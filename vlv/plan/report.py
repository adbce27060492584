"""The plan as tables for a terminal and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from vlv.plan.count import Stage
from vlv.plan.forecast import GIB, Forecast, usable
from vlv.plan.machines import Fit
from vlv.plan.rehearsal import Rehearsed

_GIGA = 1e9


def modules(stage: Stage, samples: int) -> Table:
    """FLOPs and kept bytes by module; `samples`: the micro-batch on one GPU."""
    s = stage.settings
    table = Table(
        title=f"{stage.name}: one sample by module", expand=False, title_justify="left", caption_justify="left"
    )
    table.caption = (
        f"{s.steps:,} steps x {stage.samples} samples, {s.precision}; GF = 10^9 FLOP, a multiply-add is 2; "
        f"kept: for the backward pass, micro-batch {samples}"
    )
    table.add_column("module")
    for name in ("M params", "M learn", "forward GF", "recompute", "backward", "in a step", "kept GiB"):
        table.add_column(name, justify="right")
    for m in stage.modules:
        c = m.cost
        once = "once an image" if c.prepared else _giga(c.flops)
        table.add_row(
            c.name, f"{c.parameters / 1e6:,.1f}", f"{c.learning / 1e6:,.1f}", _giga(c.forward), _giga(c.recomputed),
            _giga(c.backward), once, f"{m.kept.at(samples) / GIB:,.2f}",
        )  # fmt: skip
    kept = sum(m.kept.at(samples) for m in stage.modules) / GIB
    table.add_section()
    table.add_row("all", "", f"{stage.learning / 1e6:,.1f}", "", "", "", _giga(stage.flops), f"{kept:,.2f}")
    return table


def gpus(forecasts: list[Forecast]) -> Table:
    """Memory, time and money of one stage on several kinds of GPU."""
    machine = forecasts[0].machine
    title = f"{forecasts[0].stage.name} on {machine.count} GPUs"
    table = Table(title=title, title_justify="left", caption_justify="left")
    price = "no --price given" if machine.price is None else f"at ${machine.price:.2f} a GPU hour"
    table.caption = (
        f"GiB on one GPU, sharding {machine.sharding}; time at {machine.utilisation:.0%} of the peak, caches included; "
        f"{price}"
    )
    table.add_column("GPU")
    names = ("weights", "gradients", "optimizer", "buckets", "kept", "peak", "of", "fits", "days", "dollars")
    for name in names:
        table.add_column(name, justify="right")
    for f in forecasts:
        m = f.memory
        kinds = (m.weights, m.gradients, m.optimizer, m.communication, m.activations, m.peak)
        table.add_row(
            f.machine.gpu.name, *(f"{value / GIB:,.1f}" for value in kinds), f"{usable(f.machine.gpu) / GIB:.1f}",
            "yes" if f.fits else "no", f"{(f.hours + f.prepare_hours) / 24:,.1f}",
            "" if f.dollars is None else f"{f.dollars:,.0f}",
        )  # fmt: skip
    return table


def show(chosen: list[Forecast], others: list[list[Forecast]], console: Console) -> None:
    """Print each stage: by module, on the chosen GPU and on others, and what each knob frees."""
    for f, table in zip(chosen, others, strict=True):
        console.print(modules(f.stage, f.micro_batch))
        console.print(gpus(table))
        if f.cache_bytes:
            console.print(f"  caches: {f.cache_bytes / GIB:,.1f} GiB of disk", highlight=False)
        for knob in f.knobs:
            console.print(f"  {f.machine.gpu.name}: {knob}", highlight=False)
        console.print()


def show_fits(fits: list[Fit], console: Console) -> None:
    """Print whether each stage fits, in a line."""
    for f in fits:
        m = f.machine
        console.print(
            f"{f.stage} on {m.count} x {m.gpu.name}, sharding {m.sharding}: {f.micro_batch} at a time, peak "
            f"{f.peak / GIB:.1f} of {f.usable / GIB:.1f} GiB: {'fits' if f.fits else 'does not fit'}",
            highlight=False,
        )


def as_json(f: Forecast) -> dict[str, Any]:
    """Everything the tables show of one forecast, in plain units: FLOP, bytes, hours, dollars."""
    gpu, m = f.machine.gpu, f.memory
    return {
        "stage": f.stage.name,
        "gpu": {"name": gpu.name, "memory_gib": gpu.memory, "source": gpu.source, "count": f.machine.count},
        "assumed": {"utilisation": f.machine.utilisation, "price": f.machine.price, "sharding": f.machine.sharding},
        "precision": f.stage.settings.precision,
        "steps": f.stage.settings.steps, "samples_per_step": f.stage.samples, "micro_batch": f.micro_batch,
        "flops_per_sample": f.stage.flops, "learning_parameters": f.stage.learning,
        "modules": [
            {
                "name": c.cost.name, "parameters": c.cost.parameters, "learning": c.cost.learning,
                "forward": c.cost.forward, "recomputed": c.cost.recomputed, "backward": c.cost.backward,
                "prepared": c.cost.prepared, "kept_bytes": c.kept.at(f.micro_batch),
            }
            for c in f.stage.modules
        ],
        "memory": {
            "weights": m.weights, "gradients": m.gradients, "optimizer": m.optimizer, "buckets": m.communication,
            "activations": m.activations, "peak": m.peak, "usable": usable(gpu),
        },
        "cache_bytes": f.cache_bytes,
        "fits": f.fits, "hours": f.hours, "prepare_hours": f.prepare_hours, "dollars": f.dollars, "knobs": f.knobs,
    }  # fmt: skip


def _giga(flops: int) -> str:
    return f"{flops / _GIGA:,.0f}" if flops else ""


def rehearsed(done: Rehearsed) -> Table:
    """What a rehearsal took, beside its forecast."""
    table = Table(
        title=f"{done.stage} on {done.device}, {done.samples} at a time", title_justify="left", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    for what, seconds in (
        ("build", done.build), ("first step, counted", done.first_step), ("write checkpoint", done.save),
        ("go on from it", done.resume), ("second step", done.second_step),
    ):  # fmt: skip
        table.add_row(what, f"{seconds:,.1f} s")
    table.add_section()
    table.add_row("checkpoint", f"{done.checkpoint / GIB:,.2f} GiB")
    table.add_row("peak of the second step", f"{done.peak / GIB:,.2f} GiB")
    table.add_row(
        "forecast", f"{done.expected / GIB:,.2f} GiB; the peak is {done.peak / done.expected - 1:+.1%} from it"
    )
    table.add_row("peak while writing", f"{done.saving_peak / GIB:,.2f} GiB")
    return table

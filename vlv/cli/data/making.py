"""`vlv data download`, `select` and `verify`: the data that params.yaml describes, and a choice from LAION."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vlv import config
from vlv.config import Config, Paths


def download(
    if_missing: Annotated[
        bool,
        typer.Option(
            "--if-missing",
            help="Keep data of these settings, even if it is damaged (`data verify` finds damage).",
        ),
    ] = False,
) -> None:
    """Fetch the assets and make the data that params.yaml describes. Damaged data is made again.

    If the settings differ from those in data.dvc, the new data is pinned. [dim]vlv data download[/]
    """
    from vlv.data import sources

    paths = Paths.find()
    chosen = config.load(paths)
    _fetch_assets(chosen, paths)
    if if_missing and _is_there(chosen, paths):
        typer.echo("The data is there; to check that it is intact: vlv data verify")
    else:
        typer.echo(_counts(sources.materialise(chosen.data, paths, paths.data, _Progress())))
    _pin_if_other(paths)


def verify() -> None:
    """Compare every shard with the manifest, and the whole of data/ with data.dvc. Writes nothing."""
    from vlv.data import shards
    from vlv.io import pin

    paths = Paths.find()
    pointer = paths.root / pin.POINTER
    pinned = pointer.exists()
    shards.verify(paths.data, pointer if pinned else None)
    against = f"its manifest and {pointer.name}" if pinned else "its manifest (nothing is pinned yet)"
    typer.echo(f"{_counts(shards.read_manifest(paths.data))}: as in {against}")


def _is_there(chosen: Config, paths: Paths) -> bool:
    """Whether data/ holds data of these settings, intact or not."""
    from vlv.data import shards, sources

    if not paths.data.exists():
        return False
    try:
        source = shards.read_manifest(paths.data).source
    except shards.DataError:
        return True  # damaged: it is repaired only without --if-missing
    wanted = sources.describe(chosen.data)
    return {key: source.get(key) for key in wanted} == wanted


def _pin_if_other(paths: Paths) -> None:
    """Pin the data if it was made from other settings than the pinned data. Damaged data is never pinned."""
    from vlv.data import shards
    from vlv.io import pin

    pointer = paths.root / pin.POINTER
    try:
        source = shards.read_manifest(paths.data).source
        if pin.is_needed(paths, source):
            shards.verify(paths.data, None)
            pin.add(paths, source)
            typer.echo(f"Pinned in {pin.POINTER} (commit it)")
        elif pointer.exists() and (paths.root / ".dvc").is_dir() and not pin.is_cached(paths):
            shards.verify(paths.data, pointer)  # a fresh clone made the pinned data again; now DVC's cache gets it
            pin.cache(paths)
    except shards.DataError:
        return  # `data verify` says what is wrong


def _fetch_assets(chosen: Config, paths: Paths) -> None:
    """Fetch everything that a later stage needs, so that a network that fails stops the run here."""
    from vlv.io import assets

    for reference in _references(chosen):
        assets.resolve(reference, paths)
        typer.echo(f"asset {reference}")


def _references(chosen: Config) -> list[str]:
    """References in the configuration to things outside the project folder."""
    loaded = [part.pretrained for part in (chosen.encoder, chosen.decoder, chosen.language_model)
              if part.weights == "pretrained"]  # fmt: skip
    named = [*loaded, chosen.evaluate.feature_network, chosen.evaluate.sentence_model, *chosen.data.source.assets]
    return [one for one in named if one and one.startswith(("wheel:", "hf:"))]


def _counts(manifest: Any) -> str:
    return ", ".join(f"{split} {entry.samples}" for split, entry in manifest.splits.items()) + " samples"


class _Progress:
    """Shows the library's progress calls (what, done, total) as one meter for each thing that is made."""

    def __init__(self) -> None:
        self._what, self._done = "", 0
        self._meter: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        from vlv.io.progress import Meter

        if what != self._what:
            self._what, self._done = what, 0
            self._meter = Meter(f"data: {what}", total)
            self._meter.__enter__()
        self._meter.advance(done - self._done)
        self._done = done
        if done >= total:
            self._meter.__exit__(None, None, None)


_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def _by_reason(texts: list[str]) -> dict[str, int]:
    """{"6M": 6_000_000, ...} of "40M,18M" and the like."""
    counts: dict[str, int] = {}
    for text in (one.strip() for several in texts for one in several.split(",")):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text, re.IGNORECASE)
        count = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
        if not count:
            raise typer.BadParameter(f"{text!r} is not a count such as 600000, 600K or 40M")
        counts[text.upper()] = count
    return counts


def select(
    metadata: Annotated[
        list[Path],
        typer.Argument(metavar="METADATA...", help="LAION's parquet files, or folders of them.", exists=True),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the URL lists. It replaces an earlier selection.")
    ],
    count: Annotated[
        list[str], typer.Option(help="Sizes of the subsets, such as 40M,18M,6M. Each subset contains the smaller ones.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the random choice. The same seed chooses the same images.")] = 0,
    side_above: Annotated[int, typer.Option(min=0, help="The shorter side must be longer than this, in pixels.")] = 512,
    aspect_low: Annotated[float, typer.Option(min=0, help="Smallest width / height.")] = 0.5,
    aspect_high: Annotated[float, typer.Option(min=0, help="Largest width / height.")] = 2.0,
    watermark_below: Annotated[
        float, typer.Option(min=0, help="The probability of a watermark must be below this.")
    ] = 0.5,
    unsafe_below: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The probability of unsafe content must be below this. Without it: not checked, as in the paper.",
        ),
    ] = None,
    images: Annotated[Path, typer.Option(help="Folder that the printed commands download to.")] = Path("images"),
) -> None:
    """Choose images of LAION-2B-en-aesthetic by their metadata, before anything is downloaded.

    The defaults are the paper's: shorter side above 512, aspect ratio 0.5 to 2, watermark probability below 0.5. The
    report selection.json counts the rows that are left out, by reason. Then the command prints how to download the
    images with img2dataset, which needs an environment of its own. `vlv data import` reads the result.

    [dim]vlv data select laion2B-en-aesthetic -o urls --count 40M,18M,6M --seed 1[/]
    """
    from vlv.data.laion import subsets
    from vlv.data.laion.criteria import Criteria

    counts = _by_reason(count)
    criteria = Criteria(side_above, aspect_low, aspect_high, watermark_below, unsafe_below)
    found = subsets.select(metadata, output, counts, seed, criteria)
    typer.echo(f"read {found.read:,}")
    for reason, number in found.dropped.items():
        typer.echo(f"  {reason} {number:,}")
    for subset in found.subsets:
        typer.echo(f"{subset.name}: {subset.rows:,} URLs, {subset.new:,} of them in {output / subset.name}")
        if subset.rows < subset.count:
            typer.secho(
                f"{subset.name}: {subset.count - subset.rows:,} fewer than you asked for", fg="yellow", err=True
            )
    data = config.load(Paths.find()).data
    typer.echo(f"Report: {output / subsets.REPORT}. To download (in an environment of its own):\n")
    typer.echo(subsets.install_command())
    for command in subsets.download_commands(output, images, found, max(data.image_size, data.gate.min_side)):
        typer.echo("\n" + command)
    names = [subset.name for subset in found.subsets]
    typer.echo(
        f"\nThen: vlv data import {images}" + (f" (only {names[0]}: {images / names[0]})" if len(names) > 1 else "")
    )

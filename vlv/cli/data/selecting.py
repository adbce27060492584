"""`vlv data select`: choose the images of LAION to download."""

import re
from pathlib import Path
from typing import Annotated

import typer

from vlv import config
from vlv.config import Paths

_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def _counts(texts: list[str]) -> dict[str, int]:
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

    counts = _counts(count)
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

"""`vlv data import`: images of one's own, or a public set, become data/."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlv import config
from vlv.config import Encoding, Paths
from vlv.data.readers.formats import FORMATS, Rule

FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar=f"[{'|'.join(FORMATS)}]",
        help="What SOURCE is. Without it the format is guessed, and the guess is printed.",
    ),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option("--images", help="The folder of images, where a file names them; without: looked for beside it."),
]
ImageColumnOption = Annotated[
    str | None,
    typer.Option("--image-column", help="The column of images, or of their file names; without: guessed."),
]


def import_images(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Folder or file of one of the forms below, or hf:datasets/OWNER/NAME@REVISION."
        ),
    ],
    format_: FormatOption = None,
    images: ImagesOption = None,
    image_column: ImageColumnOption = None,
    caption_column: Annotated[
        str | None,
        typer.Option(help='The column of captions; without: guessed. "none": there are none, do not ask for them.'),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="captions.parquet of `vlv data caption`: goes before the source's own captions.")
    ] = None,
    rule: Annotated[
        Rule,
        typer.Option("--caption-rule", help="Which of several captions of an image; the rest is kept in its JSON."),
    ] = "seeded",
    encoding: Annotated[
        Encoding, typer.Option("--store", help="png: lossless, same bytes everywhere. jpeg: quality 95, much smaller.")
    ] = "png",
    validation: Annotated[float, typer.Option(min=0, max=0.5, help="Share held out for validation.")] = 0.02,
    test: Annotated[float, typer.Option(min=0, max=0.5, help="Share held out for the test.")] = 0.08,
    seed: Annotated[int, typer.Option(help="Of the splits, the order and the choice of captions.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode; without: one for each processor.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished import of something else.")] = False,
    description: Annotated[str | None, typer.Option(help="Where the images come from; shown in reports.")] = None,
) -> None:
    """Replace data/ by other images, cut to squares of data.image_size, and pin it.

    SOURCE is one of:

    - [bold]folder[/]: images at any depth, with NAME.txt, NAME.caption or NAME.json beside them if there are captions

    - [bold]imagefolder[/]: Hugging Face's: images with metadata.csv, .jsonl or .parquet

    - [bold]table[/]: a .csv, .tsv, .jsonl or .json that names image files and says what they show

    - [bold]llava[/]: LLaVA's JSON of conversations, or its folder

    - [bold]img2dataset[/]: its output, tars or files (also other webdataset tars with images, txt, json; tar.gz)

    - [bold]parquet[/]: files with images (or their names) and captions; or a data set of the Hugging Face hub, by name

    - [bold]arrow[/]: what `datasets`' save_to_disk wrote

    - [bold]coco[/]: a captions annotations file, or the folder with annotations and images

    - [bold]shards[/]: another data folder of ours; its splits stay as they are

    Each image left out is named by a reason and counted. Where a source holds captions and none of them is found, the
    command stops with a question. A killed import goes on where it was, with the same result.
    The profile comes first, since it says how large the images are cut: [bold]vlv config use photos[/]

    [dim]vlv data import ~/photos[/]

    [dim]vlv data import annotations/captions_train2017.json --images train2017[/]

    [dim]vlv data import hf:datasets/OWNER/NAME@REVISION --caption-column caption[/]
    """
    from vlv.data.import_.importer import Wanted, import_images
    from vlv.data.import_.recipe import Recipe, Shares
    from vlv.data.readers.formats import ReadOptions
    from vlv.io import assets, pin
    from vlv.stages import words

    paths = Paths.find()
    settings = config.load(paths)
    data = settings.data
    place = assets.resolve(source, paths) if source.startswith("hf:") else Path(source).expanduser()
    chosen = tell_format(place, format_)
    wanted = Wanted(
        Recipe(data.image_size, data.gate.min_side, data.gate.max_aspect, encoding, data.resize),
        data.shard_size,
        Shares(validation, test, seed),
        ReadOptions(chosen, images, image_column, caption_column, rule, seed),
        captions,
        description or (source if source.startswith("hf:") else None),
    )
    report = import_images(place, paths.data, wanted, workers=workers, restart=restart)
    _tell(report)
    if told := words.misfit(settings, paths):
        typer.secho(told, fg="yellow", err=True)
    if (paths.root / ".dvc").is_dir():
        pin.add(paths, report.manifest.source)
        typer.echo(f"Pinned in {pin.POINTER} (commit it)")
    if data.source.kind != "imported":
        typer.echo(
            f"params.yaml is the profile {settings.profile}, whose data is made here: the next run would replace these "
            "images. For own ones: vlv config use photos, then the same import again (or data.source: {kind: imported} "
            "in params.yaml)."
        )


def tell_format(source: Path, asked: str | None) -> str:
    """The format that was asked for, or a guess, which is printed."""
    from vlv.data.readers import formats

    if asked is not None and asked not in formats.FORMATS:
        raise typer.BadParameter(f"{asked!r} is none of {', '.join(formats.FORMATS)}", param_hint="--format")
    if asked is not None:
        return asked
    guessed = formats.guess(source)
    typer.echo(f"Reading {source} as {guessed} (if it is something else: --format)")
    return guessed


def _tell(report: Any) -> None:
    for note in report.notes:
        typer.secho(f"{note.path}: {note.reason}: {note.message}", fg="yellow", err=True)
    typer.echo(", ".join(f"{name} {count}" for name, count in report.counts().items()))
    counts = {name: split.samples for name, split in report.manifest.splits.items()}
    typer.echo(", ".join(f"{name} {count}" for name, count in counts.items()) + " samples")
    if report.tally.dropped.total() > len(report.notes):
        typer.echo("All that were left out, with their reasons: data/train/samples.parquet, column status")

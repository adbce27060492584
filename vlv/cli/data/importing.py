"""`vlv data import`: your own images, or a public set, become data/."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlv import config
from vlv.config import Config, Encoding, Paths
from vlv.data.readers.formats import FORMATS, Rule

# Options that `vlv data caption` has too.
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
    typer.Option("--images", help="Folder of the images that a file names. Without it we look beside the file."),
]
ImageColumnOption = Annotated[
    str | None,
    typer.Option("--image-column", help="Column of the images or of their file names. Without it we guess."),
]

_Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="Folder or file of a form below, or hf:datasets/OWNER/NAME@REVISION."),
]
_CaptionColumn = Annotated[
    str | None,
    typer.Option(help='Column of the captions. Without it we guess. "none": the source has no captions.'),
]
_Captions = Annotated[
    Path | None,
    typer.Option(help="captions.parquet of `vlv data caption`; it has priority over the captions of the source."),
]
_Rule = Annotated[
    Rule,
    typer.Option("--caption-rule", help="Which of several captions of an image is used. Its JSON keeps the others."),
]
_Store = Annotated[
    Encoding,
    typer.Option("--store", help="png: lossless, the same bytes everywhere. jpeg: quality 95, much smaller."),
]
_Validation = Annotated[float, typer.Option(min=0, max=0.5, help="Share of the images for validation.")]
_Test = Annotated[float, typer.Option(min=0, max=0.5, help="Share of the images for the test.")]
_Seed = Annotated[int, typer.Option(help="Seed of the splits, the order and the choice of captions.")]
_Workers = Annotated[int | None, typer.Option(min=1, help="Threads that decode. Without it: one for each processor.")]
_Restart = Annotated[bool, typer.Option("--restart", help="Discard an unfinished import of something else.")]
_Description = Annotated[str | None, typer.Option(help="Where the images come from. Reports show it.")]

HELP = """Replace data/ with other images, cut to squares of data.image_size, and pin it.

SOURCE is one of:

- [bold]folder[/]: images at any depth; a caption is in NAME.txt, NAME.caption or NAME.json beside its image

- [bold]imagefolder[/]: the form of Hugging Face: images with metadata.csv, .jsonl or .parquet

- [bold]table[/]: a .csv, .tsv, .jsonl or .json file with names of image files and their captions

- [bold]llava[/]: LLaVA's JSON file of conversations, or the folder that holds it

- [bold]img2dataset[/]: its output, as tars or files; also other webdataset tars (.tar.gz too)

- [bold]parquet[/]: files with images (or their names) and captions; also a data set of the Hugging Face hub

- [bold]arrow[/]: what save_to_disk of `datasets` wrote

- [bold]coco[/]: a file of caption annotations, or the folder that holds annotations and images

- [bold]shards[/]: another data folder of this project; its splits stay as they are

The command counts each image that it leaves out, with the reason. If a source holds captions and none of them can
be found, it stops and asks. After a kill the same command continues, with the same result.
Choose the profile first, because it says how large the images are cut: [bold]vlv config use photos[/]

[dim]vlv data import ~/photos[/]

[dim]vlv data import annotations/captions_train2017.json --images train2017[/]

[dim]vlv data import hf:datasets/OWNER/NAME@REVISION --caption-column caption[/]
"""


def import_images(
    source: _Source,
    format_: FormatOption = None,
    images: ImagesOption = None,
    image_column: ImageColumnOption = None,
    caption_column: _CaptionColumn = None,
    captions: _Captions = None,
    rule: _Rule = "seeded",
    encoding: _Store = "png",
    validation: _Validation = 0.02,
    test: _Test = 0.08,
    seed: _Seed = 0,
    workers: _Workers = None,
    restart: _Restart = False,
    description: _Description = None,
) -> None:
    """Replace data/ with other images; `HELP` says how."""
    from vlv.data.import_ import importer, recipe
    from vlv.data.readers.formats import ReadOptions
    from vlv.io import assets

    paths = Paths.find()
    settings = config.load(paths)
    data = settings.data
    place = assets.resolve(source, paths) if source.startswith("hf:") else Path(source).expanduser()
    wanted = importer.Wanted(
        recipe.Recipe(data.image_size, data.gate.min_side, data.gate.max_aspect, encoding, data.resize),
        data.shard_size,
        recipe.Shares(validation, test, seed),
        ReadOptions(tell_format(place, format_), images, image_column, caption_column, rule, seed),
        captions,
        description or (source if source.startswith("hf:") else None),
    )
    report = importer.import_images(place, paths.data, wanted, workers=workers, restart=restart)
    _tell(report)
    _finish(settings, paths, report.manifest.source)


def tell_format(source: Path, asked: str | None) -> str:
    """The format that was asked for, or a guess, which is printed."""
    from vlv.data.readers import formats

    if asked is not None and asked not in FORMATS:
        raise typer.BadParameter(f"{asked!r} is none of {', '.join(FORMATS)}", param_hint="--format")
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
        typer.echo("data/train/samples.parquet lists all that were left out; the reason is in the column status")


def _finish(settings: Config, paths: Paths, source: dict[str, Any]) -> None:
    """Say whether the captions fit the language model, pin the data, and say whether the profile fits the data."""
    from vlv.io import pin
    from vlv.stages import words

    if told := words.misfit(settings, paths):
        typer.secho(told, fg="yellow", err=True)
    if (paths.root / ".dvc").is_dir():
        pin.add(paths, source)
        typer.echo(f"Pinned in {pin.POINTER} (commit it)")
    if settings.data.source.kind != "imported":
        typer.echo(
            f"params.yaml holds the profile {settings.profile}, whose data is made here: the next run would replace "
            "these images. For your own images: vlv config use photos, then the same import again (or data.source: "
            "{kind: imported} in params.yaml)."
        )

"""`vlv data caption`: captions from a large model behind an OpenAI-compatible endpoint."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlv.cli.data.importing import FormatOption, ImageColumnOption, ImagesOption, tell_format
from vlv.io import files


def caption(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Images, in any form that `vlv data import` reads; also data/ itself.", exists=True
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the journal and captions.parquet.")],
    base_url: Annotated[str, typer.Option(help="Address of the endpoint, such as http://localhost:8000/v1")],
    model: Annotated[str, typer.Option(help="The model's name there.")],
    key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the key.")
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text file with the instruction; without: our own.")
    ] = None,
    price_in: Annotated[float, typer.Option(min=0, help="Price of a million prompt tokens.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="Price of a million completion tokens.")] = 0.0,
    cap: Annotated[
        float | None, typer.Option(min=0, help="Stop before the captions in this folder have cost more.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=512, help="Requests at a time.")] = 8,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one request.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="More attempts for an image that gets no answer.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a caption; one that is cut there is not used.")] = 400,
    longest_side: Annotated[
        int, typer.Option(min=32, help="Pixels; larger images are scaled down before they are sent.")
    ] = 1024,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about so many images, to see what it costs.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Ask again where the answer was refused, empty or cut.")
    ] = False,
    sidecars: Annotated[
        bool, typer.Option("--sidecars", help="folder: also write NAME.txt beside each image.")
    ] = False,
    extra: Annotated[str, typer.Option(help="JSON merged into each request; null removes a field.")] = "{}",
    format_: FormatOption = None,
    images: ImagesOption = None,
    image_column: ImageColumnOption = None,
) -> None:
    """Caption images with a model behind an OpenAI-compatible endpoint: a hosted one, or your own vLLM.

    Every answer goes into a journal before anything else, so a kill loses nothing that was paid for, and no image is
    asked about twice. Refusals, empty and cut answers are counted and listed in unusable.jsonl, never used. Exit code
    1: some images are left (the cap, the limit, failures); run the same command again.

    [dim]vlv data caption photos -o captions --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct[/]

    [dim]vlv data caption images -o captions --base-url https://.../v1 --model NAME --key-env API_KEY --price-in 0.1
    --price-out 0.4 --cap 25[/]

    [dim]vlv data import photos --captions captions/captions.parquet[/]
    """
    from vlv.data.caption_api.budget import Prices
    from vlv.data.caption_api.client import PROMPT, Question
    from vlv.data.caption_api.relabel import CaptionOptions, caption_images
    from vlv.data.readers.formats import ReadOptions

    if cap is not None and not (price_in or price_out):
        raise typer.BadParameter("a cap needs the prices: --price-in and --price-out, for a million tokens each")
    text = PROMPT if prompt is None else files.read_text(prompt).strip()
    reading = ReadOptions(tell_format(source, format_), images, image_column, "none")
    question = Question(
        base_url, model, text, _key(key_env), max_tokens, _extra(extra), timeout=timeout, retries=retries
    )
    prices = Prices(price_in, price_out)
    options = CaptionOptions(question, prices, cap, concurrency, longest_side, limit, again, sidecars, reading)
    report = caption_images(source, output, options)
    _tell(report, output)
    raise typer.Exit(0 if report.complete else 1)


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise typer.BadParameter(f"the environment variable {name} is not set", param_hint="--key-env")
    return key


def _extra(text: str) -> dict[str, Any]:
    try:
        value = files.parse_json(text, "the text", "Correct it.")
    except files.FileError as error:
        raise typer.BadParameter(str(error), param_hint="--extra") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("a JSON object is needed", param_hint="--extra")
    return value


def _tell(report: Any, output: Path) -> None:
    for name, reason, message in report.notes:
        typer.secho(f"{name}: {reason}: {message[:200]}", fg="yellow", err=True)
    typer.echo(", ".join(f"{name} {count}" for name, count in sorted(report.counts.items())) or "no images")
    prompt, completion = report.tokens
    typer.echo(f"tokens {prompt:,} in, {completion:,} out; cost of all runs {report.cost:.4f}")
    made = report.exported
    if made is not None:
        typer.echo(f"{made.captions} captions in {output / 'captions.parquet'}")
        if made.unusable:
            listed = ", ".join(f"{kind} {count}" for kind, count in made.unusable.items())
            typer.echo(f"{listed}: listed in {output / 'unusable.jsonl'}; ask again with --again")
        if made.sidecars or made.sidecars_there:
            typer.echo(f"{made.sidecars} texts written beside images, {made.sidecars_there} others left as they were")
    if report.stopped:
        typer.echo(f"Stopped: {report.stopped}")
    if not report.complete:
        typer.echo("Some images are left: run the same command again")

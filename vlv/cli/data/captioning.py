"""`vlv data caption`: captions from a large model behind an OpenAI-compatible API."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlv.cli.data.importing import FormatOption, ImageColumnOption, ImagesOption, tell_format
from vlv.io import files

_Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="Images, in any form that `vlv data import` reads; also data/ itself.", exists=True
    ),
]
_Output = Annotated[Path, typer.Option("-o", "--output", help="Folder for the journal and captions.parquet.")]
_BaseUrl = Annotated[str, typer.Option(help="Address of the endpoint, such as http://localhost:8000/v1")]
_Model = Annotated[str, typer.Option(help="The model's name there.")]
_KeyEnv = Annotated[str | None, typer.Option(metavar="NAME", help="Environment variable that holds the key.")]
_Prompt = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Text file with the instruction. Without it: our own instruction."),
]
_PriceIn = Annotated[float, typer.Option(min=0, help="Price of a million prompt tokens.")]
_PriceOut = Annotated[float, typer.Option(min=0, help="Price of a million completion tokens.")]
_Cap = Annotated[
    float | None, typer.Option(min=0, help="Stop before the cost of all captions in the output folder exceeds this.")
]
_Concurrency = Annotated[int, typer.Option(min=1, max=512, help="Requests at a time.")]
_Timeout = Annotated[float, typer.Option(min=1, help="Seconds for one request.")]
_Retries = Annotated[int, typer.Option(min=0, help="Further attempts for an image that got no answer.")]
_MaxTokens = Annotated[int, typer.Option(min=1, help="Longest caption, in tokens. A caption that is cut is not used.")]
_LongestSide = Annotated[int, typer.Option(min=32, help="Pixels. Larger images are scaled down before they are sent.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Ask about this many images only, to see the cost.")]
_Again = Annotated[bool, typer.Option("--again", help="Ask again if the answer was refused, empty or cut.")]
_Sidecars = Annotated[
    bool, typer.Option("--sidecars", help="Also write NAME.txt beside each image (for the format folder).")
]
_Extra = Annotated[str, typer.Option(help="JSON that is merged into each request; null removes a field.")]


def caption(
    source: _Source,
    output: _Output,
    base_url: _BaseUrl,
    model: _Model,
    key_env: _KeyEnv = None,
    prompt: _Prompt = None,
    price_in: _PriceIn = 0.0,
    price_out: _PriceOut = 0.0,
    cap: _Cap = None,
    concurrency: _Concurrency = 8,
    timeout: _Timeout = 120.0,
    retries: _Retries = 8,
    max_tokens: _MaxTokens = 400,
    longest_side: _LongestSide = 1024,
    limit: _Limit = None,
    again: _Again = False,
    sidecars: _Sidecars = False,
    extra: _Extra = "{}",
    format_: FormatOption = None,
    images: ImagesOption = None,
    image_column: ImageColumnOption = None,
) -> None:
    """Caption images with a model behind an OpenAI-compatible API: a hosted one, or your own vLLM.

    The command writes every answer to a journal first. So a kill loses no answer that was paid for, and no image is
    asked about twice. Refusals, empty answers and cut answers never become captions: they are counted and listed in
    unusable.jsonl. Exit code 1: some images have no answer yet (the cap, the limit, failures); run the same command
    again.

    [dim]vlv data caption photos -o captions --base-url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct[/]

    [dim]vlv data caption images -o captions --base-url https://.../v1 --model NAME --key-env API_KEY --price-in 0.1
    --price-out 0.4 --cap 25[/]

    [dim]vlv data import photos --captions captions/captions.parquet[/]
    """
    from vlv.data.caption_api import client, relabel
    from vlv.data.caption_api.budget import Prices
    from vlv.data.readers.formats import ReadOptions

    if cap is not None and not (price_in or price_out):
        raise typer.BadParameter("a cap needs the prices of a million tokens: --price-in and --price-out")
    text = client.PROMPT if prompt is None else files.read_text(prompt).strip()
    reading = ReadOptions(tell_format(source, format_), images, image_column, "none")
    question = client.Question(
        base_url, model, text, _key(key_env), max_tokens, _extra(extra), timeout=timeout, retries=retries
    )
    prices = Prices(price_in, price_out)
    options = relabel.CaptionOptions(question, prices, cap, concurrency, longest_side, limit, again, sidecars, reading)
    report = relabel.caption_images(source, output, options)
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
            typer.echo(f"{listed}: listed in {output / 'unusable.jsonl'}; to ask again: --again")
        if made.sidecars or made.sidecars_there:
            typer.echo(
                f"{made.sidecars} texts written beside images, {made.sidecars_there} other texts left as they were"
            )
    if report.stopped:
        typer.echo(f"Stopped: {report.stopped}")
    if not report.complete:
        typer.echo("Some images have no answer yet: run the same command again")

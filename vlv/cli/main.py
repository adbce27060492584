"""The command line: each command reads the configuration, calls one function and prints the result.

Heavy modules are imported inside the commands, so that `vlv --help` is instant. One of the library's own errors
is shown as its message, with exit code 2; only a bug shows a traceback.
"""

import errno
import logging
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vlv import __version__, stages
from vlv.cli import data as cli_data
from vlv.cli import models as cli_models
from vlv.cli import plan as cli_plan
from vlv.config import Paths
from vlv.io import stopping, telemetry

# Exit codes of the library's errors; those not listed have ANSWER.
ANSWER = 2
_SHOWN = 20  # failed images shown on the screen; a file lists all
# Exit codes of commands that process many images.
SOME_FAILED, ALL_FAILED = 4, 5
EXIT_CODES = {
    "vlv.registry.promotion.PromotionRefused": 3,  # not a failure: the model is not good enough
    "vlv.io.stopping.Stopped": 128 + signal.SIGTERM,  # asked to stop; the state is saved
}
_QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "TOKENIZERS_PARALLELISM": "false",
}


class App(typer.Typer):
    """A Typer application that ends with a message if the library raised one of its own errors."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            if not is_answer(error):
                raise
            console = Console(stderr=True)
            console.print("[bold red]Error:[/] ", end="")
            said = _about_file(error) if isinstance(error, OSError) else str(error)
            console.print(said, style="red", markup=False, highlight=False, soft_wrap=True)
            kind = type(error)
            sys.exit(EXIT_CODES.get(f"{kind.__module__}.{kind.__qualname__}", ANSWER))


def is_answer(error: Exception) -> bool:
    """Whether the message is for the user: the library's own errors name cause and remedy, the system's a file."""
    kind = type(error)
    if isinstance(error, OSError) and error.filename is not None:
        return True
    return kind.__module__.partition(".")[0] == "vlv" and not kind.__name__.startswith("_")


def _about_file(error: OSError) -> str:
    """The system's message about a file: a full disk, no permission, a folder where a file should be."""
    where = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else str(error.filename)
    remedy = "Make room on its disk" if error.errno == errno.ENOSPC else "Mend that"
    return f"{where}: {error.strerror}. {remedy}, and run the command again."


app = App(
    name="vlv",
    help="Vision-Language-Vision: distil a frozen text-to-image model into a captioner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="The whole pipeline: make full-train, or python -m flows.full_train",
)
config_app = typer.Typer(no_args_is_help=True, help="The active configuration, params.yaml.")
app.add_typer(config_app, name="config")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_models.app, name="convert")
for _command in (cli_plan.plan, cli_plan.rehearse, cli_models.promote, cli_models.rollback, cli_models.models):
    app.command()(_command)


@app.callback()
def _begin() -> None:
    telemetry.off()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("vlv").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, stopping.terminated)


_Images = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images, or one image.", exists=True)]
_Model = Annotated[str | None, typer.Option(help="models:/NAME@ALIAS or a folder; default: the champion.")]


class Part(StrEnum):
    """A part of the tiny profile that is pretrained here."""

    recogniser = "recogniser"
    teacher = "teacher"
    encoder = "encoder"
    lm = "lm"


StageName = StrEnum("StageName", [(name, name) for name in stages.NAMES])  # type: ignore[misc]  # not read by mypy


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command()
def run(
    stage: Annotated[StageName, typer.Argument(help="The stage to run.")],
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="Continue an unfinished training that other code began; its figures record the difference.",
        ),
    ] = False,
) -> None:
    """Run one stage, stale or not. [dim]To run only what is stale: dvc repro STAGE[/]"""
    if adopt:
        from vlv.stages import adoption

        typer.echo(f"Continuing {adoption.adopt(stage.value, Paths.find())}")
    stopping.end_with_dvc()
    stages.run(stage.value, Paths.find())


@app.command()
def pretrain(
    part: Annotated[Part, typer.Argument(help="Which of the tiny profile's parts.")],
) -> None:
    """Train one of the tiny profile's pretrained parts from scratch into pretrained/tiny/, and print how good it is.

    [dim]vlv pretrain encoder[/]
    """
    from vlv.tiny import pretrain as pretraining

    for name, value in pretraining.run(part.value, Paths.find()).items():
        typer.echo(f"{name} {value:.4g}")


@app.command()
def caption(
    folder: _Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file: image name -> caption.")],
    model: _Model = None,
    beams: Annotated[int | None, typer.Option(min=1, help="1: greedy; default: as saved with the model.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="For each caption; default: the model's own.")] = None,
    clean_up: Annotated[
        bool | None,
        typer.Option("--clean-up/--as-written", help="Cut at the last full stop and drop repeated sentences, or not."),
    ] = None,
) -> None:
    """Caption every image of a folder. Captions are saved as they are written; a killed run continues from there.

    A file that cannot be read is named on the screen and in OUTPUT.failures.jsonl; the same command tries it again.
    Exit code 0: all images have a caption; 4: some have none; 5: none has. A name that is not UTF-8 is written with
    JSON escapes for its bytes; Python's os.fsencode restores them.

    [dim]vlv caption photos -o captions.json[/]
    """
    from vlv import inference

    asked = {"beams": beams, "max_tokens": max_tokens, "clean_up": clean_up}
    writing = {key: value for key, value in asked.items() if value is not None}
    report = inference.caption_folder(Paths.find(), folder, output, model=model, writing=writing)
    _tell(report, f"{report.done} captions in {output}")


@app.command()
def reconstruct(
    folder: _Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for reconstructions and figures.")],
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels; default: the model's own.")] = None,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance.")] = 2.0,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 42,
    model: _Model = None,
) -> None:
    """Reconstruct every image of a folder from its caption embeddings: alone, side by side, and with figures.

    A file that cannot be read is named on the screen and in failures.jsonl. Exit code 0: all images are drawn; 4: some
    are not; 5: none is.

    [dim]vlv reconstruct photos -o reconstructed --steps 20[/]
    """
    from vlv import inference

    report = inference.reconstruct_folder(
        Paths.find(), folder, output, size=size, guidance=guidance, steps=steps, seed=seed, model=model
    )
    _tell(report, f"{report.done} reconstructions in {output}")


def _tell(report: Any, result: str) -> None:
    """Print the result and the first failures; end with the exit code for all, some or none."""
    failed: dict[str, str] = report.failed
    for name, reason in list(failed.items())[:_SHOWN]:
        typer.secho(_printable(f"{name}: {reason}"), fg="yellow", err=True)
    typer.echo(_printable(result if report.done else "not one image could be read"))
    if failed:
        typer.echo(
            _printable(f"{len(failed)} of {report.done + len(failed)} images failed: {report.failures}"), err=True
        )
        raise typer.Exit(SOME_FAILED if report.done else ALL_FAILED)


def _printable(text: str) -> str:
    """The text without lone surrogates (from names that are not UTF-8), which a terminal cannot print."""
    return text.encode("utf-8", "backslashreplace").decode()


@config_app.command("use")
def config_use(profile: Annotated[str, typer.Argument(help="Name of a file in configs/.")]) -> None:
    """Write a profile to params.yaml, which DVC watches. [dim]vlv config use tiny[/]"""
    from vlv import config

    config.use(Paths.find(), profile)
    typer.echo(f"params.yaml is now profile {profile}")


@config_app.command("show")
def config_show() -> None:
    """Check the active configuration and print it with its defaults."""
    import yaml

    from vlv import config

    paths = Paths.find()
    value = config.load(paths).model_dump(mode="json", by_alias=True)
    typer.echo(f"# {paths.params}; profiles: {', '.join(config.profiles(paths))}")
    typer.echo(yaml.safe_dump(value, sort_keys=False).rstrip())


@app.command()
def doctor() -> None:
    """Check this machine and this project. Exit code 1: there is a problem; its remedy is shown."""
    from vlv.cli.doctor import examine

    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    findings = examine(Paths.find())
    for finding in findings:
        typer.secho(f"{finding.level:8}", fg=colours[finding.level], nl=False)
        typer.echo(f"{finding.what}: {finding.found}")
        if finding.remedy:
            typer.echo(f"{'':8}  -> {finding.remedy}")
    raise typer.Exit(int(any(finding.level == "problem" for finding in findings)))


if __name__ == "__main__":
    app()

"""`vlv models`, `promote`, `rollback`: the registered versions; `vlv convert`: weights in other layouts."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlv import config
from vlv.config import Config, Paths
from vlv.io import files

app = typer.Typer(
    no_args_is_help=True, help="Weights in other layouts: Microsoft's Florence-2, the released VLV, GGUF."
)

_Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must not exist.")]
_Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file, or its folder.", exists=True)]
_Profile = Annotated[str | None, typer.Option(help="Name of a file in configs/; default: params.yaml.")]


@app.command()
def florence(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A copy of microsoft/Florence-2-*.", exists=True)],
    output: _Output,
) -> None:
    """Florence-2 in Microsoft's layout -> transformers' native class. No code of the folder runs.

    [dim]vlv convert florence Florence-2-large -o parts/florence-2-large[/]
    """
    from vlv.convert import florence as converter

    found = converter.convert(folder, output)
    _say(len(found.tensors), 0, found.dropped, output)


@app.command("vlv-stage1")
def stage1(checkpoint: _Checkpoint, output: _Output, profile: _Profile = None) -> None:
    """A released Stage 1 (pytorch_model.bin or checkpoint_N.pt) -> an auto-encoder's folder.

    [dim]vlv convert vlv-stage1 stage1_checkpoint -o work/stage1/model --profile paper[/]
    """
    from vlv.convert import release

    paths = Paths.find()
    done = release.stage1(checkpoint, output, _settings(paths, profile), paths)
    _say(len(done.taken), len(done.verified), done.dropped, output)


@app.command("vlv-stage2")
def stage2(checkpoint: _Checkpoint, output: _Output, profile: _Profile = None) -> None:
    """A released Stage 2 (model.pt) -> a captioner's folder.

    [dim]vlv convert vlv-stage2 model.pt -o work/stage2/model --profile paper[/]
    """
    from vlv.convert import release

    paths = Paths.find()
    done = release.stage2(checkpoint, output, _settings(paths, profile), paths)
    _say(len(done.taken), len(done.verified), done.dropped, output)


@app.command()
def gguf(
    source: Annotated[str, typer.Argument(metavar="REFERENCE", help="A .gguf file: a path, or wheel:...")],
    output: _Output,
) -> None:
    """A language model in GGUF -> Hugging Face form (a minute), for profiles such as smollm2.

    [dim]vlv convert gguf model.gguf -o .cache/converted/model[/]
    """
    from vlv.convert import gguf as converter
    from vlv.io import assets

    converter.convert(assets.resolve(source, Paths.find()), output)
    typer.echo(f"{output}: set language_model.pretrained to it")


def _settings(paths: Paths, profile: str | None) -> Config:
    if profile is None:
        return config.load(paths)
    path = paths.root / "configs" / f"{profile}.yaml"
    if not path.exists():
        raise config.ConfigError(f"There is no profile {profile!r}; there are: {', '.join(config.profiles(paths))}")
    return config.parse(files.read_text(path), str(path))


def _say(taken: int, verified: int, dropped: dict[str, str], output: Path) -> None:
    typer.echo(f"{output}: {taken} tensors taken over, {verified} equal to the configured frozen parts")
    for name, reason in dropped.items():
        typer.echo(f"dropped {name}: {reason}")


_Name = Annotated[str | None, typer.Argument(help="Registered model; default: both of params.yaml.")]


def _names(name: str | None, paths: Paths) -> list[str]:
    register = config.load(paths).register_
    return [name] if name else [register.autoencoder_name, register.captioner_name]


def promote(
    name: _Name = None,
    version: Annotated[int | None, typer.Option(min=1, help="Default: the challenger.")] = None,
) -> None:
    """Make the challenger the champion, if it passes the gates of mlflow/policy.yaml.

    If a gate fails, the model is refused (exit code 3) and each failed gate is shown with its figure and its limit.
    [dim]vlv promote[/]
    """
    from vlv import registry

    paths = Paths.find()
    refused: list[registry.PromotionRefused] = []
    for one in _names(name, paths):
        try:
            typer.echo(registry.promote(paths, one, version).message())
        except registry.PromotionRefused as error:
            refused.append(error)
    if refused:
        raise registry.PromotionRefused("\n".join(map(str, refused)))


def rollback(
    why: Annotated[str, typer.Option(help="Reason, kept in the history.")],
    name: _Name = None,
) -> None:
    """Make the previous champion the champion again. [dim]vlv rollback --why "bad on photos"[/]"""
    from vlv import registry

    paths = Paths.find()
    for one in _names(name, paths):
        typer.echo(registry.rollback(paths, one, why).message())


def models() -> None:
    """List registered versions with their aliases and figures, and the history of the champions."""
    from vlv import registry

    paths, console = Paths.find(), Console()
    table = Table("model", "version", "aliases", "made", "figures", box=None, pad_edge=False)
    for one in registry.list_models(paths):
        table.add_row(one.name, str(one.version), ", ".join(one.aliases), one.created, one.figures)
    console.print(table)
    for name in _names(None, paths):
        for entry in registry.history(paths, name):
            console.print(str(entry), markup=False, highlight=False)

"""`vlv promote`, `vlv rollback`, `vlv models`: which registered version is the champion."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlv import config
from vlv.config import Paths

_Name = Annotated[str | None, typer.Argument(help="Registered model; without: both of params.yaml.")]


def _names(name: str | None, paths: Paths) -> list[str]:
    register = config.load(paths).register_
    return [name] if name else [register.autoencoder_name, register.captioner_name]


def promote(
    name: _Name = None,
    version: Annotated[int | None, typer.Option(min=1, help="Without: the challenger.")] = None,
) -> None:
    """Make the challenger the champion, if it passes the gates of mlflow/policy.yaml.

    Refused (exit code 3) with each gate that failed, its figure and its limit. [dim]vlv promote[/]
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
    """Give the champion's place back to the version before. [dim]vlv rollback --why "bad on photos"[/]"""
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

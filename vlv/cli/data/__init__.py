"""`vlv data ...`: make, import, select, caption and verify the raw data."""

import typer

from vlv.cli.data import captioning, importing, making

app = typer.Typer(no_args_is_help=True, help="The raw data: data/, pinned by data.dvc. [dim]docs/data.md[/]")
app.command()(making.download)
app.command("import", help=importing.HELP)(importing.import_images)
app.command()(making.select)
app.command()(captioning.caption)
app.command()(making.verify)

"""The results of a flow run, read from the files of its stages, for the terminal and the Prefect UI."""

import base64
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.process import Outcome
from vlv.config import Paths
from vlv.evaluation import metrics
from vlv.io import files, tables
from vlv.tracking import without_password

_TITLES: dict[metrics.Part, str] = {
    "scenes": "Captions of {n} held-out scenes, counted against the known truth",
    "captions": "{n} captions against the true ones",
    "reconstruction": "Reconstructions of {n} held-out images",
}
_REFERENCES = {metrics.UPPER_BOUND: "teacher, true caption", metrics.VAE: "VAE round trip"}


@dataclass(frozen=True)
class Figures:
    """One table: a row for this run, each upper bound and each baseline; a column for each figure."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]

    def markdown(self) -> str:
        rows = [(name, *cells) for name, cells in self.rows]
        return f"**{self.title}**\n\n{tables.markdown(['', *self.columns], rows)}"

    def rich(self) -> Table:
        table = Table("", *self.columns, title=self.title, title_justify="left", title_style="bold")
        for name, cells in self.rows:
            table.add_row(name, *cells, style="bold" if name == "this run" else "dim")
        return table


@dataclass(frozen=True)
class Example:
    """A test image and what the pipeline made of it. Paths are relative to the project folder."""

    image: Path
    reconstruction: Path | None
    caption: str
    truth: str | None


def read(paths: Paths, name: str) -> dict[str, Any]:
    """The content of metrics/NAME.json; empty if that stage has not run."""
    file = paths.metrics / f"{name}.json"
    value = files.read_json(file) if file.exists() else {}
    return value if isinstance(value, dict) else {}


def figures(paths: Paths) -> list[Figures]:
    """The tables of metrics/evaluate.json; a part that it lacks is left out."""
    measured = read(paths, "evaluate")
    return [
        _table(title.format(n=values.get("n", "?")), metrics.of(part, "tables", "models"), values)
        for part, title in _TITLES.items()
        if (values := measured.get(part))
    ]


def _table(title: str, rows: list[metrics.Metric], values: dict[str, Any]) -> Figures:
    columns = [row for row in rows if row.name in values]
    sources = [("this run", values)]
    sources += [(label, values[key]) for key, label in _REFERENCES.items() if key in values]
    baselines = values.get(metrics.BASELINES) or {}
    sources += [(f"baseline: {key.replace('_', ' ')}", figures) for key, figures in baselines.items()]
    cells = [(name, [_number(row, source.get(row.name)) for row in columns]) for name, source in sources]
    return Figures(title, [row.title for row in columns], cells)


def _number(row: metrics.Metric, value: Any) -> str:
    return row.text(value) if isinstance(value, int | float) else "-"


def not_better_than_shuffled(paths: Paths) -> list[str]:
    """A sentence for each figure that is not clearly better than that of the shuffled control."""
    found = read(paths, "evaluate").get("not_better_than_shuffled") or {}
    return [f"{figure} is not clearly better than on shuffled images: {why}" for figure, why in found.items()]


def headline(paths: Paths) -> dict[str, float]:
    """The figures of this run as flat metrics, for the parent run: those of each part, without its references."""
    found = tables.numbers({part: read(paths, "evaluate").get(part) or {} for part in metrics.PARTS})
    return {key: value for key, value in found.items() if key.count(".") == 1}


def examples(paths: Paths, most: int = 3) -> list[Example]:
    """The first captions of work/evaluate that have pictures beside them."""
    folder = paths.work / "evaluate"
    file = folder / "captions.json"
    found: list[Example] = []
    for entry in files.read_json(file) if file.exists() else []:
        original, drawn = (
            folder / "pictures" / f"{entry['key']}-{name}.png" for name in ("original", "reconstruction")
        )
        if len(found) == most or not original.exists():
            break
        found.append(
            Example(
                image=original.relative_to(paths.root),
                reconstruction=drawn.relative_to(paths.root) if drawn.exists() else None,
                caption=str(entry["written"]),
                truth=entry.get("true"),
            )
        )
    return found


def versions(paths: Paths) -> list[tuple[str, str]]:
    """Registered models and their versions, from metrics/register.json."""
    entries = [entry for entry in read(paths, "register").values() if isinstance(entry, dict)]
    return [(str(entry["name"]), str(entry["version"])) for entry in entries if {"name", "version"} <= set(entry)]


def show(console: Console, paths: Paths, outcomes: Mapping[str, Outcome], seconds: float, promotion: str) -> None:
    """The end of `make full-train`: figures, examples, versions, and what to type next."""
    console.print()
    console.print("  ".join(f"{name}: {outcome}" for name, outcome in outcomes.items()), soft_wrap=True)
    for table in figures(paths):
        console.print(table.rich())
    for sentence in not_better_than_shuffled(paths):
        console.print(sentence, style="bold red", markup=False, highlight=False, soft_wrap=True)
    for example in examples(paths):
        console.print(_side_by_side(console, paths, example), end="")
        console.print(f"  written  {example.caption}", markup=False, highlight=False, soft_wrap=True)
        if example.truth:
            console.print(f"  true     {example.truth}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"  image    {example.image}", style="dim", highlight=False, soft_wrap=True)
        if example.reconstruction:
            console.print(f"  drawn    {example.reconstruction}", style="dim", highlight=False, soft_wrap=True)
    for name, version in versions(paths):
        console.print(f"[bold]{name}[/] version {version}", highlight=False)
    if promotion:
        console.print(promotion, markup=False, highlight=False)
    console.print(f"\n{seconds:.0f} s in all. Next:")
    server = os.environ.get("MLFLOW_TRACKING_URI")
    store = without_password(server) if server else "sqlite:///mlflow/store/mlflow.db"
    for command, purpose in (
        ("vlv caption DIR -o captions.json", "caption a folder of images with the champion"),
        ("vlv reconstruct DIR -o OUT", "what the encoder kept of them"),
        (f"mlflow ui --backend-store-uri {store}", "runs, curves, models"),
        ("dvc metrics diff", "against the last commit"),
    ):
        line = f"  [bold cyan]{_programs(paths)}{command}[/]  [dim]# {purpose}[/]"
        console.print(line, highlight=False, soft_wrap=True)


def _programs(paths: Paths) -> str:
    """The folder of this environment's programs as a prefix for commands, relative if it lies in the project."""
    folder = Path(sys.executable).parent
    return f"{folder.relative_to(paths.root)}/" if folder.is_relative_to(paths.root) else ""


def _side_by_side(console: Console, paths: Paths, example: Example, width: int = 32) -> Text:
    """Image and reconstruction in half blocks; nothing on a terminal without true colour."""
    if not console.is_terminal or console.color_system not in ("truecolor", "256"):
        return Text()
    import numpy as np

    chosen = [p for p in (example.image, example.reconstruction) if p is not None]
    pictures = []
    for path in chosen:
        with Image.open(paths.root / path) as image:
            pictures.append(np.asarray(image.convert("RGB").resize((width, width))))
    gap = np.zeros((width, 1, 3), dtype=np.uint8)
    pixels = np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)
    text = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for top, bottom in zip(upper, lower, strict=True):
            text.append("▀", style=f"rgb({top[0]},{top[1]},{top[2]}) on rgb({bottom[0]},{bottom[1]},{bottom[2]})")
        text.append("\n")
    return text


_WIDTH = 900  # pixels; wider pictures are scaled down
_MOST_BYTES = 400_000  # an artifact is a row in the server's database


def publish(paths: Paths, outcomes: Mapping[str, Outcome], promotion: str) -> None:
    """Write the run's Markdown artifacts: figures, pictures (if a stage ran), the verdict on the data, a summary."""
    from prefect.artifacts import create_markdown_artifact

    if found := figures(paths):
        warnings = [f"**{sentence}**" for sentence in not_better_than_shuffled(paths)]
        text = "\n\n".join([*warnings, *(table.markdown() for table in found)])
        create_markdown_artifact(key="figures", markdown=text, description="Figures of metrics/evaluate.json")
    pictures = sorted([*paths.plots.glob("*.png"), *paths.plots.glob("*/*.png")])
    if pictures and any(outcome != "current" for outcome in outcomes.values()):
        text = "\n\n".join(f"**{path.relative_to(paths.root)}**\n\n{_picture(path)}" for path in pictures)
        create_markdown_artifact(key="pictures", markdown=text, description="Curves and picture grids")
    summary = paths.work / "validate" / "summary.md"
    if summary.exists():
        create_markdown_artifact(key="data-gate", markdown=files.read_text(summary), description="Verdict on the data")
    create_markdown_artifact(
        key="run", markdown=_run(paths, outcomes, promotion), description="Stages and model versions"
    )


def _run(paths: Paths, outcomes: Mapping[str, Outcome], promotion: str) -> str:
    lines = [tables.markdown(["stage", ""], list(outcomes.items())), ""]
    lines += [f"- `{name}` version {version}" for name, version in versions(paths)]
    if promotion:
        lines += ["", "```", promotion, "```"]
    return "\n".join(lines)


def _picture(path: Path) -> str:
    """The picture as a data URI, scaled down; a JPEG where the PNG is too large."""
    with Image.open(path) as image:
        shown = image.convert("RGB")
        if shown.width > _WIDTH:
            shown = shown.resize((_WIDTH, max(1, shown.height * _WIDTH // shown.width)))
        buffer = io.BytesIO()
        shown.save(buffer, format="PNG", optimize=True)
    if buffer.tell() > _MOST_BYTES:
        buffer = io.BytesIO()
        shown.save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "png" if buffer.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"![{path.stem}](data:image/{kind};base64,{data})"

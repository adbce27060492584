"""What the Prefect UI shows of a run: markdown artifacts with the figures, the pictures and the versions."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from prefect.artifacts import create_markdown_artifact

from flows import report
from flows.project import Outcome
from vlv.config import Paths
from vlv.io import files

_WIDTH = 900  # pixels; wider pictures are scaled down
_MOST_BYTES = 400_000  # an artifact is a row in the server's database


def publish(paths: Paths, outcomes: Mapping[str, Outcome], promotion: str) -> None:
    """Write the run's artifacts; a part that is not there is left out, pictures where nothing ran."""
    if tables := report.figures(paths):
        warnings = [f"**{sentence}**" for sentence in report.not_better_than_shuffled(paths)]
        text = "\n\n".join([*warnings, *(table.markdown() for table in tables)])
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
    lines = ["| stage | |", "|---|---|"]
    lines += [f"| {name} | {outcome} |" for name, outcome in outcomes.items()]
    lines += ["", *(f"- `{name}` version {version}" for name, version in report.versions(paths))]
    if promotion:
        lines += ["", "```", promotion, "```"]
    return "\n".join(lines)


def _picture(path: Path) -> str:
    """The picture itself as a data URI, scaled down; its path where it would be too large."""
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

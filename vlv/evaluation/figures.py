"""What people look at: curves, bars, and the cards of saved models."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlv.config import Config
from vlv.evaluation import metrics
from vlv.io import files


def write_curve(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Step, loss and learning rate as CSV, for `dvc plots`. Speeds are left out, because no two runs have the same."""
    columns = ["step", "loss", "learning_rate"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{row[name]:.6g}" for name in columns} for row in rows)
    files.write_text(path, buffer.getvalue())


def plot_curve(rows: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Loss over steps on a logarithmic scale, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#3867d6", linewidth=1.2)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": ""})


def plot_scores(groups: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """Bars of the scenes' figures, one colour for each group (the captions, each baseline), as PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in metrics.of("scenes", "tables", "models") if all(row.name in one for one in groups.values())]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        places = [k + i * width for k in range(len(rows))]
        axes.bar(places, [values[row.name] for row in rows], width, label=group)
    axes.set_xticks([k + 0.4 - width / 2 for k in range(len(rows))], [row.title.replace(" ", "\n") for row in rows])
    axes.set(title=title, ylim=(0, 1.05))
    axes.legend(fontsize=8, ncols=2)
    axes.grid(axis="y", alpha=0.3)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": ""})


def card(kind: str, settings: Config) -> str:
    """README.md of a saved model."""
    what = {
        "autoencoder": "Stage 1: images -> caption embeddings, trained through a frozen diffusion decoder "
        "on images alone (no caption was read).",
        "captioner": "Stage 2: caption embeddings -> prefix of a causal language model, trained on "
        "image-caption pairs.",
    }[kind]
    learned = settings.stage1.learn if kind == "autoencoder" else settings.stage2.learn
    path = "through the frozen text encoder" if settings.decoder.use_text_encoder else "direct"
    return f"""# VLV {kind} ({settings.profile})

{what}

- trained tensors: model.safetensors (what learned: {learned})
- conditioning: {path}, {settings.encoder.queries} queries
- frozen parts: named in config.json with the hash of their contents; loading checks them
- data: {settings.data.source.kind}, {settings.data.image_size} pixels
- made by: `dvc repro` with the configuration in config.json
- method: Vision-Language-Vision auto-encoder, arXiv 2507.07104
"""

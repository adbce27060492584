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
    """README.md of a saved model, `kind` "autoencoder" or "captioner"."""
    name, what, use, trained = {
        "autoencoder": (
            "Autoencoder",
            "Stage 1: from an image to caption embeddings, and from these to the image again. It was trained on images "
            "alone, through a frozen text-to-image model; it has read no caption.",
            'autoencoder.embed(["photo.jpg"]), autoencoder.reconstruct(["photo.jpg"])',
            settings.stage1.learn,
        ),
        "captioner": (
            "Captioner",
            "Stage 2: from an image to a caption. Caption embeddings become the prefix of a causal language model, "
            "which was trained on image-caption pairs.",
            'captioner.caption(["photo.jpg"])',
            settings.stage2.learn,
        ),
    }[kind]
    path = "they pass the frozen text encoder" if settings.decoder.use_text_encoder else "they are the context"
    return f"""# VLV {kind} ({settings.profile})

{what}

- method: Vision-Language-Vision auto-encoder, arXiv 2507.07104
- made by: `dvc repro`, with the configuration in config.json
- data: {settings.data.source.kind}, {settings.data.image_size} pixels
- trained tensors: model.safetensors (`learn: {trained}`)
- caption embeddings: {settings.encoder.queries} an image; {path}
- frozen parts: config.json names them with the hash of their contents, and loading checks it

## Use

```python
from vlv import {name}

{kind} = {name}.from_pretrained("FOLDER")  # this folder
{use}
```

## Figures and baselines

Evaluation comes after training: metrics/evaluate.json of the same run has the figures, with baselines and upper bounds.
A registered version has them in its tag `figures` (`vlv models`).

## Limits and licence

The model knows images like those it was trained on. Captions may be wrong and are not fit for decisions about people.
The trained tensors have the licence of the project (Apache-2.0), unless that of a frozen part or of the data says more.
"""

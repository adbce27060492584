"""What a training stage writes besides its model: curve, figures, plot and MLflow run."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlv import tracking
from vlv.config import Config, Paths, Training
from vlv.data import shards
from vlv.evaluation import figures
from vlv.io import files
from vlv.io.tables import numbers
from vlv.stages import adoption
from vlv.stages.inputs import TrainingHashes
from vlv.tracking.wandb_copy import wandb_copy
from vlv.training import distributed, ledger


class Record:
    """The paths that one training stage writes to.

    Attributes:
        model: the finished model's folder (a DVC output).
        training: checkpoints and curve of this training; removed when the stage is finished. Its name contains the
            input hash, so that other settings or other code start a new training.
            figures: the contents of metrics/STAGE.json.
    """

    def __init__(self, stage: str, paths: Paths, hashes: TrainingHashes) -> None:
        self.stage, self.paths, self.hashes = stage, paths, hashes
        self.folder = paths.work / stage
        self.model = self.folder / "model"
        self.training = self.folder / f"training-{hashes.input_hash[:12]}"
        self.figures: dict[str, Any] = {}

    def result(self) -> dict[str, Any]:
        """The figures as written; empty in a process that does not write."""
        if not distributed.is_main():
            return {}
        figures: dict[str, Any] = files.read_json(self.paths.metrics / f"{self.stage}.json")
        return figures


@contextmanager
def training_record(
    record: Record, settings: Config, training: Training
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Open an MLflow run around a training; yields the function that the loop calls with its curve.

    At the end the curve is written to plots/STAGE.csv and .png and the figures to metrics/STAGE.json; these and the
    model are logged to the run, and the checkpoints are removed. Only the main process does this.
    """
    if not distributed.is_main():
        yield lambda step, values: None
        return
    parameters = settings.model_dump(mode="json", by_alias=True)
    identity = f"{record.stage}-{record.training.name}"
    with (
        tracking.start_run(record.paths, record.stage, folder=record.training) as run,
        wandb_copy(settings.tracking, record.paths, record.stage, identity, parameters) as copy,
    ):
        run.log_params(parameters)
        log_data(run, record.paths)

        def on_log(step: int, values: dict[str, float]) -> None:
            run.log_metrics(values, step)
            copy(step, values)

        adopted = adoption.begin(record.training, record.hashes)
        yield on_log
        rows = _rows(run, training)
        last = rows[-max(1, len(rows) // 20) :]
        seconds = sum(training.log_every * training.batch_size / row["samples_per_second"] for row in rows)
        record.figures |= {"adopted": adopted} if adopted else {}
        record.figures |= {
            "steps": training.steps,
            "samples": training.steps * training.batch_size,
            "final_loss": round(sum(row["loss"] for row in last) / len(last), 5) if last else None,
            "training_seconds": round(seconds, 1),
            "cost": ledger.costs(record.training, settings.compute),
        }
        files.write_json(record.paths.metrics / f"{record.stage}.json", record.figures)
        figures.write_curve(rows, record.paths.plots / f"{record.stage}.csv")
        figures.plot_curve(rows, record.stage, record.paths.plots / f"{record.stage}.png")
        run.log_artifact(record.paths.plots / f"{record.stage}.png")
        run.log_artifact(record.model)
        run.log_metrics(numbers(record.figures), training.steps)
    for old in record.folder.glob("training-*"):
        tracking.keep_undelivered(record.paths, old)
        shutil.rmtree(old)


def _rows(run: tracking.Run, training: Training) -> list[dict[str, float]]:
    """The curve by step. Points that a bad disk lost are taken from MLflow."""
    keys = ("loss", "learning_rate", "samples_per_second")
    points = run.curve(keys)
    if not points.keys() >= set(range(training.log_every, training.steps + 1, training.log_every)):
        points = run.recall(keys) | points
    return [
        {"step": step, **values}
        for step, values in sorted(points.items())
        if all(map(math.isfinite, values.values())) and values["samples_per_second"] > 0
    ]


def log_data(run: tracking.Run, paths: Paths) -> None:
    """Log the data of a run: digest of the manifest, source and counts."""
    manifest = shards.read_manifest(paths.data)
    digest = files.sha256_file(paths.data / "manifest.json")
    counts = {name: split.samples for name, split in manifest.splits.items()}
    run.log_dataset("data", digest, str(Path("data")), counts)

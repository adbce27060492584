"""Registration: both models, with their parts and their lineage, become versions in the MLflow registry."""

import base64
import tempfile
from pathlib import Path
from typing import Any

from vlv import registry, tracking
from vlv.config import Config, ConfigError, Paths
from vlv.data.loader import ShardLoader
from vlv.io import files
from vlv.io.images import encode_png, to_arrays
from vlv.models import saved


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Register captioner and auto-encoder; write their versions to metrics/register.json."""
    evaluation = paths.metrics / "evaluate.json"
    example = {"image": [_first_test_image(paths)]}
    result: dict[str, Any] = {}
    with tracking.start_run(paths, "register", system_metrics=False) as run_:
        run_id = run_.wait_for_id()
        tags = registry.lineage(paths)
        if tags["profile"] != settings.profile:
            raise ConfigError(f"params.yaml changed while the stage ran: {tags['profile']} is not {settings.profile}")
        for name, served, stage in (
            (settings.register_.captioner_name, registry.CAPTIONER, "stage2"),
            (settings.register_.autoencoder_name, registry.AUTOENCODER, "stage1"),
        ):
            with tempfile.TemporaryDirectory() as temporary:
                bundle = Path(temporary) / "model"
                # With its parts, so that a registered version loads without this folder.
                saved.bundle(paths.work / stage / "model", paths, bundle)
                version = registry.register(
                    paths, name, served, model_folder=bundle, example=example, evaluation=evaluation,
                    tags=tags, run_id=run_id,
                )  # fmt: skip
            result[stage] = {"name": name, "version": version, "run_id": run_id}
    files.write_json(paths.metrics / "register.json", result)
    # The stage's output for DVC is in the store itself: if the store is gone, the stage runs again.
    files.write_json(paths.root / "mlflow" / "store" / "registered.json", result)
    return result


def _first_test_image(paths: Paths) -> str:
    """Base64 of a PNG: the versions' input example."""
    batch = next(ShardLoader(paths.data, "test", 1).iterate(1))
    assert batch.images is not None
    return base64.b64encode(encode_png(to_arrays(batch.images)[0])).decode()

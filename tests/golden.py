"""Golden numbers: what both stages of the smoke profile compute, to tell a refactoring from a change.

    python -m tests.golden            # print them
    python -m tests.golden --write    # after a change that is meant to change them: write tests/golden.json

For each stage: the first five losses of a training, and the norms of three gradients of its loss on the first eight
samples. In float32 and with one thread, because the number of threads decides the order of sums (four losses move by
2e-5 with two). On another kind of processor the numbers differ by rounding only (`TOLERANCE`).
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, profile

TOLERANCE = 1e-4  # relative
GOLDEN = ROOT / "tests" / "golden.json"


def compute(folder: Path) -> dict[str, Any]:
    """The golden numbers of the present code; `folder` is a place to train in."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compute(folder)
    finally:
        torch.set_num_threads(threads)


def _compute(folder: Path) -> dict[str, Any]:
    from vlv.config import Paths
    from vlv.data import sources
    from vlv.stages import stage1, stage2

    (folder / "pretrained").symlink_to(ROOT / "pretrained")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "assets").symlink_to(Paths(ROOT).cache / "assets")  # fetched once
    paths, settings = Paths(folder), profile("smoke")
    one = {"log_every": 1}
    update = {name: getattr(settings, name).model_copy(update=one) for name in ("stage1", "stage2")}
    settings = settings.model_copy(update=update)
    sources.materialise(settings.data, paths, paths.data)
    gradients = {"stage1": _gradients_1(settings, paths), "stage2": _gradients_2(settings, paths)}
    found = {}
    for name, stage in (("stage1", stage1), ("stage2", stage2)):
        stage.run(settings, paths)
        with (paths.plots / f"{name}.csv").open(encoding="utf-8") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        found[name] = {"losses": losses[:5], "gradients": gradients[name]}
    return found


def _norms(module: Any, names: list[str]) -> dict[str, float]:
    parameters = dict(module.named_parameters())
    return {name: float(f"{float(parameters[name].grad.norm()):.6g}") for name in names}


def _gradients_1(settings: Any, paths: Any) -> dict[str, float]:
    from vlv.data.loader import ShardLoader
    from vlv.models.autoencoder import Autoencoder, Stage1Batch
    from vlv.training import distributed

    model = Autoencoder.build(settings, paths)
    batch = next(ShardLoader(paths.data, "train", 8).iterate())
    model(Stage1Batch(batch.images), distributed.part_generator(settings.stage1, 0, 0)).backward()
    return _norms(model.encoder, ["queries", "projection.layers.0.weight", "projection.mean"])


def _gradients_2(settings: Any, paths: Any) -> dict[str, float]:
    from vlv.data.loader import ShardLoader
    from vlv.models import caption_tokens
    from vlv.models.captioner import Captioner, Stage2Batch
    from vlv.training import distributed

    captioner = Captioner.build(settings, paths)
    batch = next(ShardLoader(paths.data, "train", 8).iterate())
    captions = [caption or "" for caption in batch.captions]
    tokens = caption_tokens.tokenize(captioner.tokenizer, captions, settings.stage2.max_caption_tokens)
    ids, labels = caption_tokens.collate(tokens.ids, captioner.tokenizer.pad_token_id or 0)
    generator = distributed.part_generator(settings.stage2, 0, 0)
    captioner(Stage2Batch(None, ids, labels, batch.images), generator).backward()
    return _norms(captioner, ["prefix.layers.0.weight", "prefix.positions", "language_model.model.norm.weight"])


def main() -> None:
    """Print the golden numbers, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tests/golden.json")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = json.dumps(compute(Path(folder)), indent=2) + "\n"
    if chosen.write:
        GOLDEN.write_text(found, encoding="utf-8")
    print(found, end="")


if __name__ == "__main__":
    main()

"""Evaluation on the test split: captions and reconstructions, measured beside their baselines and upper bounds."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlv import tracking
from vlv.config import Config, Evaluate, Paths
from vlv.data.loader import ShardLoader
from vlv.evaluation import fid, figures, intervals, metrics, truth
from vlv.evaluation.metrics import Compared
from vlv.evaluation.similarity import SentenceModel, cosines
from vlv.io import assets, files, images
from vlv.io.images import Pixels
from vlv.io.tables import numbers
from vlv.models import saved
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner
from vlv.stages import outputs

log = logging.getLogger(__name__)

_SHOWN = 8  # pictures in the grid


@dataclass(frozen=True)
class TestSet:
    """The first test samples in file order. `truth` and `held_out` are empty where the truth is not known."""

    keys: list[str]
    pixels: list[Pixels]
    captions: list[str | None]
    truth: list[Any]
    held_out: list[bool]


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Write metrics/evaluate.json, plots/evaluate*.png and work/evaluate/."""
    e = settings.evaluate
    with tracking.start_run(paths, "evaluate", system_metrics=False) as run_:
        test = read_test_set(e, paths.data)
        result: dict[str, Any] = {"profile": settings.profile, "evaluation_set": _set_hash(test, e)}
        captioner = Captioner.load(paths.work / "stage2" / "model", paths)
        written = outputs.captions(captioner, test.pixels, e.batch_size)
        if test.truth:
            result["scenes"] = _count_captions(settings, paths, written, test)
        if e.sentence_model and all(test.captions):
            result["captions"] = _compare_sentences(assets.resolve(e.sentence_model, paths), written, test.captions)
        result["reconstruction"], drawn = _reconstruct(e, paths, test)
        result["not_better_than_shuffled"] = intervals.not_better(result)
        for figure, sentence in result["not_better_than_shuffled"].items():
            log.warning("%s is not clearly better than on shuffled images: %s", figure, sentence)
        files.write_json(paths.metrics / "evaluate.json", result)
        _write_pictures(paths, test, written, drawn)
        _plot_captions(result, paths.plots / "evaluate.png")
        for path in sorted(paths.plots.glob("evaluate*.png")):
            run_.log_artifact(path)
        run_.log_artifact(paths.metrics / "evaluate.json")
        run_.log_metrics(numbers(result))
        run_.set_tags({"not_better_than_shuffled": ", ".join(result["not_better_than_shuffled"]) or "none"})
    return result


def read_test_set(e: Evaluate, data: Path) -> TestSet:
    """The first `evaluate.captions` test samples (all of them if there are fewer)."""
    test = TestSet([], [], [], [], [])
    counting = truth.load(e.counting) if e.counting else None
    for batch in ShardLoader(data, "test", e.batch_size).iterate(e.captions):
        assert batch.images is not None
        test.keys.extend(batch.keys)
        test.pixels.extend(images.to_arrays(batch.images))
        test.captions.extend(batch.captions)
        if counting is not None and counting.truth_of(batch.meta[0]) is not None:
            test.truth.extend(counting.truth_of(meta) for meta in batch.meta)
            test.held_out.extend(counting.is_held_out(meta) for meta in batch.meta)
    return test


def _set_hash(test: TestSet, e: Evaluate) -> str:
    """A hash that comparable figures share: of the samples and of how they are measured."""
    contents = "".join(key + files.sha256_bytes(p.tobytes()) for key, p in zip(test.keys, test.pixels, strict=True))
    return files.sha256_bytes((contents + e.model_dump_json()).encode())


# -- captions ------------------------------------------------------------------------------------------


def _count_captions(settings: Config, paths: Paths, written: list[str], test: TestSet) -> dict[str, Any]:
    assert settings.evaluate.counting is not None
    counting = truth.load(settings.evaluate.counting)
    read = counting.read_captions(written)
    everything = range(len(read))

    def compared(said: Sequence[Any], rows: Sequence[int] = everything) -> Compared:
        return Compared(len(rows), counting.terms([said[i] for i in rows], [test.truth[i] for i in rows]))

    result: dict[str, Any] = metrics.measure("scenes", compared(read))
    for name, held_out in ((metrics.HELD_OUT, True), (metrics.SEEN, False)):
        if rows := [i for i in everything if test.held_out[i] == held_out]:
            result[name] = metrics.measure("scenes", compared(read, rows))
    shuffled = compared(intervals.shuffled(read))
    result[intervals.KEY] = _versus("scenes", compared(read), shuffled)
    alone = outputs.captions_without_image(settings, paths, len(read))
    baselines = {"shuffled": shuffled, "no_image": compared(counting.read_captions(alone))}
    if settings.evaluate.untrained_baseline:
        untrained = outputs.captions_without_stage1(settings, paths, test.pixels)
        baselines["untrained_stage1"] = compared(counting.read_captions(untrained))
    result[metrics.BASELINES] = {name: metrics.measure("scenes", one) for name, one in baselines.items()}
    return result


def _compare_sentences(model: Path, written: Sequence[str], captions: Sequence[str | None]) -> dict[str, Any]:
    """How close captions are to the true ones; every sample must have a true caption."""
    true = [caption or "" for caption in captions]
    both = cosines(SentenceModel(model, saved.inference_device()), written, true)
    own, another = (Compared(len(written), cosines=values) for values in both)
    return {
        **metrics.measure("captions", own),
        metrics.BASELINES: {"shuffled": metrics.measure("captions", another)},
        intervals.KEY: _versus("captions", own, another),
    }


def _versus(part: metrics.Part, ours: Compared, baseline: Compared) -> dict[str, Any]:
    return intervals.versus(metrics.terms(part, ours), metrics.terms(part, baseline))


# -- reconstructions -----------------------------------------------------------------------------------


def _reconstruct(e: Evaluate, paths: Paths, test: TestSet) -> tuple[dict[str, Any], dict[str, list[Pixels]]]:
    """The figures, and the pictures by their source."""
    model = Autoencoder.load(paths.work / "stage1" / "model", paths).to(saved.inference_device())
    pixels = test.pixels[: e.reconstructions]
    drawn = outputs.pictures(model, e, pixels, test.captions[: e.reconstructions])
    true = [images.resize_crop(p, model.decoder.image_size) for p in pixels]
    figures_ = _measure_pictures(e, paths, drawn, true, test.truth[: e.reconstructions])
    return figures_ | {"guidance": e.guidance, "steps": e.steps, "seed": e.seed}, drawn


def _measure_pictures(
    e: Evaluate, paths: Paths, drawn: dict[str, list[Pixels]], true: list[Pixels], known: Sequence[Any]
) -> dict[str, Any]:
    count, inception = _counter(e, paths, known), _inception(e, paths, true)

    def compared(pictures: list[Pixels]) -> Compared:
        return Compared(len(pictures), count(pictures), drawn=pictures, true=true, features=inception(pictures))

    ours = compared(drawn[outputs.RECONSTRUCTION])
    # Shuffling does not change the FID, which compares two sets.
    others = intervals.shuffled(drawn[outputs.RECONSTRUCTION])
    shuffled = Compared(len(others), count(others), drawn=others, true=true)
    result: dict[str, Any] = metrics.measure("reconstruction", ours)
    for name in (metrics.UPPER_BOUND, metrics.VAE):
        if name in drawn:
            result[name] = metrics.measure("reconstruction", compared(drawn[name]))
    result[metrics.BASELINES] = {"shuffled": metrics.measure("reconstruction", shuffled)}
    result[intervals.KEY] = _versus("reconstruction", ours, shuffled)
    if on_real := count(true):
        result[metrics.JUDGE] = metrics.measure("scenes", Compared(len(true), on_real))
        if recall := result.get(metrics.UPPER_BOUND, {}).get("object_recall"):
            result[metrics.SHARE_OF_UPPER_BOUND] = round(result["object_recall"] / recall, 4)
    return result


def _counter(e: Evaluate, paths: Paths, known: Sequence[Any]) -> Callable[[list[Pixels]], dict[str, intervals.Terms]]:
    """Compares a network's readings of pictures with the truth; empty where the truth is not known."""
    if not (e.counting and e.recogniser and known):
        return lambda pictures: {}
    counting = truth.load(e.counting)
    read = counting.load_judge(assets.resolve(e.recogniser, paths))
    return lambda pictures: counting.terms(read(images.to_batch(pictures)), known)


def _inception(e: Evaluate, paths: Paths, true: list[Pixels]) -> "Callable[[list[Pixels]], metrics.Features | None]":
    """Inception features of pictures and of the true ones; None without a network, or for a single image."""
    if not e.feature_network or len(true) < 2:
        return lambda pictures: None
    network = fid.load_network(assets.resolve(e.feature_network, paths), saved.inference_device())
    real = fid.features(network, true)
    return lambda pictures: (fid.features(network, pictures), real)


# -- pictures and plots --------------------------------------------------------------------------------


def _write_pictures(paths: Paths, test: TestSet, written: list[str], drawn: dict[str, list[Pixels]]) -> None:
    folder = paths.work / "evaluate"
    shown = min(_SHOWN, len(drawn[outputs.RECONSTRUCTION]))
    rows = {"original": test.pixels, "reconstruction": drawn[outputs.RECONSTRUCTION], "VAE": drawn[metrics.VAE]}
    if metrics.UPPER_BOUND in drawn:
        rows["from its caption"] = drawn[metrics.UPPER_BOUND]
    grid = images.grid([pictures[:shown] for pictures in rows.values()], list(rows), written)
    for path in (folder / "pictures" / "grid.png", paths.plots / "evaluate_grid.png"):
        files.write_bytes(path, images.encode_png(grid))
    for i in range(shown):
        for name in ("original", "reconstruction"):
            files.write_bytes(folder / "pictures" / f"{test.keys[i]}-{name}.png", images.encode_png(rows[name][i]))
    captions = [
        {"key": key, "written": text, "true": true}
        for key, text, true in zip(test.keys, written, test.captions, strict=True)
    ]
    files.write_json(folder / "captions.json", captions)


def _plot_captions(result: dict[str, Any], path: Path) -> None:
    """The counts of the captions and of their baselines as bars, where the truth is known."""
    if "scenes" not in result:
        return
    unlearned = [key for key in result["not_better_than_shuffled"] if key.startswith("scenes.")]
    note = f"\nnot clearly better than on shuffled images: {', '.join(unlearned)}" if unlearned else ""
    groups = {"captions": result["scenes"], **result["scenes"][metrics.BASELINES]}
    figures.plot_scores(groups, f"Captions of held-out scenes{note}", path)

"""Evaluation on the test split: captions, reconstructions, their ceilings and floors."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlv import tracking
from vlv.config import Config, Paths
from vlv.data.loader import ShardLoader
from vlv.evaluation import frechet, intervals, report
from vlv.evaluation.reconstruct import psnr, psnr_of_each
from vlv.evaluation.sentences import SentenceModel, similarity
from vlv.io import assets, files, images
from vlv.io.images import Pixels
from vlv.io.progress import meter
from vlv.models import saved
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner
from vlv.registry.versions import numbers
from vlv.stages import lineage, stage2
from vlv.tiny import scenes
from vlv.tiny.counting import score, terms
from vlv.tiny.recogniser import SceneRecogniser
from vlv.tiny.scenes import Scene

log = logging.getLogger(__name__)

_SHOWN = 8  # pictures in the grid


@dataclass(frozen=True)
class TestSet:
    """The first test samples in file order; `scenes` is empty where the truth is not known."""

    keys: list[str]
    pixels: list[Pixels]
    captions: list[str | None]
    scenes: list[Scene]
    novel_pair: list[bool]


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Write metrics/evaluate.json, plots/evaluate*.png and work/evaluate/."""
    with tracking.start_run(paths, "evaluate", system_metrics=False) as run_:
        test = read_test_set(settings, paths)
        result: dict[str, Any] = {"profile": settings.profile, "evaluation_set": _set_hash(test, settings)}
        written = _captions(Captioner.load(paths.work / "stage2" / "model", paths), test, settings)
        if test.scenes:
            result["scenes"] = _score_captions(settings, paths, written, test)
        true = [caption for caption in test.captions if caption]
        if settings.evaluate.sentence_model and len(true) == len(written):
            network = assets.resolve(settings.evaluate.sentence_model, paths)
            sentences = SentenceModel(network, saved.inference_device())
            result["captions"] = similarity(sentences, written, true)
        result["reconstruction"], drawn = _reconstructions(settings, paths, test)
        result["not_better_than_shuffled"] = intervals.not_better(result)
        for figure, sentence in result["not_better_than_shuffled"].items():
            log.warning("%s is not clearly better than on shuffled images: %s", figure, sentence)
        files.write_json(paths.metrics / "evaluate.json", result)
        _write_pictures(settings, paths, test, written, drawn)
        for path in sorted(paths.plots.glob("evaluate*.png")):
            run_.log_artifact(path)
        run_.log_artifact(paths.metrics / "evaluate.json")
        run_.log_metrics(numbers(result))
        run_.set_tags({"not_better_than_shuffled": ", ".join(result["not_better_than_shuffled"]) or "none"})
    return result


def read_test_set(settings: Config, paths: Paths) -> TestSet:
    """The first `evaluate.captions` test samples (all of them if there are fewer)."""
    test = TestSet([], [], [], [], [])
    loader = ShardLoader(paths.data, "test", settings.evaluate.batch_size)
    for batch in loader.iterate(settings.evaluate.captions):
        assert batch.images is not None
        test.keys.extend(batch.keys)
        test.pixels.extend(images.to_arrays(batch.images))
        test.captions.extend(batch.captions)
        if "scene" in batch.meta[0]:
            test.scenes.extend(Scene.from_json(meta["scene"]) for meta in batch.meta)
            test.novel_pair.extend(bool(meta["novel_pair"]) for meta in batch.meta)
    return test


def _set_hash(test: TestSet, settings: Config) -> str:
    """What figures must share to be comparable: the samples and how they are measured."""
    contents = "".join(key + files.sha256_bytes(p.tobytes()) for key, p in zip(test.keys, test.pixels, strict=True))
    return files.sha256_bytes((contents + settings.evaluate.model_dump_json()).encode())


# -- captions ------------------------------------------------------------------------------------------


def _captions(captioner: Captioner, test: TestSet, settings: Config) -> list[str]:
    size = settings.evaluate.batch_size
    captioner.to(saved.inference_device())
    written: list[str] = []
    with meter("Captions", len(test.pixels)) as progress:
        for i in range(0, len(test.pixels), size):
            written += captioner.caption(test.pixels[i : i + size], size)
            progress.advance(len(written) - i)
    return written


def _score_captions(settings: Config, paths: Paths, written: list[str], test: TestSet) -> dict[str, Any]:
    read = [scenes.read_caption(text) for text in written]
    novel = [i for i, is_novel in enumerate(test.novel_pair) if is_novel]
    seen = [i for i, is_novel in enumerate(test.novel_pair) if not is_novel]
    result: dict[str, Any] = dict(score(read, test.scenes).to_json())
    for name, chosen in (("held_out_pairs", novel), ("seen_pairs", seen)):
        if chosen:
            result[name] = score([read[i] for i in chosen], [test.scenes[i] for i in chosen]).to_json()
    # The truth of another scene: what captions score that do not look at the image.
    shuffled = [*read[1:], read[0]]
    result[intervals.KEY] = intervals.versus(terms(read, test.scenes), terms(shuffled, test.scenes))
    floors: dict[str, Any] = {"shuffled": score(shuffled, test.scenes).to_json()}
    alone = _write_without_image(settings, paths, len(test.scenes))
    floors["no_image"] = score([scenes.read_caption(t) for t in alone], test.scenes).to_json()
    if settings.evaluate.untrained_floor:
        floors["untrained_stage1"] = _untrained_floor(settings, paths, test)
    return result | {"floors": floors}


def _write_without_image(settings: Config, paths: Paths, count: int) -> list[str]:
    """Captions that the pretrained language model samples by itself."""
    alone = Captioner.build(settings, paths).eval().to(saved.inference_device())
    torch.manual_seed(settings.evaluate.seed)
    written: list[str] = []
    while len(written) < count:
        written += alone.write(None, min(settings.evaluate.batch_size, count - len(written)))
    return written


def _untrained_floor(settings: Config, paths: Paths, test: TestSet) -> dict[str, Any]:
    """Stage 2, same budget, on an auto-encoder that Stage 1 never trained."""
    untrained = Autoencoder.build(settings, paths).eval()
    origin = lineage.origin("evaluate", settings, paths)
    fingerprint = files.sha256_bytes((lineage.fingerprint_of(untrained.encoder) + origin.input_hash).encode())
    folder = paths.work / "evaluate" / f"untrained-{fingerprint[:12]}"
    captioner, _ = stage2.train_captioner(
        settings, paths, untrained.encoder, folder, fingerprint, lambda step, values: None, "Floor: untrained Stage 1"
    )
    written = _captions(captioner, test, settings)
    return score([scenes.read_caption(text) for text in written], test.scenes).to_json()


# -- reconstructions -----------------------------------------------------------------------------------


def _reconstructions(settings: Config, paths: Paths, test: TestSet) -> tuple[dict[str, Any], dict[str, list[Pixels]]]:
    """Figures, and the drawn pictures by name."""
    e = settings.evaluate
    model = Autoencoder.load(paths.work / "stage1" / "model", paths).to(saved.inference_device())
    count = min(e.reconstructions, len(test.pixels))
    size = settings.decoder.image_size
    true = [images.resize_crop(p, size) for p in test.pixels[:count]]
    batches = [list(range(i, min(i + e.batch_size, count))) for i in range(0, count, e.batch_size)]
    captions = test.captions[:count]
    kinds = ["reconstruction", "vae"] + (["ceiling"] if all(captions) else [])
    drawn: dict[str, list[Pixels]] = {kind: [] for kind in kinds}
    with (
        torch.no_grad(),
        torch.autocast(model.device.type, torch.bfloat16),
        meter("Reconstructions", count * len(kinds)) as progress,
    ):
        for rows in batches:
            batch = images.to_batch([true[i] for i in rows])
            seeds = [e.seed + i for i in rows]
            context = model.context(images.to_batch([test.pixels[i] for i in rows]))
            contexts = {"reconstruction": context}
            if "ceiling" in kinds:
                contexts["ceiling"] = model.decoder.embed_text([captions[i] or "" for i in rows])
            drawn["vae"] += images.to_arrays(model.decoder.decode(model.decoder.encode(batch)[0]))
            for name, given in contexts.items():
                drawn[name] += images.to_arrays(model.decoder.sample(given.float(), seeds, e.steps, e.guidance))
            progress.advance(len(rows) * len(kinds))
    return _measure(settings, paths, drawn, true, test.scenes[:count]), drawn


def _measure(
    settings: Config, paths: Paths, drawn: dict[str, list[Pixels]], true: list[Pixels], truth: Sequence[Scene]
) -> dict[str, Any]:
    e = settings.evaluate
    judge = None
    if e.recogniser and truth:
        judge = SceneRecogniser.load(assets.resolve(e.recogniser, paths))
    network = real = None
    if e.feature_network and len(true) > 1:
        network = frechet.load_network(assets.resolve(e.feature_network, paths), saved.inference_device())
        real = frechet.features(network, true)

    def measure(pictures: list[Pixels], against: list[Pixels], scenes_: Sequence[Scene]) -> dict[str, Any]:
        figures: dict[str, Any] = {"n": len(pictures), "psnr": round(psnr(pictures, against), 3)}
        if judge is not None:
            figures |= score(judge.read(images.to_batch(pictures)), scenes_).to_json()
        return figures

    def counted(pictures: list[Pixels]) -> dict[str, intervals.Terms]:
        found = {"psnr": intervals.means(psnr_of_each(pictures, true))}
        return found if judge is None else found | terms(judge.read(images.to_batch(pictures)), truth)

    by_name = {name: measure(pictures, true, truth) for name, pictures in drawn.items()}
    if network is not None and real is not None:
        for name, pictures in drawn.items():
            by_name[name]["fid"] = round(frechet.distance(frechet.features(network, pictures), real), 3)
    recon = drawn["reconstruction"]
    others = [*recon[1:], recon[0]]
    shuffled = measure(others, true, truth)  # its FID is that of the reconstructions
    result = by_name["reconstruction"]
    for name in ("ceiling", "vae"):
        if name in by_name:
            result[name] = by_name[name]
    result["floors"] = {"shuffled": shuffled}
    result[intervals.KEY] = intervals.versus(counted(recon), counted(others))
    if judge is not None:
        result["judge_on_real_scenes"] = score(judge.read(images.to_batch(true)), truth).to_json()
        if ceiling := by_name.get("ceiling", {}).get("object_recall"):
            result["recall_of_ceiling"] = round(result["object_recall"] / ceiling, 4)
    return result | {"guidance": e.guidance, "steps": e.steps, "seed": e.seed}


def _write_pictures(
    settings: Config, paths: Paths, test: TestSet, written: list[str], drawn: dict[str, list[Pixels]]
) -> None:
    folder = paths.work / "evaluate"
    shown = min(_SHOWN, len(drawn["reconstruction"]))
    rows = {"original": test.pixels, "reconstruction": drawn["reconstruction"], "VAE": drawn["vae"]}
    if "ceiling" in drawn:
        rows["from its caption"] = drawn["ceiling"]
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
    result = files.read_json_object(paths.metrics / "evaluate.json")
    if "scenes" in result:
        groups = {"captions": result["scenes"], **result["scenes"]["floors"]}
        unlearned = [key for key in result["not_better_than_shuffled"] if key.startswith("scenes.")]
        note = f"\nnot clearly better than on shuffled images: {', '.join(unlearned)}" if unlearned else ""
        report.plot_scores(groups, f"Captions of held-out scenes{note}", paths.plots / "evaluate.png")

"""Makes the tiny profile's pretrained parts, from scratch and from fixed seeds: `vlv pretrain PART`.

The teacher stands for Stable Diffusion, the encoder for Florence-2 and lm for Qwen, which the paper takes from public
models; the recogniser judges reconstructions. The results are shipped in pretrained/tiny. Making them again takes about
two hours on 2 CPU cores and is not part of the daily pipeline. Each command can be killed and run again.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vlv import config
from vlv.config import Paths, ScenesSource
from vlv.io import files
from vlv.models.build import STATISTICS
from vlv.models.decoders.stable_diffusion import StableDiffusionDecoder, TextConditioner
from vlv.tiny import pretrain_teacher as teacher
from vlv.tiny import pretrain_text as text
from vlv.tiny import pretrain_vision as vision
from vlv.tiny.recogniser import SceneRecogniser
from vlv.tiny.scene_pool import Pool, draw
from vlv.training import blocks

log = logging.getLogger(__name__)

_STATISTICS_CAPTIONS = 2000
_CHECKED = 200  # held-out scenes the finished teacher draws for its card


def run(part: str, paths: Paths) -> dict[str, float]:
    """Make one part in pretrained/tiny and return its figures on held-out specifications.

    Raises:
        ValueError: no such part.
        ConfigError: the tiny profile's source is not scenes.
    """
    if part not in PARTS:
        raise ValueError(f"There is no part {part!r}; there are: {', '.join(PARTS)}")
    text_of = files.read_text(paths.root / "configs" / "tiny.yaml")
    source = config.parse(text_of, "configs/tiny.yaml").data.source
    if not isinstance(source, ScenesSource):
        raise config.ConfigError("configs/tiny.yaml: data.source must be scenes")
    figures = PARTS[part](paths, source)
    log.info("%s: %s", part, figures)
    return figures


def _folder(paths: Paths, part: str) -> Path:
    return paths.root / "pretrained" / "tiny" / part


def _checkpoints(paths: Paths, part: str) -> Path:
    return paths.work / "pretraining" / part


def _half(module: Any) -> Any:
    """Weights in half precision for shipping; buffers and integers as they are."""
    return module.half()


def _write_card(folder: Path, title: str, body: str, part: str, figures: dict[str, float]) -> None:
    listed = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in figures.items())
    command = f"Made by: `python -m vlv pretrain {part}` (fixed seeds, CPU, bf16 arithmetic, shipped in fp16)."
    licence = "Weights: Apache-2.0. The sprites in the training pictures are Twemoji graphics (CC-BY 4.0)."
    files.write_text(folder / "README.md", f"# {title}\n\n{body}\n\n{listed}\n\n{command}\n\n{licence}\n")


def _recogniser(paths: Paths, source: ScenesSource) -> dict[str, float]:
    pool, held_out = draw(paths, source, 30_000, 5), draw(paths, source, 500, 2, "test")
    model, figures = vision.pretrain_recogniser(pool, held_out, _checkpoints(paths, "recogniser"))
    with files.atomic_folder(_folder(paths, "recogniser")) as folder:
        state = {k: v.contiguous() for k, v in _half(model).state_dict().items()}
        safetensors.torch.save_file(state, folder / "model.safetensors")
        s = vision.RECOGNISER
        body = (
            "Reads background and nine cells from a 64x64 scene: the judge of reconstructions. Five convolutions.\n\n"
            f"Data: {len(pool):,} scenes of the training split with a little noise, {s.steps} steps of "
            f"{s.batch_size}. It has seen no reconstruction and no test specification."
        )
        _write_card(folder, "Scene recogniser", body, "recogniser", figures)
    return figures


def _encoder(paths: Paths, source: ScenesSource) -> dict[str, float]:
    pool, held_out = draw(paths, source, 30_000, 6), draw(paths, source, 500, 2, "test")
    model, figures = vision.pretrain_encoder(pool, held_out, _checkpoints(paths, "encoder"))
    with files.atomic_folder(_folder(paths, "encoder")) as folder:
        _half(model).save_pretrained(folder)
        text.tokenizer(vision.SIGNS).save_pretrained(folder)
        files.write_json(folder / "preprocessor_config.json", {"image_mean": vision.MEAN, "image_std": vision.STD})
        s = vision.ENCODER
        body = (
            "A Florence2ForConditionalGeneration of 1.6 million parameters that stands for Florence-2's public "
            "pretraining.\n\n"
            f"Data: {len(pool):,} scenes of the training split, {s.steps} steps of {s.batch_size}; task: name "
            "background and cells, and write labels with place signs. It has seen labels, no caption, nothing of "
            "the teacher and no test specification."
        )
        _write_card(folder, "Tiny Florence-2", body, "encoder", figures)
    return figures


def _lm(paths: Paths, source: ScenesSource) -> dict[str, float]:
    pool = draw(paths, source, 60_000, 3, pixels=False)
    held_out = draw(paths, source, 500, 4, "test", pixels=False)
    model, figures = text.pretrain_language_model(pool, held_out, _checkpoints(paths, "lm"))
    with files.atomic_folder(_folder(paths, "language_model")) as folder:
        _half(model).save_pretrained(folder)
        text.tokenizer().save_pretrained(folder)
        s = text.LANGUAGE_MODEL
        body = (
            "A Qwen2ForCausalLM of 3.0 million parameters over the grammar's words.\n\n"
            f"Data: {len(pool):,} captions (text alone) of the training split, each with its end, {s.steps} steps of "
            f"{s.batch_size}. It has seen no picture and no caption of a test specification."
        )
        _write_card(folder, "Tiny Qwen2", body, "lm", figures)
    return figures


def _teacher(paths: Paths, source: ScenesSource) -> dict[str, float]:
    held_out = draw(paths, source, 500, 2, "test")
    pictures = draw(paths, source, 20_000, 1)
    autoencoder, vae_figures = teacher.pretrain_vae(pictures, held_out, _checkpoints(paths, "vae"))
    captions = draw(paths, source, 60_000, 3, pixels=False)
    reader, text_figures = text.pretrain_text_encoder(captions, held_out, _checkpoints(paths, "text"))
    unet, scheduler = teacher.build_unet()
    words = text.tokenizer()
    conditioner = TextConditioner(reader, words, use_text_encoder=True)
    decoder = StableDiffusionDecoder(autoencoder, unet, conditioner, scheduler, image_size=64)
    pool, singles = draw(paths, source, 36_000, 7), draw(paths, source, 6_000, 8, max_objects=1)
    teacher.pretrain_unet(decoder, pool, singles, _checkpoints(paths, "unet"))
    figures = vae_figures | text_figures | check_teacher(paths, decoder, held_out)
    with files.atomic_folder(_folder(paths, "teacher")) as folder:
        safetensors.torch.save_file(_statistics(conditioner, captions), folder / STATISTICS)
        for name, part in (("vae", autoencoder), ("unet", unet), ("text_encoder", reader)):
            _half(part).save_pretrained(folder / name)
        scheduler.save_pretrained(folder / "scheduler")
        words.save_pretrained(folder / "tokenizer")
        t, e, v = teacher.UNET, text.TEXT_ENCODER, teacher.VAE
        reading_steps = e.steps + text.TEXT_ENCODER_AGAIN.steps
        body = (
            "AutoencoderKL, CLIPTextModel and UNet2DConditionModel with Stable Diffusion's noise schedule "
            "(v-prediction), for 64x64 scenes.\n\n"
            f"Data, all of the training split: VAE {len(pictures):,} pictures, {v.steps} steps of {v.batch_size}; text "
            f"encoder {len(captions):,} captions, {reading_steps} steps of {e.batch_size} on reading "
            f"background and cells; UNet {len(pool) + len(singles):,} captioned scenes, {t.steps} steps of "
            f"{t.batch_size}. {STATISTICS} holds the text side's mean and std at each position over "
            f"{_STATISTICS_CAPTIONS:,} of these captions. No part has seen a test specification."
        )
        _write_card(folder, "Tiny Stable Diffusion", body, "teacher", figures)
    return figures


@torch.no_grad()
def _statistics(conditioner: TextConditioner, captions: Pool) -> dict[str, torch.Tensor]:
    """Per-position mean and std (T, W) of the text encoder's input embeddings and of its contexts."""
    chosen = captions.captions[:_STATISTICS_CAPTIONS]
    embedding = conditioner.text_encoder.embeddings.token_embedding(conditioner.tokenize(chosen))
    context = conditioner.embed_text(chosen)
    sides = {"embedding": embedding, "context": context}
    means = {f"{name}_mean": x.mean(0).contiguous() for name, x in sides.items()}
    return means | {f"{name}_std": x.std(0).contiguous() for name, x in sides.items()}


@torch.no_grad()
def check_teacher(paths: Paths, decoder: StableDiffusionDecoder, held_out: Pool) -> dict[str, float]:
    """Object recall of scenes drawn from held-out captions, as the shipped recogniser sees them."""
    judge = SceneRecogniser.load(_folder(paths, "recogniser"))
    figures = {}
    for guidance in (1.0, 2.0, 3.0):
        with blocks.autocast(torch.device("cpu"), "bf16"):
            context = decoder.embed_text(held_out.captions[:_CHECKED]).float()
            drawn = torch.cat(
                [
                    decoder.sample(context[i : i + 50], range(i, i + len(context[i : i + 50])), 20, guidance)
                    for i in range(0, len(context), 50)
                ]
            )
        pairs = list(zip(judge.read(drawn), held_out.scenes, strict=False))
        there = sum(len(true.objects) for _, true in pairs)
        found = sum(len({k for _, k in seen.objects} & {k for _, k in true.objects}) for seen, true in pairs)
        exact = sum(seen == true for seen, true in pairs) / len(pairs)
        figures[f"recall_guidance_{guidance:g}"] = round(found / there, 4)
        figures[f"exact_guidance_{guidance:g}"] = round(exact, 4)
    return figures


PARTS: dict[str, Callable[[Paths, ScenesSource], dict[str, float]]] = {
    "recogniser": _recogniser,
    "teacher": _teacher,
    "encoder": _encoder,
    "lm": _lm,
}

"""Pictures like photographs (sky, ground, one thing, soft edges) with ordinary sentences.

Also small parts of the classes in the profiles for your own photographs; their tokenizers know every word.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFilter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests import projects, small_models
from tests.conftest import ROOT

SKIES = {"a clear blue": (90, 150, 230), "an orange evening": (240, 150, 70), "a grey winter": (150, 155, 165)}
GROUNDS = {"a green meadow": (70, 140, 50), "pale sand": (220, 200, 150), "fresh snow": (235, 240, 245)}
THINGS = {"house": (170, 60, 50), "haystack": (200, 160, 60), "rowing boat": (60, 60, 110), "boulder": (110, 105, 100)}


def write(root: Path, count: int) -> Path:
    """A folder of JPEG files of 352x288 pixels, each with its sentence in a text file beside it."""
    root.mkdir()
    for number in range(count):
        picture, sentence = _photograph(np.random.default_rng(number))
        picture.save(root / f"IMG_{number:04d}.jpg", quality=90)
        (root / f"IMG_{number:04d}.txt").write_text(sentence + "\n", encoding="utf-8")
    return root


def _photograph(rng: np.random.Generator) -> tuple[Image.Image, str]:
    (sky, above), (ground, below), (thing, colour) = (
        list(table.items())[rng.integers(len(table))] for table in (SKIES, GROUNDS, THINGS)
    )
    horizon = int(rng.integers(110, 180))
    height = np.arange(288)[:, None, None]
    light = 1 - 0.3 * np.where(height < horizon, height / horizon, (height - horizon) / (288 - horizon))
    pixels = np.where(height < horizon, above, below) * light + rng.normal(0, 3, (288, 352, 3))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    left, top = int(rng.integers(20, 200)), horizon - int(rng.integers(20, 60))
    place = (left, top, left + int(rng.integers(70, 130)), top + int(rng.integers(60, 100)))
    (ImageDraw.Draw(picture).rectangle if thing == "house" else ImageDraw.Draw(picture).ellipse)(place, colour)
    sentences = [
        f"A {thing}.",  # real captions are as short as this one and as long as the last
        f"There's a {thing} on {ground}.",
        f"A {thing} under {sky} sky, photographed from the road; {ground} in the foreground.",
        f"We stopped here on our second day: {ground}, {sky} sky and, standing all alone, a weathered old {thing} that "
        f"somebody must have forgotten years ago.",
    ]
    return picture.filter(ImageFilter.GaussianBlur(1.5)), sentences[rng.integers(len(sentences))]


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen2's and SmolLM2's: no word is unknown to it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=20
    )


def parts(root: Path, texts: list[str]) -> dict[str, str]:
    """Small parts with new weights; name -> folder: those of `photos`, and a Llama like SmolLM2."""
    words = tokenizer(texts)
    torch.manual_seed(0)
    florence = Florence2Config.from_pretrained(ROOT / "pretrained" / "tiny" / "encoder")
    florence.image_token_id = len(words)
    florence.text_config.vocab_size = len(words) + 1
    florence.text_config.max_position_embeddings = 256
    ids = {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    wholes = {
        "encoder": Florence2ForConditionalGeneration(florence).float(),
        "qwen": Qwen2ForCausalLM(Qwen2Config(**ids, **sizes, num_key_value_heads=2)),
        "smollm": LlamaForCausalLM(LlamaConfig(**ids, **sizes, num_key_value_heads=2)),
        "sentences": BertModel(BertConfig(vocab_size=len(words), **sizes)),
    }
    for name, model in wholes.items():
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    stable = small_models.decoder()
    text = CLIPTextConfig(**ids, **(sizes | {"hidden_size": 24}), max_position_embeddings=20)
    for name, part in (("vae", stable.vae), ("unet", stable.unet), ("scheduler", stable.scheduler)):
        part.save_pretrained(root / "decoder" / name)
    CLIPTextModel(text).save_pretrained(root / "decoder" / "text_encoder")
    words.save_pretrained(root / "decoder" / "tokenizer")
    return {name: str(root / name) for name in (*wholes, "decoder")}


# What is changed in the shipped profiles: the parts, the sizes that follow from them, and how long they train.
SHORT = {"steps": 3, "batch_size": 8, "accumulation": 2, "checkpoint_every": 2, "log_every": 1}
TINY = str(ROOT / "pretrained" / "tiny")


def changes(profile: str, small: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Section -> its values for a run of seconds."""
    evaluation = {"steps": 2, "feature_network": None, "sentence_model": small["sentences"]}
    short = {"stage1": SHORT, "stage2": SHORT, "evaluate": evaluation}
    if profile == "photos-offline":
        return short | {
            "encoder": {"pretrained": f"{TINY}/encoder"},
            "decoder": {"pretrained": f"{TINY}/teacher"},
            "language_model": {"pretrained": small["smollm"], "prefix_width": 48},
        }
    ours = {"architecture": None}
    return short | {
        "data": {"image_size": 32},
        "encoder": {**ours, "pretrained": small["encoder"], "image_size": 64, "queries": 8, "projection_width": 32},
        "decoder": {**ours, "pretrained": small["decoder"], "image_size": 32},
        "language_model": {**ours, "pretrained": small["qwen"], "prefix_width": 48},
    }


def project(folder: Path, profile: str, small: dict[str, str]) -> Path:
    """A project with the shipped profile on small parts."""
    projects.bare(folder)
    path = folder / "configs" / f"{profile}.yaml"
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, values in changes(profile, small).items():
        settings[section] |= values
    settings["data"]["gate"]["min_side"] = settings["data"]["image_size"]  # the gate sees the squares that were cut
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    projects.commit(folder, f"{profile} on small parts")
    return folder

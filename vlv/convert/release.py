"""The released VLV checkpoints (github.com/Tiezheng11/Vision-Language-Vision) -> saved model folders of this project.

The layouts are those of the release's classes: Stage 1 is its `SDModel` (models/VLV_stage1.py), saved as a nested
checkpoint_N.pt or consolidated from DeepSpeed; Stage 2 is its `CLIPDecoder` (models/VLV_stage2.py), saved as model.pt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vlv.config import Config, Generation, Paths
from vlv.convert import florence
from vlv.convert.checkpoints import Checkpoint, ConversionError, Renamed, Rule, read, rename, some
from vlv.io import files
from vlv.models.autoencoder import Autoencoder
from vlv.models.captioner import Captioner

# How the release writes: train/Caption_inference.py and `generate` in models/VLV_stage2.py.
GENERATION = Generation(beams=4, max_tokens=300, begin="prefix", end="language_model", clean_up=True)

# Frozen tensors must equal those of the configured part. The release stores some in bfloat16, so up to its rounding.
_ROUNDING = 2.0**-8


def _encoder(prefix: str) -> list[Rule]:
    """Florence-2, queries and projection; `prefix` is a pattern."""
    return [
        Rule(prefix + r"query_embed", "encoder.queries"),
        Rule(prefix + r"language_proj\.([02])\.(weight|bias)", r"encoder.projection.layers.\1.\2"),
        Rule(
            prefix + r"model\.language_model\.lm_head\.weight", None,
            "Florence-2's word head: the release freezes a copy of it and nothing reads it",
        ),
        *(rule.under(prefix + r"model\.", "encoder.florence.") for rule in florence.RULES),
    ]  # fmt: skip


def _text_encoder(prefix: str, target: str) -> list[Rule]:
    return [
        Rule(prefix + r"text_encoder\.text_model\.embeddings\.position_ids", None, "the numbers 0, 1, 2 ..."),
        Rule(prefix + r"text_encoder\.text_model\.(.+)", target + r"\1"),
    ]


STAGE1 = [
    *_encoder(""),
    *_text_encoder("", "decoder.conditioner.text_encoder."),
    Rule(r"(unet|vae)\.(.+)", r"decoder.\1.\2"),
]
STAGE2 = [
    *_encoder(r"VLV_model\."),
    *_text_encoder(r"VLV_model\.", "conditioner.text_encoder."),
    Rule(r"mlp\.layers\.([02])\.(weight|bias)", r"prefix.layers.\1.\2"),
    Rule(r"qwen2_model\.(.+)", r"language_model.\1"),
]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        taken: names of tensors that were copied.
        verified: names of tensors that equal those of the configured frozen parts.
        dropped: old name -> why it was dropped.
    """

    taken: list[str]
    verified: list[str]
    dropped: dict[str, str]


def stage1(source: Path, output: Path, settings: Config, paths: Paths) -> Conversion:
    """Write a released Stage 1 checkpoint as an auto-encoder's folder. It prepares pictures as the release does.

    Raises:
        ConversionError: unknown, missing or misshapen tensors, or other frozen parts than the configured ones.
    """
    _check(output, settings)
    settings = as_used(settings)
    checkpoint = read(source)
    found = rename(checkpoint.tensors, STAGE1, str(checkpoint.path))
    model = Autoencoder.build(settings, paths)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    done = _fill(model, learned, found, checkpoint)
    model.save(output, settings, paths, _card("autoencoder", settings, checkpoint))
    _note(output, checkpoint, done)
    return done


def stage2(source: Path, output: Path, settings: Config, paths: Paths) -> Conversion:
    """Write a released Stage 2 checkpoint as a captioner's folder. It prepares pictures and writes as the release does.

    Raises:
        ConversionError: as for `stage1`; or a configuration whose prefix is not the released form.
    """
    _check(output, settings)
    if settings.language_model.prefix_positions or settings.language_model.standardise_context:
        raise ConversionError(
            "The released prefix is an MLP alone: set language_model.prefix_positions and standardise_context to false."
        )
    settings = as_used(settings)
    checkpoint = read(source)
    found = rename(checkpoint.tensors, STAGE2, str(checkpoint.path))
    model = Captioner.build(settings, paths)
    # A standardising prefix keeps the statistics 0 and 1 here, because no checkpoint holds any.
    learned = set(model.trained(settings)) - {name for name, _ in model.named_buffers()}
    done = _fill(model, learned, found, checkpoint)
    model.save(output, settings, paths, _card("captioner", settings, checkpoint))
    _note(output, checkpoint, done)
    return done


def _check(output: Path, settings: Config) -> None:
    if output.exists():
        raise ConversionError(f"{output} exists already; give another place, or remove it.")
    if settings.encoder.start_on_text_side:
        raise ConversionError("The released projection has no mean and std: set encoder.start_on_text_side to false.")


def as_used(settings: Config) -> Config:
    """`settings` with the release's preparation of pictures and its way of writing captions."""
    return settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"resize": "torchvision"}),
            "language_model": settings.language_model.model_copy(update={"generation": GENERATION}),
        }
    )


@torch.no_grad()
def _fill(model: nn.Module, learned: set[str], found: Renamed, checkpoint: Checkpoint) -> Conversion:
    """Copy the trained tensors into `model`, and compare the others with the model's own."""
    own = model.state_dict(keep_vars=True)
    names = {id(p): name for name, p in model.named_parameters()}  # one name for what is tied
    taken: dict[str, torch.Tensor] = {}
    verified, surplus, misshapen, foreign = [], [], [], []
    for new, tensor in found.tensors.items():
        if new not in own:
            surplus.append(found.origin[new])
            continue
        name, target = names.get(id(own[new]), new), own[new].detach()
        given = _with_added_words(tensor, target) if new.endswith(florence.WORDS) else tensor
        if given.shape != target.shape:
            misshapen.append(f"{found.origin[new]} {tuple(tensor.shape)} instead of {tuple(target.shape)}")
        elif name in learned:
            if name in taken and not torch.equal(taken[name], given):
                raise ConversionError(f"{checkpoint.path}: {found.origin[new]} differs from what it should be tied to.")
            taken[name] = given
        elif _same(given, target):
            verified.append(found.origin[new])
        else:
            foreign.append(found.origin[new])
    _refuse(checkpoint, sorted(learned - taken.keys()), surplus, misshapen, foreign)
    for name, tensor in taken.items():
        own[name].copy_(tensor)
    return Conversion(sorted(taken), verified, found.dropped | checkpoint.beside)


def _with_added_words(table: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """transformers' Florence-2 has a few more words than Microsoft's (`<image>` and padding): its own rows for them."""
    if table.ndim == own.ndim == 2 and table.shape[1] == own.shape[1] and len(table) < len(own):
        return torch.cat([table, own[len(table) :].to(table)])
    return table


def _same(given: torch.Tensor, own: torch.Tensor) -> bool:
    difference = (given.float() - own.float()).abs()
    return bool((difference <= _ROUNDING * own.float().abs() + 1e-6).all())


def _refuse(
    checkpoint: Checkpoint,
    missing: Sequence[str],
    surplus: Sequence[str],
    misshapen: Sequence[str],
    foreign: Sequence[str],
) -> None:
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing, by our names: {some(missing)}")
    if surplus:
        problems.append(f"{len(surplus)} have no place in the configured model: {some(surplus)}")
    if misshapen:
        problems.append(f"{len(misshapen)} have another shape: {some(misshapen)}")
    if foreign:
        problems.append(
            f"{len(foreign)} that the configuration holds frozen differ from the configured parts: {some(foreign)} "
            "(other base models, or another choice of what learns: see encoder, decoder, stage1.learn)"
        )
    if problems:
        raise ConversionError(f"{checkpoint.path} was not converted; " + "; ".join(problems) + ".")


def _card(kind: str, settings: Config, checkpoint: Checkpoint) -> str:
    return f"""# VLV {kind} ({settings.profile}), converted from the release

- source: {checkpoint.path.name}, sha256 {files.sha256_file(checkpoint.path)}; conversion.json lists every tensor
- trained tensors: model.safetensors
- frozen parts: named in config.json with the hash of their contents; loading checks them
- method: Vision-Language-Vision auto-encoder, arXiv 2507.07104
"""


def _note(output: Path, checkpoint: Checkpoint, done: Conversion) -> None:
    value = {
        "source": checkpoint.path.name, "taken": done.taken, "equal_to_the_configured_parts": done.verified,
        "dropped": done.dropped,
    }  # fmt: skip
    files.write_json(output / "conversion.json", value)

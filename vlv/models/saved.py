"""Saved models: a folder with config.json, the trained tensors as safetensors, and a card.

Frozen pretrained parts are not copied. The folder names them, each with the hash of its content. Loading is strict: the
file must hold exactly the trained tensors, and the parts must be those that the model was trained with.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from typing_extensions import TypedDict  # pydantic accepts typing's own only from Python 3.12 on

from vlv import config
from vlv.config import Config, Paths
from vlv.inputs import source
from vlv.io import assets, files

# These sections describe where and how a training ran, not the model. Without them the same model gives the same
# files on every machine.
_MACHINE = {"compute", "tracking"}
CONFIG, WEIGHTS, CARD, PARTS = "config.json", "model.safetensors", "README.md", "parts"


class ModelFolderError(RuntimeError):
    """The folder does not hold the expected model; the message names the folder, the keys and the remedy."""


class Part(TypedDict):
    """A frozen pretrained part: its source and the hash of its content."""

    reference: str
    sha256: str


@dataclass(frozen=True)
class Saved:
    """The contents of config.json: `kind` ("autoencoder" or "captioner"), the configuration and the pretrained parts
    by section name."""

    kind: str
    config: Config
    parts: dict[str, Part]


def save(
    folder: Path,
    kind: str,
    settings: Config,
    paths: Paths,
    parts: list[str],
    tensors: Mapping[str, torch.Tensor],
    card: str,
) -> None:
    """Write a model folder atomically; `parts` names the configuration's sections whose pretrained parts it needs."""
    described = {}
    for name in parts:
        section = getattr(settings, name)
        reference = (
            section.pretrained if section.weights == "pretrained" else section.architecture or section.pretrained
        )
        described[name] = assets.describe(reference, assets.resolve(reference, paths))
    contents = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with files.atomic_folder(folder) as temporary:
        safetensors.torch.save_file(contents, temporary / WEIGHTS, metadata={"format": "pt"})
        files.write_json(
            temporary / CONFIG,
            {
                "format": _format(kind),
                "config": settings.model_dump(mode="json", by_alias=True, exclude=_MACHINE),
                "parts": described,
            },
        )
        files.write_text(temporary / CARD, card)


def read(folder: Path, kind: str) -> Saved:
    """Read and check config.json.

    Raises:
        ModelFolderError: not a folder of this kind, or the decoder's module is missing or inside the folder.
    """
    path = folder / CONFIG
    if not path.exists():
        raise ModelFolderError(f"{folder} is not a saved {kind}: it has no {CONFIG}. Train one with: dvc repro")
    value = files.read_json_object(path)
    if value.get("format") != _format(kind):
        raise ModelFolderError(f"{folder} holds {value.get('format', 'something else')!r}, not a {_format(kind)}")
    try:
        parts = TypeAdapter(dict[str, Part]).validate_python(value.get("parts"))
        found = Saved(kind, config.validate(value.get("config"), str(path)), parts)
    except config.ConfigError as error:
        raise ModelFolderError(f"{error}\nRestore the file, or train again.") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelFolderError(
            f"{path} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']}). Restore it, or train again."
        ) from error
    _refuse_code_inside(folder, found.config.decoder.module)
    return found


def _format(kind: str) -> str:
    return f"vlv-{kind}-2"  # version 1 had other names for some tensors and settings


def _refuse_code_inside(folder: Path, module: str) -> None:
    """Refuse a model folder that brings its own decoder code: loading must run no code from the folder.

    Raises:
        ModelFolderError: the decoder's module does not exist, or it or one of its parent packages is in the folder.
    """
    names = module.split(".")
    found = [source.find(".".join(names[: i + 1])) for i in range(len(names))]
    if found[-1] is None:
        raise ModelFolderError(
            f"{folder} was trained with the kind of decoder {module}, and there is no such module. Install it, or "
            "start Python in the folder that holds it."
        )
    if inside := [file for file in found if file is not None and file.resolve().is_relative_to(folder.resolve())]:
        raise ModelFolderError(
            f"{folder} names code of its own as its kind of decoder ({inside[0]}), which is never run. If you trust "
            "it, install it as a package and set decoder.kind to that."
        )


def parts_root(folder: Path, saved: Saved, paths: Paths) -> Paths:
    """The base of the parts' references: the folder itself if it holds the parts, otherwise the project.

    Raises:
        ModelFolderError: a part differs from the one that the model was trained with.
    """
    root = Paths(folder / PARTS) if (folder / PARTS).exists() else paths
    for name, part in saved.parts.items():
        local = assets.resolve(part["reference"], root)
        found = assets.describe(part["reference"], local)["sha256"]
        if found != part["sha256"]:
            raise ModelFolderError(
                f"{folder} was trained with another {name}: {local} has sha256 {found[:12]}, it needs "
                f"{part['sha256'][:12]}. Restore that part, or train again."
            )
    return root


def restore(module: nn.Module, names: set[str], folder: Path) -> None:
    """Copy the trained tensors into `module`; exactly `names` must be there.

    Raises:
        ModelFolderError: keys or shapes differ; the message lists them and names the folder.
    """
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFolderError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    missing, unexpected = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
    if missing or unexpected:
        raise ModelFolderError(
            f"{folder} does not fit this model: {len(missing)} tensors are missing {missing[:4]}, "
            f"{len(unexpected)} unexpected {unexpected[:4]}."
        )
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                raise ModelFolderError(
                    f"{folder}: {name} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
                )
            own[name].copy_(tensor)


def inference_device() -> torch.device:
    """The device of a loaded model: the accelerator (chosen by CUDA_VISIBLE_DEVICES), otherwise the CPU.

    In training, accelerate gives each process its own device instead.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def bundle(folder: Path, paths: Paths, target: Path) -> None:
    """Copy a saved model together with its parts to `target`, where it loads without the project."""
    value = files.read_json_object(folder / CONFIG)
    shutil.copytree(folder, target)
    for part in value["parts"].values():
        if part["reference"].startswith("hf:"):
            continue  # fetched by revision and checked by hash on first use
        original = assets.resolve(part["reference"], paths)
        copied = target / PARTS / part["reference"]
        if not copied.exists():
            shutil.copytree(original, copied)

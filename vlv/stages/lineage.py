"""What a result was made from, as hashes: the fingerprint of a training, the content of a pretrained part."""

import json
from typing import Any

import torch

from vlv import assets, config, files
from vlv.config import Config, Paths


def fingerprint_of(module: torch.nn.Module) -> str:
    """Hash of all tensors of a module."""
    contents = "".join(
        f"{name}:{files.sha256_bytes(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())}"
        for name, t in sorted(module.state_dict().items())
        if t.numel()
    )
    return files.sha256_bytes(contents.encode())


def identity(part: config.Encoder | config.Decoder | config.LanguageModel, paths: Paths) -> str:
    """The content of a pretrained part: its reference's hash, and whether its weights are drawn anew."""
    reference = part.architecture if part.weights == "random" and part.architecture else part.pretrained
    described = assets.describe(reference, assets.resolve(reference, paths))
    return f"{part.weights}:{described['sha256']}"


# How a step is computed, not what: a stopped training may go on with another choice.
_FREE = {"accumulation", "gradient_checkpointing"}


def fingerprint(settings: Config, paths: Paths, sections: list[str]) -> str:
    """Everything that decides a training: its sections, its data, its pretrained parts."""
    dump = settings.model_dump(mode="json", by_alias=True)
    chosen: dict[str, Any] = {name: {k: v for k, v in dump[name].items() if k not in _FREE} for name in sections}
    chosen["manifest"] = files.sha256_file(paths.data / "manifest.json")
    for name in ("encoder", "decoder", "language_model"):
        if name in sections:
            chosen[f"{name}_content"] = identity(getattr(settings, name), paths)
    if "stage2" in sections:
        chosen["stage1_weights"] = files.sha256_file(paths.work / "stage1" / "model" / "model.safetensors")
    return files.sha256_bytes(json.dumps(chosen, sort_keys=True).encode())

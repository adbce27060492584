"""Writes what decides each stage's result besides its data to files that DVC compares.

A stage of dvc.yaml depends on `work/inputs/STAGE.json`: hashes of the code that it reaches and of its pretrained parts,
and the settings that it reads, with their defaults. A change of these makes the stage stale; a change of anything
else, such as a comment, another stage or another kind of decoder, does not.
"""

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlv import config
from vlv.config import Config, Paths
from vlv.evaluation import truth
from vlv.inputs import closure
from vlv.io import assets, files

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


# The settings that each stage reads. tests/test_closure.py checks dvc.yaml against them.
_BUILT = ["data.image_size", "data.resize", "decoder", "encoder"]
SETTINGS = {
    "validate": ["data", "language_model"],
    "stage1": [*_BUILT, "stage1"],
    "stage2": [*_BUILT, "language_model", "stage1", "stage2"],
    "evaluate": [*_BUILT, "language_model", "profile", "stage1", "stage2", "evaluate"],
    "register": ["profile", "register"],
}
# These change how a step is computed, not its result: a stopped training may continue with other values.
_FREE = {"accumulation", "gradient_checkpointing"}
# The code that MLflow runs when it serves a registered version.
_SERVED = ("vlv.registry.serving:ServedModel",)


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Write `work/inputs/STAGE.json` for each stage, and log what changed in it."""
    written: dict[str, Any] = {}
    for stage in SETTINGS:
        path = paths.work / "inputs" / f"{stage}.json"
        written[stage] = inputs(stage, settings, paths)
        before = files.read_json(path) if path.exists() else None
        if before != written[stage]:
            files.write_json(path, written[stage])
        if before is not None and (names := changed(before, written[stage])):
            log.info("%s: changed: %s", stage, ", ".join(names))
    return written


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Modules, settings and parts that differ between two contents of a stage's file."""
    differing = {
        name
        for group in now
        for name in {*before.get(group, {}), *now[group]}
        if before.get(group, {}).get(name) != now[group].get(name)
    }
    return sorted(differing)


def decoder_code(section: config.Decoder) -> list[str]:
    """The roots of the configured kind of decoder for `closure`, because it is imported by its name.

    For a kind outside the package, all code of its module counts.

    Raises:
        ConfigError: there is no such module.
    """
    module = section.module
    if not (everything := closure.definitions(module)):
        raise config.ConfigError(
            f"decoder.kind: there is no module {module}. Install it, or start Python in the folder that holds it."
        )
    return [f"{module}:build_conditioner", f"{module}:build"] if module.startswith("vlv.") else everything


def roots(stage: str, settings: Config) -> list[str]:
    """The functions where a stage's code begins, for `closure`."""
    found = [f"vlv.stages.{stage}:run"]
    if stage != "validate":
        found += decoder_code(settings.decoder)
    if stage == "evaluate" and settings.evaluate.counting:
        found += [f"{settings.evaluate.counting}:{function}" for function in truth.FUNCTIONS]
    return [*found, *_SERVED] if stage == "register" else found


def inputs(stage: str, settings: Config, paths: Paths) -> dict[str, Any]:
    """What decides a stage's result besides its data: its code by module, its settings, its pretrained parts.

    Raises:
        AssetError: a part is missing.
    """
    dump = settings.model_dump(mode="json", by_alias=True)
    return {
        "code": closure.hashes(roots(stage, settings)),
        "settings": {key: _setting(dump, key) for key in SETTINGS[stage]},
        "parts": _parts(stage, settings, paths),
    }


def _parts(stage: str, settings: Config, paths: Paths) -> dict[str, str]:
    sections: dict[str, config.Encoder | config.Decoder | config.LanguageModel] = {
        "encoder": settings.encoder,
        "decoder": settings.decoder,
        "language_model": settings.language_model,
    }
    parts = {name: part_hash(section, paths) for name, section in sections.items() if name in SETTINGS[stage]}
    if stage == "evaluate" and settings.evaluate.recogniser:
        parts["recogniser"] = assets.content(settings.evaluate.recogniser, paths)
    return parts


def _setting(dump: dict[str, Any], key: str) -> Any:
    value: Any = dump
    for name in key.split("."):
        value = value[name]
    return {name: one for name, one in value.items() if name not in _FREE} if isinstance(value, dict) else value


def tensor_hash(module: "torch.nn.Module") -> str:
    """Hash of all tensors of a module."""
    import torch

    contents = "".join(
        f"{name}:{files.sha256_bytes(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())}"
        for name, t in sorted(module.state_dict().items())
        if t.numel()
    )
    return files.sha256_bytes(contents.encode())


def part_hash(part: config.Encoder | config.Decoder | config.LanguageModel, paths: Paths) -> str:
    """Hash of a pretrained part's content and of whether its weights are drawn at random."""
    reference = part.architecture if part.weights == "random" and part.architecture else part.pretrained
    return f"{part.weights}:{assets.content(reference, paths)}"


@dataclass(frozen=True)
class TrainingHashes:
    """The hashes that decide a training.

    Attributes:
        code: hashes of the code by module.
        rest: one hash of settings, pretrained parts and data, and of Stage 1's model for Stage 2.
    """

    code: dict[str, str]
    rest: str

    @property
    def input_hash(self) -> str:
        """One hash of both."""
        return files.sha256_bytes(json.dumps([self.code, self.rest], sort_keys=True).encode())


def training_hashes(stage: str, settings: Config, paths: Paths) -> TrainingHashes:
    """The hashes that decide the training of a stage.

    Raises:
        ConfigError: there is no data, or for Stage 2 no model of Stage 1.
    """
    chosen: dict[str, Any] = inputs(stage, settings, paths)
    code = chosen.pop("code")
    manifest = paths.data / "manifest.json"
    if not manifest.exists():
        raise config.ConfigError(f"{manifest} does not exist. Make the data: vlv data download (or vlv data import)")
    chosen["manifest"] = files.sha256_file(manifest)
    if stage == "stage2":
        weights = paths.work / "stage1" / "model" / "model.safetensors"
        if not weights.exists():
            raise config.ConfigError(
                f"{weights} does not exist, and Stage 2 starts from it. Train it with: dvc repro stage1"
            )
        chosen["stage1_weights"] = files.sha256_file(weights)
    return TrainingHashes(code, files.sha256_bytes(json.dumps(chosen, sort_keys=True).encode()))

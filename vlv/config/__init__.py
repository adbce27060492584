"""Typed configuration: one section for each part and stage, as in params.yaml.

A profile (configs/NAME.yaml) is a whole params.yaml. Sections are strict: an unknown key or a value outside
its range is an error that names the key. Nothing here imports torch, so that `vlv --help` is instant.
"""

from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from vlv.config.compute import Compute, LaunchByStage
from vlv.config.data import Data, DataGate, Encoding, ImportedSource, Resize, ScenesSource
from vlv.config.parts import Decoder, Encoder, Generation, LanguageModel
from vlv.config.paths import Paths
from vlv.config.results import Evaluate, Register, Tracking
from vlv.config.section import ConfigError, Precision, Section, Weights
from vlv.config.training import Lora, Optimizer, Stage1, Stage2, Timesteps, Training
from vlv.io import files

__all__ = [
    "Compute", "Config", "ConfigError", "Data", "DataGate", "Decoder", "Encoder", "Encoding", "Evaluate", "Generation",
    "ImportedSource", "LanguageModel", "LaunchByStage", "Lora", "Optimizer", "Paths", "Precision", "Register", "Resize",
    "ScenesSource", "Section", "Stage1", "Stage2", "Timesteps", "Tracking", "Training", "Weights", "load", "parse",
    "profiles", "use",
]  # fmt: skip

# Keys that were renamed: old name -> new name. An old key is refused with a message that gives the new one.
RENAMED: dict[str, str] = {
    "stage1.draws_per_image": "stage1.noise_samples_per_image",
    "compute.patience_minutes": "compute.timeout_minutes",
    "decoder.use_t5": "decoder.options.use_t5",
    "evaluate.untrained_floor": "evaluate.untrained_baseline",
}


class Config(Section):
    """A whole params.yaml."""

    profile: str = Field(description="name of the profile in configs/ that this file is a copy of")
    data: Data
    encoder: Encoder
    decoder: Decoder
    language_model: LanguageModel
    stage1: Stage1
    stage2: Stage2
    evaluate: Evaluate
    register_: Annotated[Register, Field(alias="register")]
    compute: Compute = Field(default_factory=Compute)
    tracking: Tracking = Field(default_factory=Tracking)

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.evaluate.reconstructions > self.evaluate.captions:
            raise ValueError("evaluate.reconstructions must not exceed evaluate.captions")
        if self.stage2.cache_features and (not self.stage2.trains_encoder or self.stage1.trains_vision_tower):
            raise ValueError(
                f"stage2.cache_features needs a stage2.learn that trains the encoder and a stage1.learn that keeps the "
                f"vision tower frozen, not {self.stage2.learn} and {self.stage1.learn}: a frozen encoder's context is "
                f"cached anyway, and a trained tower has no fixed features"
            )
        if self.encoder.drop_path and (self.stage1.cache_features or self.stage2.cache_features):
            raise ValueError(
                "encoder.drop_path changes the vision tower's features in each step: set stage1.cache_features and "
                "stage2.cache_features to false"
            )
        if self.stage2.trains_encoder and not self.stage2.queries_learn and not self.stage1.trained_parts:
            raise ValueError(
                f"with stage1.learn {self.stage1.learn} and stage2.queries_learn false, Stage 2 trains nothing of the "
                f"encoder: choose a stage2.learn without it, such as mlp+llm"
            )
        return self


def parse(text: str, name: str) -> Config:
    """Check the YAML text of a params.yaml or profile; `name` is what an error calls it.

    Raises:
        ConfigError: not YAML, a key that is unknown or given twice, or a value of a wrong type or range.
    """
    try:
        value: Any = files.parse_yaml(text, name, "Correct it.")
    except files.FileError as error:
        raise ConfigError(str(error)) from error
    return validate(value, name)


def validate(value: Any, name: str) -> Config:
    """Check the content of a params.yaml or of a saved model's configuration; `name` is what an error calls it.

    Raises:
        ConfigError: a key that is unknown or was renamed, or a value of a wrong type or range.
    """
    if renamed := [f"  {old} is now {new}" for old, new in RENAMED.items() if _has(value, old)]:
        raise ConfigError(f"{name} has keys that were renamed; change their names:\n" + "\n".join(renamed))
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(whole file)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{name} has {len(lines)} error(s):\n" + "\n".join(lines)) from error


def _has(value: Any, key: str) -> bool:
    """Whether nested mappings have the dotted `key`."""
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    return True


def load(paths: Paths) -> Config:
    """Read params.yaml."""
    if not paths.params.exists():
        raise ConfigError(f"{paths.params} does not exist. Write one with: vlv config use tiny")
    return parse(files.read_text(paths.params), str(paths.params))


def profiles(paths: Paths) -> list[str]:
    """Names of the profiles in configs/."""
    return sorted(path.stem for path in (paths.root / "configs").glob("*.yaml"))


def use(paths: Paths, profile: str) -> Config:
    """Write a profile into params.yaml, where DVC sees it. Nothing is written if it is not valid."""
    source = paths.root / "configs" / f"{profile}.yaml"
    if not source.exists():
        raise ConfigError(f"There is no profile {profile!r}; there are: {', '.join(profiles(paths))}")
    text = files.read_text(source)
    config = parse(text, str(source))
    if not paths.params.exists() or paths.params.read_bytes() != text.encode():
        files.write_text(paths.params, text)
    return config

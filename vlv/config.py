"""Typed configuration: one section for each part and stage, as in params.yaml.

A profile (configs/NAME.yaml) is a whole params.yaml. Sections are strict: an unknown key or a value outside
its range is an error that names the key. This file imports no torch, so that `vlv --help` is instant.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlv import files


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and the remedy."""


class Section(BaseModel):
    """Base of all sections: unknown keys refused, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weights = Literal["pretrained", "random"]
Precision = Literal["fp32", "bf16"]


class ScenesSource(Section):
    """Emoji scenes, drawn on the spot (vlv.scenes)."""

    kind: Literal["scenes"]
    sprites: str = Field(description="asset reference to Twemoji's 72x72 PNG files")
    train: Positive
    validation: Positive
    test: Positive
    seed: int = 0


class ImportedSource(Section):
    """Images brought in by `vlv data import`; the command records here where they came from."""

    kind: Literal["imported"]
    description: str = Field(description="where the images come from; shown in reports")


class DataGate(Section):
    """Bounds that the Great Expectations gate holds the data to."""

    min_side: Positive = Field(description="pixels, shorter side")
    max_aspect: Annotated[float, Field(ge=1.0)] = Field(description="longer side / shorter side")
    caption_words_min: Annotated[int, Field(ge=0)]
    caption_words_max: Positive
    max_duplicate_share: Share = Field(description="share of samples whose image bytes appear elsewhere")
    captions_required: bool = Field(description="False where only Stage 1 is to be trained")


class Data(Section):
    """The raw data under data/: what it is made from and what it must satisfy."""

    source: ScenesSource | ImportedSource = Field(discriminator="kind")
    image_size: Positive = Field(description="pixels; images are scaled and cropped to this square")
    shard_size: Annotated[int, Field(gt=0, le=10_000)] = Field(description="samples in one tar")
    gate: DataGate


class Encoder(Section):
    """The vision encoder: Florence-2 with learnable queries (arXiv 2507.07104)."""

    pretrained: str = Field(description="reference to a Florence-2 in Hugging Face form")
    weights: Weights = Field(description="'random' keeps the architecture and draws new weights (a control)")
    architecture: str | None = Field(
        default=None, description="folder with config.json, where the weights are not at hand"
    )
    image_size: Positive = Field(description="pixels; the vision tower's input (paper: 768)")
    prompt: str = Field(description="task prompt that follows the image features; may be empty")
    queries: Positive = Field(description="learnable queries = caption embeddings (paper: 77)")
    projection_width: Positive = Field(description="hidden width of language_proj")
    start_on_text_side: bool = Field(
        description="normalise the projection and start it at the text side's per-position mean and spread"
    )
    start_gain: Annotated[float, Field(gt=0)] = Field(default=0.5, description="share of that spread at the start")


class Decoder(Section):
    """The frozen text-to-image model."""

    kind: Literal["stable_diffusion"]
    pretrained: str = Field(
        description="reference to a diffusers folder: vae, unet, text_encoder, tokenizer, scheduler"
    )
    weights: Weights
    architecture: str | None = None
    image_size: Positive = Field(description="pixels; what it draws (paper: 384)")
    use_text_encoder: bool = Field(
        description="True: caption embeddings pass the frozen text encoder (the paper's headline); "
        "False: they are the cross-attention context itself (the release's other choice)"
    )


class LanguageModel(Section):
    """The causal language model that writes the caption."""

    pretrained: str = Field(description="reference to a causal LM and its tokenizer, any Auto class")
    weights: Weights
    architecture: str | None = None
    prefix_width: Positive = Field(description="hidden width of the MLP between context and LM")


class Optimizer(Section):
    """AdamW with a schedule; learning rates by group of parameters."""

    learning_rate: Annotated[float, Field(gt=0)]
    group_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="parameter-name prefix -> its own learning rate; longest prefix wins"
    )
    betas: Annotated[list[float], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    schedule: Literal["constant", "cosine", "hold_then_linear"]
    hold_share: Share = Field(default=0.5, description="hold_then_linear: share of steps at the full rate")
    final_rate_share: Share = Field(default=0.0, description="rate at the last step / full rate")
    clip_norm: Annotated[float, Field(gt=0)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="moving average of the trained weights that is saved in the end; 0: none"
    )


class Timesteps(Section):
    """How diffusion timesteps are drawn."""

    mode: Literal["uniform", "stratified", "fixed"]
    fixed: Annotated[int, Field(ge=0, lt=1000)] = 0
    high_noise_share: Share = Field(
        default=0.0, description="share of draws from [high_noise_from, 1000), where the context decides most"
    )
    high_noise_from: Annotated[int, Field(ge=0, lt=1000)] = 600


class Training(Section):
    """What every training shares."""

    steps: Positive = Field(description="optimizer steps")
    batch_size: Positive = Field(description="samples in one optimizer step, over all processes")
    accumulation: Positive = Field(default=1, description="micro-batches in one step; divides batch_size")
    precision: Precision
    seed: int
    checkpoint_every: Positive = Field(description="steps")
    log_every: Positive = Field(description="steps")
    optimizer: Optimizer

    @model_validator(mode="after")
    def _divides(self) -> "Training":
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}")
        return self


class Stage1(Training):
    """Stage 1: images only (arXiv 2507.07104)."""

    learn: Literal["language_model", "decoder_only", "all", "queries_only"] = Field(
        description="what learns in the encoder besides queries and projection"
    )
    draws_per_image: Positive = Field(description="noise draws for each encoded image; divides batch_size")
    loss: Literal["mse", "l1"]
    timesteps: Timesteps
    same_noise: bool = Field(default=False, description="one noise tensor for the whole batch")
    cache_latents: bool = Field(description="compute the VAE's mean and spread once and keep them on disk")
    cache_features: bool = Field(description="compute the frozen vision tower once and keep its features on disk")

    @model_validator(mode="after")
    def _check(self) -> "Stage1":
        if self.batch_size % self.draws_per_image:
            raise ValueError(f"draws_per_image {self.draws_per_image} does not divide batch_size {self.batch_size}")
        if self.cache_features and self.learn == "all":
            raise ValueError("cache_features needs a frozen vision tower, but learn is 'all'")
        return self


class Stage2(Training):
    """Stage 2: image-caption pairs (arXiv 2507.07104)."""

    learn: Literal["mlp", "mlp+llm"] = Field(description="what learns")
    max_caption_tokens: Positive = Field(description="longer captions are cut (and counted)")


class Evaluate(Section):
    """Evaluation on the test split."""

    captions: Positive = Field(description="test scenes or images to caption")
    reconstructions: Positive = Field(description="test images to reconstruct; FID uses as many")
    guidance: Annotated[float, Field(ge=1.0)]
    steps: Positive = Field(description="sampler steps")
    seed: int
    batch_size: Positive
    feature_network: str | None = Field(description="asset reference to the Inception network; null: no FID")
    sentence_model: str | None = Field(default=None, description="asset reference to a sentence-embedding model")
    recogniser: str | None = Field(
        default=None, description="reference to the scene recogniser; null where there is no known truth"
    )
    untrained_floor: bool = Field(description="also train Stage 2 on an untrained Stage 1, as a floor")


class Register(Section):
    """Registration and promotion."""

    captioner_name: str
    autoencoder_name: str
    promote: bool = Field(description="the flow promotes the new version if it passes the gates")


class Config(Section):
    """A whole params.yaml."""

    profile: str
    data: Data
    encoder: Encoder
    decoder: Decoder
    language_model: LanguageModel
    stage1: Stage1
    stage2: Stage2
    evaluate: Evaluate
    register_: Annotated[Register, Field(alias="register")]

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.evaluate.reconstructions > self.evaluate.captions:
            raise ValueError("evaluate.reconstructions must not exceed evaluate.captions")
        return self


@dataclass(frozen=True)
class Paths:
    """Where things lie in a project folder (the one with params.yaml)."""

    root: Path

    @staticmethod
    def find() -> "Paths":
        """The project that VLV_ROOT names, else the nearest folder upwards with params.yaml or configs/."""
        named = os.environ.get("VLV_ROOT")
        if named:
            return Paths(Path(named).resolve())
        here = Path.cwd().resolve()
        for folder in (here, *here.parents):
            if (folder / "params.yaml").exists() or (folder / "configs" / "tiny.yaml").exists():
                return Paths(folder)
        raise ConfigError(f"No params.yaml in {here} or above it. Go to the project folder, or set VLV_ROOT.")

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def cache(self) -> Path:
        """Derived data, safe to delete: fetched assets, latents, features."""
        return Path(os.environ.get("VLV_CACHE", self.root / ".cache"))


def parse(text: str, name: str) -> Config:
    """Check the YAML text of a params.yaml or profile; `name` is what an error calls it.

    Raises:
        ConfigError: not YAML, an unknown key, or a value of a wrong type or range.
    """
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(whole file)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{name} has {len(lines)} error(s):\n" + "\n".join(lines)) from error


def load(paths: Paths) -> Config:
    """Read params.yaml."""
    if not paths.params.exists():
        raise ConfigError(f"{paths.params} does not exist. Write one with: vlv config use tiny")
    return parse(paths.params.read_text(encoding="utf-8"), str(paths.params))


def profiles(paths: Paths) -> list[str]:
    """Names of the profiles in configs/."""
    return sorted(path.stem for path in (paths.root / "configs").glob("*.yaml"))


def use(paths: Paths, profile: str) -> Config:
    """Write a profile into params.yaml, where DVC sees it. Nothing is written if it is not valid."""
    source = paths.root / "configs" / f"{profile}.yaml"
    if not source.exists():
        raise ConfigError(f"There is no profile {profile!r}; there are: {', '.join(profiles(paths))}")
    text = source.read_text(encoding="utf-8")
    config = parse(text, str(source))
    if not paths.params.exists() or paths.params.read_text(encoding="utf-8") != text:
        files.write_text(paths.params, text)
    return config

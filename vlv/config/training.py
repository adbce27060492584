"""Both stages: what they train, on how many samples, at which learning rate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlv.config import trainable
from vlv.config.section import Positive, Precision, Section, Share


class Optimizer(Section):
    """AdamW with an LR schedule, and learning rates by group of parameters."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(description="of all parameters that no group has a rate for")
    group_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="prefix of parameter names -> their learning rate; the longest prefix wins"
    )
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        description="AdamW's decay of both averages"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(description="AdamW's, on all trained tensors")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        description="steps in which the rate rises linearly to its full value"
    )
    schedule: Literal["constant", "cosine", "hold_then_linear"] = Field(description="LR schedule after the warm-up")
    hold_share: Share = Field(default=0.5, description="hold_then_linear: share of the steps at the full learning rate")
    final_rate_share: Share = Field(default=0.0, description="learning rate at the last step / full learning rate")
    clip_norm: Annotated[float, Field(gt=0)] = Field(description="largest norm of all gradients together")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="of the moving average of the weights, which is what is saved in the end; 0: no average",
    )


class Timesteps(Section):
    """How diffusion timesteps are sampled."""

    mode: Literal["uniform", "stratified", "logit_normal", "fixed"] = Field(
        description="logit_normal: mostly medium noise, as Stable Diffusion 3 was trained"
    )
    fixed: Annotated[int, Field(ge=0, lt=1000)] = Field(default=0, description="the timestep of the mode fixed")
    high_noise_share: Share = Field(
        default=0.0,
        description="share of timesteps from [high_noise_from, 1000), where the context matters most",
    )
    high_noise_from: Annotated[int, Field(ge=0, lt=1000)] = Field(
        default=600, description="first timestep that counts as high noise"
    )


class Training(Section):
    """What all trainings share."""

    steps: Positive = Field(description="optimizer steps")
    batch_size: Positive = Field(description="samples in one optimizer step, over all processes")
    accumulation: Positive = Field(default=1, description="micro-batches in one step; divides batch_size")
    precision: Precision = Field(description="of the arithmetic; bf16: autocast, trained parameters stay in float32")
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, and one more forward pass of all parts "
        "that are trained or pass gradients",
    )
    frozen_precision: Precision = Field(
        default="fp32",
        description="how weights of frozen Linear and convolution layers are stored; bf16 halves them and needs "
        "precision bf16",
    )
    seed: int = Field(description="of new weights, noise and the order of samples")
    checkpoint_every: Positive = Field(description="steps")
    log_every: Positive = Field(description="steps")
    optimizer: Optimizer

    @model_validator(mode="after")
    def _divides(self) -> "Training":
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}")
        if self.frozen_precision == "bf16" and self.precision != "bf16":
            raise ValueError(
                "frozen_precision bf16 needs precision bf16: there is no fp32 arithmetic with bf16 weights"
            )
        return self


class Stage1(Training):
    """Stage 1: images only (arXiv 2507.07104)."""

    learn: trainable.Stage1Choice = Field(
        description="what is trained in the encoder besides queries and projection (vlv/config/trainable.py)"
    )
    noise_samples_per_image: Positive = Field(description="noise samples for each encoded image; divides batch_size")
    loss: Literal["mse", "l1"] = Field(description="between the prediction and its target")
    timesteps: Timesteps
    same_noise: bool = Field(default=False, description="one noise tensor for the whole batch")
    cache_latents: bool = Field(description="compute the VAE's mean and std once and keep them on disk")
    cache_features: bool = Field(description="compute the frozen vision tower once and keep its features on disk")

    @property
    def trained_parts(self) -> trainable.Parts:
        """The parts of Florence-2 that are trained: a row of `trainable.STAGE1`."""
        return trainable.STAGE1[self.learn]

    @property
    def trains_vision_tower(self) -> bool:
        return trainable.VISION_TOWER in self.trained_parts

    @model_validator(mode="after")
    def _check(self) -> "Stage1":
        if self.batch_size % self.noise_samples_per_image:
            raise ValueError(
                f"noise_samples_per_image {self.noise_samples_per_image} does not divide batch_size {self.batch_size}"
            )
        if self.cache_features and self.trains_vision_tower:
            raise ValueError(f"cache_features needs a frozen vision tower, but learn {self.learn!r} trains it")
        return self


class Lora(Section):
    """Low-rank adapters in the language model (Hu et al., arXiv 2106.09685), for a `learn` that trains adapters."""

    rank: Positive = Field(default=16, description="width of an adapter")
    alpha: Positive = Field(default=32, description="the adapters' output is scaled by alpha / rank")
    targets: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        description="names of the Linear layers that get an adapter",
    )


class Stage2(Training):
    """Stage 2: image-caption pairs (arXiv 2507.07104)."""

    learn: trainable.Stage2Choice = Field(
        description="what is trained (vlv/config/trainable.py); with the encoder (the same parts of it as in Stage 1) "
        "no context can be cached"
    )
    queries_learn: bool = Field(
        default=True,
        description="where the encoder is trained: its queries and projection are trained too; false: they stay as "
        "Stage 1 left them, as in the release. All information of a caption passes them, and they cost next to nothing "
        "to train",
    )
    lora: Lora = Field(default_factory=Lora)
    max_caption_tokens: Positive = Field(description="longer captions are cut, and their number is reported")
    batching: Literal["shuffled", "bucketed"] = Field(
        default="shuffled",
        description="bucketed: captions of similar length, among those of bucket_window steps, share a batch, which "
        "saves padding",
    )
    bucket_window: Positive = Field(default=32, description="steps")
    cache_features: bool = Field(
        default=False,
        description="where the encoder is trained: compute the frozen vision tower once and keep its features on disk",
    )

    @property
    def trained_parts(self) -> trainable.Parts:
        """The parts of the captioner that are trained: a row of `trainable.STAGE2`."""
        return trainable.STAGE2[self.learn]

    @property
    def trains_encoder(self) -> bool:
        return trainable.ENCODER in self.trained_parts

    @property
    def trains_adapters(self) -> bool:
        return trainable.ADAPTERS in self.trained_parts

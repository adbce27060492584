"""Both stages: what learns, on how much, at which rate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlv.config.base import Positive, Precision, Section, Share


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

    mode: Literal["uniform", "stratified", "logit_normal", "fixed"] = Field(
        description="logit_normal: as Stable Diffusion 3 was trained, most draws of middling noise"
    )
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
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, one more forward of what learns or "
        "passes gradients",
    )
    frozen_precision: Precision = Field(
        default="fp32",
        description="how frozen Linear and convolution weights are stored; bf16 halves them, needs precision bf16",
    )
    seed: int
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

    learn: Literal["language_model", "decoder_only", "all", "queries_only"] = Field(
        description="what learns in the encoder besides queries and projection"
    )
    draws_per_image: Positive = Field(description="noise draws for each encoded image; divides batch_size")
    loss: Literal["mse", "l1"]
    timesteps: Timesteps
    same_noise: bool = Field(default=False, description="one noise tensor for the whole batch")
    cache_latents: bool = Field(description="compute the VAE's mean and std once and keep them on disk")
    cache_features: bool = Field(description="compute the frozen vision tower once and keep its features on disk")

    @model_validator(mode="after")
    def _check(self) -> "Stage1":
        if self.batch_size % self.draws_per_image:
            raise ValueError(f"draws_per_image {self.draws_per_image} does not divide batch_size {self.batch_size}")
        if self.cache_features and self.learn == "all":
            raise ValueError("cache_features needs a frozen vision tower, but learn is 'all'")
        return self


class Lora(Section):
    """Low-rank adapters in the language model (Hu et al., arXiv 2106.09685); read where learn is mlp+lora."""

    rank: Positive = 16
    alpha: Positive = Field(default=32, description="the adapters' output is scaled by alpha / rank")
    targets: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        description="names of the Linear layers that get an adapter",
    )


class Stage2(Training):
    """Stage 2: image-caption pairs (arXiv 2507.07104)."""

    learn: Literal["mlp", "mlp+llm", "mlp+lora", "mlp+llm+encoder"] = Field(
        description="what learns; with the encoder (the same parts of it as in Stage 1) no context can be cached"
    )
    queries_learn: bool = Field(
        default=True,
        description="mlp+llm+encoder: queries and projection learn as well; false: they stay as Stage 1 left them, as "
        "in the release. All that a caption is made of passes them, and they cost next to nothing to teach",
    )
    lora: Lora = Field(default_factory=Lora)
    max_caption_tokens: Positive = Field(description="longer captions are cut (and counted)")
    batching: Literal["shuffled", "bucketed"] = Field(
        default="shuffled",
        description="bucketed: captions of like length share a batch, among those of bucket_window steps: less padding",
    )
    bucket_window: Positive = Field(default=32, description="steps")
    cache_features: bool = Field(
        default=False, description="mlp+llm+encoder: compute the frozen vision tower once and keep its features on disk"
    )

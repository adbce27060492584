"""The parts: vision encoder, frozen text-to-image decoder, language model."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from vlv.config.section import Positive, Section, Weights


class Encoder(Section):
    """The vision encoder: Florence-2 with learnable queries (arXiv 2507.07104)."""

    pretrained: str = Field(description="reference to a Florence-2 in Hugging Face form")
    weights: Weights = Field(description="'random' keeps the architecture and draws new weights (a control)")
    architecture: str | None = Field(
        default=None, description="folder with config.json, where the weights are not available"
    )
    image_size: Positive = Field(description="pixels; the vision tower's input (paper: 768)")
    prompt: str = Field(description="task prompt that follows the image features; may be empty")
    queries: Positive = Field(description="learnable queries = caption embeddings (paper: 77)")
    projection_width: Positive = Field(description="hidden width of language_proj")
    start_on_text_side: bool = Field(
        description="normalise the projection and start it at the text side's per-position mean and std"
    )
    start_gain: Annotated[float, Field(gt=0)] = Field(default=0.5, description="share of that std at the start")
    # How the release differs in the next three, and what was measured of it: docs/differences.md.
    query_std: Annotated[float, Field(gt=0)] = Field(
        default=0.5,
        description="std of the queries at the start (release: 1); a norm follows them, so half the "
        "size lets them turn twice as far in one step of AdamW. The committed tiny results were made with it",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="in the encoder's language model, wherever a training computes it (release: 0.1); our trainings "
        "see an image only a few times, and fused attention cannot take masks that are independent of the process",
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="stochastic depth in the vision tower, rising to this in its last block (release: 0.1); without "
        "it a frozen tower's features are the same in each step, and can be cached",
    )


# The kinds of decoders in this package, each with what it draws with: vlv/models/decoders/NAME.py.
DECODERS = {"stable_diffusion": "Stable Diffusion 1.x and 2.x", "sdxl": "Stable Diffusion XL", "sd3": "3 and 3.5"}


class Decoder(Section):
    """The frozen text-to-image model."""

    kind: str = Field(
        description=f"{'; '.join(f'{name}: {models}' for name, models in DECODERS.items())}; or the dotted name of a "
        "module of yours, such as my_package.my_decoder (docs/decoders.md)"
    )
    pretrained: str = Field(
        description="reference to a diffusers folder: vae, unet or transformer, text encoders, tokenizers, scheduler"
    )
    weights: Weights = Field(description="'random' keeps the architecture and draws new weights")
    architecture: str | None = Field(
        default=None, description="folder with the configurations, where the weights are not available"
    )
    image_size: Positive = Field(description="pixels; what it draws (paper: 384)")
    use_text_encoder: bool = Field(
        description="True: caption embeddings pass the frozen text encoder (the paper's headline); "
        "False: they are the cross-attention context itself (the release's other choice)"
    )
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="settings that only this kind has; for sd3: use_t5, whether T5 takes part"
    )

    @property
    def module(self) -> str:
        """Dotted name of the module that defines the kind."""
        return self.kind if "." in self.kind else f"vlv.models.decoders.{self.kind}"

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in DECODERS and not ("." in kind and all(name.isidentifier() for name in kind.split("."))):
            raise ValueError(
                f"there is no kind {kind!r}; there are: {', '.join(DECODERS)}, or the dotted name of a module of yours"
            )
        return kind


class Generation(Section):
    """How a captioner writes. The saved model keeps it; `vlv caption` may be told otherwise.

    The defaults are for models that were taught their end, as ours are. A released checkpoint was not: it writes on
    until the maximum, so the release searches with 4 beams and tidies up (vlv.convert.release.GENERATION).
    """

    beams: Positive = Field(default=1, description="1: greedy; more: beam search, the most likely caption is taken")
    max_tokens: Positive | None = Field(default=None, description="of one caption; null: stage2.max_caption_tokens")
    begin: Literal["tokenizer", "prefix"] = Field(
        default="tokenizer",
        description="tokenizer: the first word follows its <bos>, if it has one; prefix: the prefix",
    )
    end: Literal["tokenizer", "language_model"] = Field(
        default="tokenizer",
        description="tokenizer: its <eos> ends a caption; language_model: whatever its own generation settings name",
    )
    clean_up: bool = Field(
        default=False, description="cut a caption after its last full stop, leave out sentences that were there before"
    )


class LanguageModel(Section):
    """The causal language model that writes the caption."""

    pretrained: str = Field(description="reference to a causal LM and its tokenizer, any Auto class")
    weights: Weights = Field(description="'random' keeps the architecture and draws new weights")
    architecture: str | None = Field(
        default=None, description="folder with the configurations, where the weights are not available"
    )
    prefix_width: Positive = Field(description="hidden width of the MLP between context and LM")
    standardise_context: bool = Field(
        default=False, description="the MLP sees the context less its mean over the training images, divided by its std"
    )
    prefix_positions: bool = Field(default=True, description="a learned position on each of the MLP's outputs")
    generation: Generation = Field(default_factory=Generation)

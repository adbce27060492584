"""The raw data under data/ and the gate it passes."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vlv.config.section import Positive, Section, Share

Resize = Literal["bicubic", "torchvision"]
Encoding = Literal["png", "jpeg"]  # how images that were cut are stored


class ScenesSource(Section):
    """Emoji scenes, which vlv.tiny.scenes draws."""

    module: ClassVar[str | None] = "vlv.tiny.scene_source"  # what makes the samples (vlv/data/sources.py)
    kind: Literal["scenes"]
    sprites: str = Field(description="asset reference to Twemoji's 72x72 PNG files")
    train: Positive = Field(description="samples of the training split")
    validation: Positive = Field(description="samples of the validation split")
    test: Positive = Field(description="samples of the test split")
    seed: int = Field(default=0, description="of the scenes, their drawing and their captions")

    @property
    def assets(self) -> list[str]:
        """References to what the data is made from."""
        return [self.sprites]


class ImportedSource(Section):
    """Images that `vlv data import` imported. The data's manifest says where they come from."""

    module: ClassVar[str | None] = None  # nothing is made
    kind: Literal["imported"]
    description: str | None = Field(default=None, description="which images the profile is made for; only for readers")

    @property
    def assets(self) -> list[str]:
        """References to what the data is made from: none, since nothing is made."""
        return []


class DataGate(Section):
    """Bounds of the data gate (Great Expectations)."""

    min_side: Positive = Field(description="pixels, shorter side")
    max_aspect: Annotated[float, Field(ge=1.0)] = Field(description="longer side / shorter side")
    caption_words_min: Annotated[int, Field(ge=0)] = Field(description="words of the shortest caption")
    caption_words_max: Positive = Field(description="words of the longest caption")
    max_duplicate_share: Share = Field(description="share of samples whose image bytes appear elsewhere")
    captions_required: bool = Field(description="false: samples may lack a caption, which is enough for Stage 1")
    min_share_held: Share = Field(
        default=0.95,
        description="share of the words, and of the whole captions, that the language model's tokenizer must hold; the "
        "language model can neither learn nor write other words",
    )


class Data(Section):
    """The raw data under data/: what it is made from and what it must satisfy."""

    source: ScenesSource | ImportedSource = Field(discriminator="kind")
    image_size: Positive = Field(description="pixels; images are scaled and cropped to this square")
    resize: Resize = Field(
        default="bicubic",
        description="how images are scaled and cropped; torchvision: by its Resize and CenterCrop (bilinear), as the "
        "release does",
    )
    shard_size: Annotated[int, Field(gt=0, le=10_000)] = Field(description="samples in one tar")
    gate: DataGate

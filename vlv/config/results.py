"""What happens to what a training leaves: evaluation, registration, a copy of its curves."""

from typing import Annotated

from pydantic import Field, model_validator

from vlv.config.section import Positive, Section


class Evaluate(Section):
    """Evaluation on the test split."""

    captions: Positive = Field(description="test scenes or images to caption")
    reconstructions: Positive = Field(description="test images to reconstruct; FID uses as many")
    guidance: Annotated[float, Field(ge=1.0)] = Field(
        description="classifier-free guidance of reconstructions; 1: none"
    )
    steps: Positive = Field(description="sampler steps")
    seed: int = Field(description="of the noise; image i takes seed + i")
    batch_size: Positive = Field(description="images at a time")
    feature_network: str | None = Field(description="asset reference to the Inception network; null: no FID")
    sentence_model: str | None = Field(
        default=None, description="asset reference to a sentence-embedding model; null: no caption similarity"
    )
    counting: Annotated[str, Field(pattern=r"^vlv(\.\w+)+$")] | None = Field(
        default=None,
        description="module of this package that counts what captions and pictures show (vlv.evaluation.truth); "
        "null where the truth is not known",
    )
    recogniser: str | None = Field(
        default=None, description="asset reference to the network with which `counting` reads pictures"
    )
    untrained_baseline: bool = Field(description="also train Stage 2 on an untrained Stage 1, as a baseline")

    @model_validator(mode="after")
    def _check(self) -> "Evaluate":
        if self.recogniser and not self.counting:
            raise ValueError("evaluate.recogniser needs evaluate.counting, which counts what it reads")
        return self


class Register(Section):
    """Registration and promotion."""

    captioner_name: str = Field(description="registered model of Stage 2")
    autoencoder_name: str = Field(description="registered model of Stage 1")
    promote: bool = Field(description="the flow promotes the new version if it passes the gates")


class Tracking(Section):
    """A copy of the curves. DVC does not track this section: nothing here changes what is computed."""

    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project that training curves are copied to; null: none"
    )
    wandb_online: bool = Field(
        default=False,
        description="false: the copy is written to work/wandb, and `wandb sync` sends it; true: it is sent during the "
        "training",
    )

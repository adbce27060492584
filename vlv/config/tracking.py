"""Where the course of a training is told besides MLflow."""

from pydantic import Field

from vlv.config.base import Section


class Tracking(Section):
    """A mirror of the curves. DVC does not track this section: nothing here changes what is computed."""

    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project that training curves are copied to; null: none"
    )
    wandb_online: bool = Field(
        default=False, description="false: into work/wandb, to be sent with `wandb sync`; true: sent as it goes"
    )

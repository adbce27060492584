"""Low-rank adapters in the language model (LoRA, Hu et al., arXiv 2106.09685), through peft.

They are kept beside the frozen weights, in training as in the saved model: the file holds a few megabytes, and
the language model it belongs to is named by its hash, as every frozen part is. Merged, the whole language model
would have to be saved, and rounded once more.
"""

from torch import nn
from transformers import PreTrainedModel

from vlv.config import ConfigError, Lora

_MARK = "lora_"  # in the names of peft's tensors


def insert(language_model: PreTrainedModel, settings: Lora) -> None:
    """Put an adapter beside each Linear layer that `settings.targets` names; draws from torch's global generator.

    Raises:
        ConfigError: a target that the language model does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name.rpartition(".")[2] for name, part in language_model.named_modules() if isinstance(part, nn.Linear)}
    if unknown := sorted(set(settings.targets) - linear):
        raise ConfigError(
            f"stage2.lora.targets names {unknown}, but the Linear layers of {type(language_model).__name__} are: "
            f"{', '.join(sorted(linear))}"
        )
    inject_adapter_in_model(
        LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets), language_model
    )


def set_trainable(language_model: PreTrainedModel) -> None:
    """Train the adapters alone."""
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(_MARK in name)

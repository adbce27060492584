"""The causal language model that writes the caption: building it, its adapters, and cutting its captions.

Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) come from peft. They are kept beside the frozen weights, in
training as in the saved model: the file holds a few megabytes and names the language model by its hash, as it does
every frozen part. With the adapters merged, the whole language model would have to be saved and rounded once more.
"""

import re

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from vlv import config
from vlv.config import ConfigError, Lora, Paths
from vlv.models.build import attention, building, folder_of
from vlv.models.build import tokenizer as tokenizer_in

_ADAPTER = "lora_"  # in the names of peft's tensors
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


def build(section: config.LanguageModel, paths: Paths) -> PreTrainedModel:
    """The language model in evaluation mode, of any Auto class; `tokenizer` gives its words."""
    folder = folder_of(section, paths)
    with building("language model", folder, section.weights):
        if section.weights == "random":
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(
                settings, attn_implementation=attention(), trust_remote_code=False
            ).float()
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention(),
                trust_remote_code=False,
            )
    built: PreTrainedModel = model.eval()
    return built


def tokenizer(section: config.LanguageModel, paths: Paths) -> PreTrainedTokenizerBase | None:
    """The language model's tokenizer; None for an architecture alone (weights: random), which may come without one."""
    if section.weights == "random" and section.architecture is not None:
        return None
    return tokenizer_in(folder_of(section, paths))


def insert_adapters(language_model: PreTrainedModel, settings: Lora) -> None:
    """Put an adapter beside each Linear layer that `settings.targets` names; uses torch's global RNG.

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


def train_adapters(language_model: PreTrainedModel) -> None:
    """Only the adapters learn."""
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(_ADAPTER in name)


def clean_up(caption: str) -> str:
    """Cut after the last full stop (if there is one), and leave out each sentence that was there before.

    The release does this to every caption. Our models are taught where to end, so half a sentence is a fault of theirs
    that should be seen.
    """
    whole = caption[: caption.rfind(".") + 1] or caption
    return " ".join(dict.fromkeys(sentence for sentence in _BETWEEN_SENTENCES.split(whole) if sentence))

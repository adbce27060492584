"""The causal language model that writes the caption: how it is built, its adapters, and cutting its captions.

Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) come from peft. They stay separate from the frozen weights, in
training and in the saved model: its file has a few megabytes, and the language model is named by its hash, like every
frozen part. If they were merged, the whole language model would have to be saved and rounded again.
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
    """The language model in evaluation mode, of any causal class that transformers' Auto classes know."""
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
    """The language model's tokenizer; None if an architecture alone (weights: random) comes without one."""
    if section.weights == "random" and section.architecture is not None:
        return None
    return tokenizer_in(folder_of(section, paths))


def insert_adapters(language_model: PreTrainedModel, settings: Lora) -> None:
    """Add an adapter to each Linear layer that `settings.targets` names; uses torch's global RNG.

    Raises:
        ConfigError: the language model has no such target.
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
    """Make only the adapters trainable."""
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(_ADAPTER in name)


def clean_up(caption: str) -> str:
    """Cut after the last full stop (if there is one), and drop repeated sentences.

    The release does this to every caption. Our models learn where to end, so half a sentence is an error that should
    stay visible.
    """
    whole = caption[: caption.rfind(".") + 1] or caption
    return " ".join(dict.fromkeys(sentence for sentence in _BETWEEN_SENTENCES.split(whole) if sentence))
